"""Before the first step: pixels and masks of a cut, and the caches of latents, masks and prompt embeddings."""

from dataclasses import replace

import numpy as np
import torch
from tqdm import tqdm

from library.data import captions, colour, images
from library.data.cache import KEY, Store, fill, make_key
from library.data.dataset import Data
from library.data.table import Table
from library.errors import UserError
from library.training import processes, watch


def load_pixels(data: Data, row: int, number: int, mode: str) -> np.ndarray:
    """The `number`-th cut of an image -> [H, W, 3] uint8. Raises `BadImage`."""
    table = data.table
    cut, mode = table.cut(row, number), table.spec(row).interpolation or mode
    pixels = np.asarray(images.read_pixels(data.read(row), tuple(table.resized[row].tolist()), mode))
    pixels = _crop(pixels, table, row, cut)
    if cut.colour:
        return colour.change(pixels, *cut.colour)
    return pixels.copy()    # torch wants an array of its own, to write to


def load_mask(data: Data, row: int, number: int) -> torch.Tensor:
    """The mask of the `number`-th cut -> [1, H/8, W/8] float32 in 0..1, the mean over the pixels of each latent.

    Ones where the set has no masks. Raises `BadImage`.
    """
    table = data.table
    width, height = table.buckets[table.bucket_of[row]]
    kind = table.spec(row).mask
    if not kind:
        return torch.ones(1, height // 8, width // 8)
    read = images.read_alpha if kind == "alpha" else images.read_mask
    mask = _crop(read(data.read_mask(row), tuple(table.resized[row].tolist())), table, row, table.cut(row, number))
    return torch.from_numpy(mask.reshape(1, height // 8, 8, width // 8, 8).mean(axis=(2, 4), dtype=np.float32) / 255)


def _crop(pixels: np.ndarray, table: Table, row: int, cut) -> np.ndarray:
    width, height = table.buckets[table.bucket_of[row]]
    pixels = pixels[:, ::-1] if cut.flip else pixels
    return pixels[cut.top:cut.top + height, cut.left:cut.left + width]


def latent_key(table: Table, row: int, number: int, recipe: str) -> bytes:
    """Key of a cut's latents: the file's content, its resize and cut, and `recipe` (encoder, precision, resampling)."""
    left, top, flip, tint = table.cut(row, number)
    mode = table.spec(row).interpolation
    return make_key("latent", recipe, table.content[row].decode(), *table.resized[row].tolist(),
                    *table.buckets[table.bucket_of[row]], left, top, flip, *(tint or ()), *([mode] if mode else ()))


def mask_key(table: Table, row: int, number: int) -> bytes:
    """Key of a cut's mask: the content of the mask's file, what of it is the mask, its resize and cut."""
    kind = "alpha" if table.spec(row).mask == "alpha" else "image"
    return make_key("mask", images.VERSION, kind, table.mask_content[row].decode(), *table.resized[row].tolist(),
                    *table.buckets[table.bucket_of[row]], *table.cut(row, number)[:3])


def prompt_key(prompt: str, recipe: str) -> bytes:
    """Key of a prompt's embeddings: its text, and `recipe` (encoders, tokenizers, precision, length)."""
    return make_key("prompt", recipe, prompt)


def cache_latents(data: Data, rows: np.ndarray, store: Store, recipe: str, most: list[int], batch_size: int, mode: str,
                  make_encoder) -> tuple[dict[int, str], int]:
    """Encode every cut of these rows that the run can visit and that is not in `store` yet.

    most: cuts kept of one image, a number for each data set. make_encoder() -> function from pixels [B, H, W, 3] uint8 to
    {field: [B, ...]}; only called when something is missing. Batches are cut from the whole list, cached or not, so that
    a killed and restarted run computes the same numbers in the same company.
    Returns ({row: why it cannot be decoded}, number of cuts made for this process's store). Raises `UserError` for NaN,
    naming the image.
    """
    table = data.table
    jobs, groups = _cuts(data, rows, most, batch_size)
    keys = np.array([latent_key(table, row, number, recipe) for row, number in jobs], KEY)
    missing, anywhere = _missing(store, keys)
    if not anywhere:
        return {}, 0
    groups = [group for group in groups if missing[group].any()]
    encode = make_encoder() if groups else None
    faults: dict[int, str] = {}

    def load(group):
        pixels = {}
        for job in group:
            row, number = jobs[job]
            try:
                pixels[job] = load_pixels(data, row, number, mode)
            except (images.BadImage, OSError) as fault:
                faults[row] = str(fault)
        return pixels

    def encode_group(group, pixels):
        if not pixels:
            return {}
        fields = encode(torch.from_numpy(np.stack(list(pixels.values()))))
        entries = {}
        for place, job in enumerate(pixels):
            check_finite({name: values[place] for name, values in fields.items()}, table, jobs[job][0])
            if missing[job]:
                entries[keys[job]] = {name: values[place].clone() for name, values in fields.items()}
        return entries

    with _bar(sum(map(len, groups)), "encode images", "image", store) as advance:
        fill(store, groups, load, encode_group, advance)
    return dict(processes.gather(list(faults.items()))), int(missing.sum())


def check_finite(fields: dict[str, torch.Tensor], table: Table, row: int) -> None:
    """Refuse NaN or infinity in an image's latents. Raises `UserError` naming it."""
    if not all(torch.isfinite(values).all() for values in fields.values()):
        raise UserError(f"the VAE makes NaN or infinity of {table.name[row]}: use --vae_dtype fp32, or another "
                        "VAE by --pretrained_vae_model_name_or_path (madebyollin/sdxl-vae-fp16-fix)")


def cache_masks(data: Data, rows: np.ndarray, store: Store, most: list[int]) -> dict[int, str]:
    """Shrink every mask of these rows to the size of its latents, once. Returns {row: why it cannot be decoded}."""
    jobs, groups = _cuts(data, rows, most, 16)
    keys = np.array([mask_key(data.table, row, number) for row, number in jobs], KEY)
    missing, anywhere = _missing(store, keys)
    groups = [group[missing[group]] for group in groups if missing[group].any()]
    if not anywhere:
        return {}
    faults: dict[int, str] = {}

    def load(group):
        found = {}
        for job in group:
            try:
                found[keys[job]] = {"mask": load_mask(data, *jobs[job])}
            except (images.BadImage, OSError) as fault:
                faults[jobs[job][0]] = f"its mask: {fault}"
        return found

    with _bar(int(missing.sum()), "masks", "mask", store) as advance:
        fill(store, groups, load, lambda group, found: found, advance)
    return dict(processes.gather(list(faults.items())))


def cache_prompts(prompts: list[str], store: Store, recipe: str, batch_size: int, make_encoder) -> int:
    """Encode every prompt that is not in `store` yet. Returns their number.

    make_encoder() -> function from prompts to {field: [B, ...] or a list of B}; only called when something is missing.
    """
    prompts = sorted(set(prompts))
    keys = np.array([prompt_key(prompt, recipe) for prompt in prompts], KEY)
    missing, anywhere = _missing(store, keys)
    if not anywhere:
        return 0
    groups = [group for group in _batches(np.zeros(len(prompts)), batch_size) if missing[group].any()]
    encode = make_encoder() if groups else None

    def encode_group(group, texts):
        fields = encode(texts)
        return {keys[job]: {name: values[place].clone() for name, values in fields.items()}
                for place, job in enumerate(group) if missing[job]}

    with _bar(sum(map(len, groups)), "encode captions", "caption", store) as advance:
        fill(store, groups, lambda group: [prompts[job] for job in group], encode_group, advance)
    return int(missing.sum())


def all_prompts(table: Table, most: list[int]) -> list[str]:
    """Every prompt the run can show, the empty one included. most: variants kept of a caption, for each data set."""
    prompts = {""}
    counts = table.caption_start[1:] - table.caption_start[:-1]
    set_of_text = np.repeat(table.set_of, counts)
    used = table.captions[table.caption_start[0]:table.caption_start[-1]]
    for number, spec in enumerate(table.sets):
        texts = np.unique(used if len(table.sets) == 1 else used[set_of_text == number]).tolist()
        if replace(spec.text, empty=0.0, empty_every=0, bare=False) == captions.Rules():
            prompts.update(texts)    # shown as written
            continue
        prompts |= captions.possible([], spec.text, most[number])    # of images without a caption
        for text in texts:
            prompts |= captions.possible([text], spec.text, most[number])
    return sorted(prompts)


def _cuts(data: Data, rows: np.ndarray, most: list[int], batch_size: int) -> tuple[list[tuple[int, int]], list[np.ndarray]]:
    """Every (row, number of the cut), and batches of them of one shape, as indices into that list.

    In the order of buckets; a source that can only be read forwards gets its rows nearly in their order.
    """
    table = data.table
    window = np.zeros(len(rows), np.int64)
    for number, source in enumerate(data.sources):
        if getattr(source, "window", None):
            mine = table.set_of[rows] == number
            window[mine] = table.source_row[rows[mine]] // source.window
    order = np.lexsort((table.bucket_of[rows], window))
    times = [table.variants(row, most[table.set_of[row]]) for row in rows[order].tolist()]
    jobs = [(row, number) for row, several in zip(rows[order].tolist(), times, strict=True) for number in range(several)]
    group_of = np.repeat(window[order] * len(table.buckets) + table.bucket_of[rows[order]], times)
    return jobs, _batches(group_of, batch_size)


def _missing(store: Store, keys: np.ndarray) -> tuple[np.ndarray, bool]:
    """([N] bool, the same on all processes that share the folder, as another run may be writing to it; whether any process
    lacks any: then all go on)."""
    seen = processes.gather([~store.has(keys)])
    return np.logical_or.reduce([seen[rank] for rank in store.team]), any(each.any() for each in seen)


def _batches(group_of: np.ndarray, size: int) -> list[np.ndarray]:
    """Consecutive indices in batches of at most `size` that never mix two values of `group_of`."""
    borders = np.flatnonzero(np.diff(group_of)) + 1
    return [part[start:start + size] for part in np.split(np.arange(len(group_of)), borders)
            for start in range(0, len(part), size)]


class _bar:
    """A progress bar over the work of all processes that share a store, as far as the main one can see: its share, scaled up."""

    def __init__(self, total: int, label: str, unit: str, store: Store):
        self._bar = tqdm(total=total, desc=label, unit=unit, disable=not processes.is_main())
        self._label, self._done, self._total, self._sharers = label, 0, -(-total // len(store.team)), len(store.team)

    def __enter__(self):
        watch.now(self._label)
        return self._advance

    def _advance(self, count: int) -> None:
        self._done += count
        watch.progress(f"{self._done} of about {self._total}")
        self._bar.update(min(count * self._sharers, self._bar.total - self._bar.n))

    def __exit__(self, *_):
        self._bar.close()

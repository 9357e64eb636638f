"""Before the first step: pixels of a cut, and the caches of latents and prompt embeddings."""

import numpy as np
import torch
from tqdm import tqdm

from library.data import captions, images
from library.data.cache import KEY, Store, fill, make_key
from library.data.table import Table
from library.errors import UserError
from library.training import processes


def load_pixels(source, table: Table, row: int, number: int, mode: str) -> np.ndarray:
    """The `number`-th cut of an image -> [H, W, 3] uint8. Raises `BadImage`."""
    left, top, flip = table.cut(row, number)
    width, height = table.buckets[table.bucket_of[row]]
    image = images.read_pixels(source.read(int(table.source_row[row])), tuple(table.resized[row].tolist()), mode)
    pixels = np.asarray(image)
    pixels = pixels[:, ::-1] if flip else pixels
    return pixels[top:top + height, left:left + width].copy()    # torch wants an array of its own, to write to


def latent_key(table: Table, row: int, number: int, recipe: str) -> bytes:
    """Key of a cut's latents: the file's content, its resize and cut, and `recipe` (encoder, precision, resampling)."""
    return make_key("latent", recipe, table.content[row].decode(), *table.resized[row].tolist(),
                    *table.buckets[table.bucket_of[row]], *table.cut(row, number))


def prompt_key(prompt: str, recipe: str) -> bytes:
    """Key of a prompt's embeddings: its text, and `recipe` (encoders, tokenizers, precision, length)."""
    return make_key("prompt", recipe, prompt)


def cache_latents(table: Table, source, store: Store, recipe: str, most: int, batch_size: int, mode: str,
                  make_encoder) -> tuple[dict[int, str], int]:
    """Encode every cut that the run can visit and that is not in `store` yet.

    most: cuts kept of one image. make_encoder() -> function from pixels [B, H, W, 3] uint8 to {field: [B, ...]};
    only called when something is missing. Batches are cut from the whole list, cached or not, so that a killed and
    restarted run computes the same numbers in the same company.
    Returns ({row: why it cannot be decoded}, number of cuts encoded). Raises `UserError` for NaN, naming the image.
    """
    jobs = [(row, number) for row in np.argsort(table.bucket_of, kind="stable").tolist()
            for number in range(table.variants(row, most))]
    keys = np.array([latent_key(table, row, number, recipe) for row, number in jobs], KEY)
    missing = np.logical_or.reduce(processes.gather([~store.has(keys)]))    # one view for all: another run may be writing
    if not missing.any():
        return {}, 0
    buckets = table.bucket_of[[row for row, _ in jobs]]
    groups = [group for group in _batches(buckets, batch_size) if missing[group].any()]
    encode = make_encoder() if groups else None
    faults: dict[int, str] = {}

    def load(group):
        pixels = {}
        for job in group:
            row, number = jobs[job]
            try:
                pixels[job] = load_pixels(source, table, row, number, mode)
            except images.BadImage as fault:
                faults[row] = str(fault)
        return pixels

    def encode_group(group, pixels):
        if not pixels:
            return {}
        fields = encode(torch.from_numpy(np.stack(list(pixels.values()))))
        entries = {}
        for place, job in enumerate(pixels):
            row = jobs[job][0]
            if not all(torch.isfinite(values[place]).all() for values in fields.values()):
                raise UserError(f"the VAE makes NaN or infinity of {table.name[row]}: use --vae_dtype fp32, or another "
                                "VAE by --pretrained_vae_model_name_or_path (madebyollin/sdxl-vae-fp16-fix)")
            if missing[job]:
                entries[keys[job]] = {name: values[place].clone() for name, values in fields.items()}
        return entries

    with _bar(sum(map(len, groups)), "encode images", "image") as advance:
        fill(store, groups, load, encode_group, advance)
    return dict(processes.gather(list(faults.items()))), int(missing.sum())


def cache_prompts(prompts: list[str], store: Store, recipe: str, batch_size: int, make_encoder) -> int:
    """Encode every prompt that is not in `store` yet. Returns their number.

    make_encoder() -> function from prompts to {field: [B, ...]}; only called when something is missing.
    """
    prompts = sorted(set(prompts))
    keys = np.array([prompt_key(prompt, recipe) for prompt in prompts], KEY)
    missing = np.logical_or.reduce(processes.gather([~store.has(keys)]))    # one view for all: another run may be writing
    if not missing.any():
        return 0
    groups = [group for group in _batches(np.zeros(len(prompts)), batch_size) if missing[group].any()]
    encode = make_encoder() if groups else None

    def encode_group(group, texts):
        fields = encode(texts)
        return {keys[job]: {name: values[place].clone() for name, values in fields.items()}
                for place, job in enumerate(group) if missing[job]}

    with _bar(sum(map(len, groups)), "encode captions", "caption") as advance:
        fill(store, groups, lambda group: [prompts[job] for job in group], encode_group, advance)
    return int(missing.sum())


def all_prompts(table: Table, most: int, shuffle: bool, keep: int) -> list[str]:
    """Every prompt the run can show, the empty one included."""
    if not shuffle:
        return ["", *np.unique(table.captions).tolist()]
    prompts = {""}
    for caption in np.unique(table.captions).tolist():
        prompts |= captions.possible([caption], most, shuffle=True, keep=keep)
    return sorted(prompts)


def _batches(group_of: np.ndarray, size: int) -> list[np.ndarray]:
    """Consecutive indices in batches of at most `size` that never mix two values of `group_of`."""
    borders = np.flatnonzero(np.diff(group_of)) + 1
    return [part[start:start + size] for part in np.split(np.arange(len(group_of)), borders)
            for start in range(0, len(part), size)]


class _bar:
    """A progress bar over the work of all processes, as far as the main one can see: its share, scaled up."""

    def __init__(self, total: int, label: str, unit: str):
        self._bar = tqdm(total=total, desc=label, unit=unit, disable=not processes.is_main())

    def __enter__(self):
        return lambda count: self._bar.update(min(count * processes.world(), self._bar.total - self._bar.n))

    def __exit__(self, *_):
        self._bar.close()

"""Batches for the training loop: samples of a step -> tensors, all randomness included.

The batch of (step, micro step, process) is a function of the data, the flags and the seed, so nothing here has a
state to save.
"""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
import torch

from library.data import captions, draws, prepare
from library.data.cache import Store
from library.data.dataset import Data
from library.data.images import BadImage
from library.data.ondemand import OnDemand
from library.data.sampler import Sampler
from library.errors import UserError
from library.training import devices


@dataclass(frozen=True)
class LatentSource:
    """Where latents come from: a store for each data set, or None where images are encoded at every visit.

    encode: pixels [1, H, W, 3] uint8 -> {"moments": [1, 2 C, h, w]}, for what is in no store; one image at a time, so that
    the result does not depend on the company it is encoded in.
    """
    stores: list[Store | OnDemand | None]
    recipe: str
    most: list[int | None]       # cuts kept of an image, for each data set; None: no end of them
    channels: int                # C
    shift: torch.Tensor          # [C, 1, 1]: latents are (drawn posterior - shift) * scale
    scale: torch.Tensor          # [C, 1, 1]
    encode: Callable | None = None
    lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def whole(self) -> bool:
        """Whether everything is on disk before the first step, so that the encoder can go."""
        return all(isinstance(store, Store) for store in self.stores)

    def close(self) -> None:
        """Write what was made in the run and is not yet on the disk."""
        for store in self.stores:
            if isinstance(store, OnDemand):
                store.close()


@dataclass(frozen=True)
class PromptSource:
    """Where prompts come from: a store, or token ids in the batch, made by `tokenize`; or both, for some text encoders each."""
    store: Store | OnDemand | None
    recipe: str
    most: list[int | None]       # variants kept of a caption, for each data set; None: no end of them
    tokenize: Callable | None    # prompts, silent text encoders of each -> {name: [B, ...] int64}; None: the store has it all
    warmup: list[float]          # optimizer steps until all tags of a caption are shown, for each data set
    encode: Callable | None = None    # prompts -> {name: [B, ...]}, for a store that is filled on demand
    fields: tuple[str, ...] = ()      # what the store keeps of a prompt
    assemble: Callable | None = None    # fields, those of "", silent text encoders -> {name: tensor} of the batch
    dropout: tuple[float, ...] = ()   # share of visits at which each text encoder hears nothing

    @property
    def whole(self) -> bool:
        """Whether everything is on disk before the first step, so that the encoders can go."""
        return isinstance(self.store, Store)

    def read(self, prompt: str) -> dict[str, torch.Tensor]:
        """What the store keeps of a prompt."""
        key = prepare.prompt_key(prompt, self.recipe)
        if isinstance(self.store, OnDemand):
            def make():
                return {name: values[0] for name, values in self.encode([prompt]).items()}
            return {name: self.store.read(key, name, make) for name in self.fields}
        return {name: self.store.read(key, name) for name in self.fields}

    def silent(self, prompt: str, seed: int, row: int, visit: int) -> tuple[bool, ...]:
        """Which text encoders hear nothing at one visit of one image; all of them where there is no prompt."""
        if not prompt or not any(self.dropout):
            return (not prompt,) * len(self.dropout)
        drawn = draws.generator(seed, row, visit, draws.ENCODERS).random(len(self.dropout))
        return tuple((drawn < self.dropout).tolist())

    def embeds(self, prompt: str, silent: tuple[bool, ...]) -> dict[str, torch.Tensor]:
        """What the store makes of the batch for a prompt."""
        fields = self.read(prompt)
        return self.assemble(fields, self.read("") if prompt and any(silent) else fields, silent)

    def close(self) -> None:
        """Write what was made in the run and is not yet on the disk."""
        if isinstance(self.store, OnDemand):
            self.store.close()


class Loader:
    """Batches from any step on.

    accelerator: which process this is among how many. --dataloader_num_workers threads prepare batches ahead; with
    none, each is prepared when it is asked for, while the device still computes.
    """

    def __init__(self, data: Data, sampler: Sampler, latents: LatentSource, prompts: PromptSource, args, seed: int, accelerator):
        self.data, self.table, self.sampler = data, data.table, sampler
        self.latents, self.prompts, self.seed = latents, prompts, seed
        self.rank, self.world = accelerator.process_index, accelerator.num_processes
        self.accumulation = args.gradient_accumulation_steps
        self.workers, self.mode = args.dataloader_num_workers, args.image_interpolation_mode
        self.pin = devices.pins_memory(accelerator.device.type)

    def batches(self, first_step: int, steps: int):
        """Yield the batches of this process from optimizer step `first_step` to before `steps`, in order."""
        jobs = ((step, micro) for step in range(first_step, steps) for micro in range(self.accumulation))
        if not self.workers:
            yield from (self.compose(*job) for job in jobs)
            return
        with ThreadPoolExecutor(self.workers) as pool:
            ahead = []
            try:
                for job in jobs:
                    ahead.append(pool.submit(self.compose, *job))
                    if len(ahead) > self.workers:
                        yield ahead.pop(0).result()
                while ahead:
                    yield ahead.pop(0).result()
            finally:
                for waiting in ahead:
                    waiting.cancel()

    def samples(self, step: int, micro: int) -> tuple[np.ndarray, np.ndarray, int]:
        """(rows [B], visits [B], bucket) of this process. A step's samples are dealt to micro steps, then processes."""
        bucket, rows, visits = self.sampler.batch(step)
        share = len(rows) // (self.accumulation * self.world)
        start = (micro * self.world + self.rank) * share
        return rows[start:start + share], visits[start:start + share], bucket

    def compose(self, step: int, micro: int) -> dict[str, torch.Tensor]:
        """One batch. B samples of one bucket, latents of C x h x w:

        latents [B, C, h, w], noise [B, C, h, w], noise_offset [B, C, 1, 1], timestep_draw [B] in [0, 1), time_ids [B, 6],
        loss_weight [B], loss_mask [B, 1, h, w] if any data set has masks, keeps_prior [B] if any does, float32;
        prompt_embeds [B, L, D] and pooled_prompt_embeds [B, P], or token ids to make them of.
        """
        rows, visits, bucket = self.samples(step, micro)
        return self._batch(rows, visits, step, bucket)

    def _batch(self, rows: np.ndarray, visits: np.ndarray, step: int, bucket: int) -> dict[str, torch.Tensor]:
        width, height = self.table.buckets[bucket]
        seen, latents = list(zip(rows.tolist(), visits.tolist(), strict=True)), self.latents
        numbers, specs = [self._number(*each) for each in seen], [self.table.spec(row) for row, _ in seen]
        noise, offset, latent_draw, levels = self._draws(seen, (latents.channels, height // 8, width // 8))
        cuts = [(row, number) for (row, _), number in zip(seen, numbers, strict=True)]
        mean, std = torch.stack([self._moments(*cut) for cut in cuts]).float().chunk(2, dim=1)
        batch = {
            "noise": noise, "noise_offset": offset, "timestep_draw": levels,
            "time_ids": torch.tensor([self.table.time_ids(*cut) for cut in cuts], dtype=torch.float32),
            "latents": (mean + std * latent_draw - latents.shift) * latents.scale,
            "loss_weight": torch.tensor([spec.weight if spec.regularisation else 1.0 for spec in specs], dtype=torch.float32),
        }
        if any(each.keeps_prior for each in self.table.sets):
            batch["keeps_prior"] = torch.tensor([float(spec.keeps_prior) for spec in specs])
        if self.table.masked:
            batch["loss_mask"] = torch.stack([self._mask(*cut) for cut in cuts])
        batch |= self._prompts([self.prompt(row, visit, step) for row, visit in seen], seen)
        return {name: values.pin_memory() for name, values in batch.items()} if self.pin else batch

    def _draws(self, seen: list[tuple[int, int]], shape: tuple[int, int, int]) -> tuple[torch.Tensor, ...]:
        """Of (row, visit) of B samples: noise and latent draw [B, C, h, w], noise offset [B, C, 1, 1], timestep draw [B]."""
        sizes = (shape, (shape[0], 1, 1), shape, ())
        noise, offset, latent_draw, levels = drawn = [np.empty((len(seen), *size), np.float32) for size in sizes]
        for place, (row, visit) in enumerate(seen):
            of_noise, of_latent, of_level = (
                draws.generator(self.seed, row, visit, purpose) for purpose in (draws.NOISE, draws.LATENT, draws.TIMESTEP))
            of_noise.standard_normal(out=noise[place], dtype=np.float32)
            of_noise.standard_normal(out=offset[place], dtype=np.float32)
            of_latent.standard_normal(out=latent_draw[place], dtype=np.float32)
            levels[place] = of_level.random(dtype=np.float32)
        return tuple(torch.from_numpy(each) for each in drawn)

    def _prompts(self, prompts: list[str], seen: list[tuple[int, int]]) -> dict[str, torch.Tensor]:
        """What the batch holds of its prompts: embeddings, token ids, or both."""
        silent = [self.prompts.silent(prompt, self.seed, *each) for prompt, each in zip(prompts, seen, strict=True)]
        batch, asked = {}, list(zip(prompts, silent, strict=True))
        if self.prompts.store:
            made = {one: self.prompts.embeds(*one) for one in dict.fromkeys(asked)}    # DreamBooth's are all the same
            batch = {name: torch.stack([made[one][name] for one in asked]) for name in made[asked[0]]}
        return batch | (self.prompts.tokenize(prompts, silent) if self.prompts.tokenize else {})

    def one_by_one(self, most: int):
        """Yield (id of the data set, batch of one image) for this process's share of the first `most` images of each set."""
        rows = np.concatenate([np.flatnonzero(self.table.set_of == number)[:most] for number in range(len(self.table.sets))])
        for row in rows[self.rank::self.world].tolist():
            yield self.table.spec(row).id, self._batch(np.array([row]), np.array([0]), 0, int(self.table.bucket_of[row]))

    def prompt(self, row: int, visit: int, step: int = 0) -> str:
        """The prompt shown at one visit of one image."""
        number, spec = self.table.set_of[row], self.table.spec(row)
        warmup = self.prompts.warmup[number]
        return captions.pick(self.table.texts(row), spec.text, self.seed, row, visit, self.prompts.most[number],
                             epoch=visit // max(1, round(spec.rate)), shown=min(1.0, step / warmup) if warmup else 1.0)

    def _number(self, row: int, visit: int) -> int:
        """Which cut of the image this visit sees."""
        cuts = self.table.variants(row, self.latents.most[self.table.set_of[row]])
        return visit if cuts is None else visit % cuts

    def _moments(self, row: int, number: int) -> torch.Tensor:
        """Mean and standard deviation of the VAE's posterior, [2 C, h, w]: read, or encoded now."""
        latents, store = self.latents, self.latents.stores[self.table.set_of[row]]
        if store is None:
            return self._encode(row, number)["moments"]
        key = prepare.latent_key(self.table, row, number, latents.recipe)
        if isinstance(store, OnDemand):
            return store.read(key, "moments", lambda: self._encode(row, number))
        return store.read(key, "moments")

    def _encode(self, row: int, number: int) -> dict[str, torch.Tensor]:
        try:
            pixels = torch.from_numpy(prepare.load_pixels(self.data, row, number, self.mode))
        except (BadImage, OSError) as fault:    # it was whole when the run began
            raise UserError(f"{self.table.name[row]} can no longer be read: {fault}") from None
        with self.latents.lock:
            fields = {name: values[0] for name, values in self.latents.encode(pixels[None]).items()}
        prepare.check_finite(fields, self.table, row)
        return fields

    def _mask(self, row: int, number: int) -> torch.Tensor:
        store = self.latents.stores[self.table.set_of[row]]
        if isinstance(store, Store) and self.table.spec(row).mask:
            return store.read(prepare.mask_key(self.table, row, number), "mask")
        return prepare.load_mask(self.data, row, number)

"""Batches for the training loop: samples of a step -> tensors, all randomness included.

The batch of (step, micro step, process) is a function of the data, the flags and the seed, so nothing here has a
state to save.
"""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch

from library.data import captions, draws, prepare
from library.data.cache import Store
from library.data.sampler import Sampler
from library.data.table import Table


@dataclass(frozen=True)
class LatentSource:
    """Where latents come from. Without a store the batch holds pixels, to be encoded in the step."""
    store: Store | None
    recipe: str
    most: int                    # cuts kept of an image
    channels: int                # C
    shift: torch.Tensor          # [C, 1, 1]: latents are (drawn posterior - shift) * scale
    scale: torch.Tensor          # [C, 1, 1]


@dataclass(frozen=True)
class PromptSource:
    """Where prompts come from. Without a store the batch holds token ids, made by `tokenize`."""
    store: Store | None
    recipe: str
    most: int                    # tag orders kept of a caption
    tokenize: object             # prompts -> {name: [B, L] int64}; None with a store
    empty: float                 # probability of the empty prompt
    shuffle: bool
    keep: int


class Loader:
    """Batches from any step on.

    accelerator: which process this is among how many. --dataloader_num_workers threads prepare batches ahead; with
    none, each is prepared when it is asked for, while the device still computes.
    """

    def __init__(self, table: Table, source, sampler: Sampler, latents: LatentSource, prompts: PromptSource, args,
                 seed: int, accelerator):
        self.table, self.source, self.sampler = table, source, sampler
        self.latents, self.prompts, self.seed = latents, prompts, seed
        self.rank, self.world = accelerator.process_index, accelerator.num_processes
        self.accumulation = args.gradient_accumulation_steps
        self.workers, self.mode = args.dataloader_num_workers, args.image_interpolation_mode
        self.pin = accelerator.device.type == "cuda"

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

        noise [B, C, h, w], noise_offset [B, C, 1, 1], timestep_draw [B] in [0, 1), time_ids [B, 6] float32;
        latents [B, C, h, w], or pixels [B, 3, H, W] in -1..1 with latent_draw [B, C, h, w];
        the fields of the prompt store [B, ...], or token ids.
        """
        rows, visits, bucket = self.samples(step, micro)
        width, height = self.table.buckets[bucket]
        shape = (self.latents.channels, height // 8, width // 8)
        each = [self._sample(int(row), int(visit), shape) for row, visit in zip(rows, visits, strict=True)]
        batch = {name: torch.stack([sample[name] for sample in each]) for name in each[0] if name != "prompt"}
        if self.prompts.store is None:
            batch |= self.prompts.tokenize([sample["prompt"] for sample in each])
        if self.pin:
            batch = {name: values.pin_memory() for name, values in batch.items()}
        return batch

    def prompt(self, row: int, visit: int) -> str:
        """The prompt shown at one visit of one image."""
        p = self.prompts
        return captions.pick(self.table.texts(row), self.seed, row, visit, p.most if p.store else None,
                             empty=p.empty, shuffle=p.shuffle, keep=p.keep)

    def _sample(self, row: int, visit: int, shape: tuple[int, int, int]) -> dict:
        def normal(purpose):
            draw = draws.generator(self.seed, row, visit, purpose)
            return draw, torch.from_numpy(draw.standard_normal(shape, dtype=np.float32))

        after_noise, noise = normal(draws.NOISE)
        _, latent_draw = normal(draws.LATENT)
        sample = {
            "noise": noise,
            "noise_offset": torch.from_numpy(after_noise.standard_normal((shape[0], 1, 1), dtype=np.float32)),
            "timestep_draw": torch.tensor(draws.generator(self.seed, row, visit, draws.TIMESTEP).random(dtype=np.float32)),
        }

        store = self.latents.store
        cuts = self.table.variants(row, self.latents.most if store else None)
        number = visit if cuts is None else visit % cuts
        sample["time_ids"] = torch.tensor(self.table.time_ids(row, number), dtype=torch.float32)
        if store:
            key = prepare.latent_key(self.table, row, number, self.latents.recipe)
            mean, std = store.read(key, "moments").float().chunk(2)
            sample["latents"] = (mean + std * latent_draw - self.latents.shift) * self.latents.scale
        else:
            pixels = prepare.load_pixels(self.source, self.table, row, number, self.mode)
            sample["pixels"] = torch.from_numpy(pixels).permute(2, 0, 1).float() / 127.5 - 1
            sample["latent_draw"] = latent_draw

        prompt = self.prompt(row, visit)
        if self.prompts.store:
            key = prepare.prompt_key(prompt, self.prompts.recipe)
            sample["prompt_embeds"] = self.prompts.store.read(key, "hidden")
            sample["pooled_prompt_embeds"] = self.prompts.store.read(key, "pooled")
        else:
            sample["prompt"] = prompt
        return sample

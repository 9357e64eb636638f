"""The pieces of a run, made from its arguments as the script makes them; and calls that are noted."""

from types import SimpleNamespace

import torch

from library.data import dataset, loader
from library.models import caching, sdxl
from library.models.encoders import Encoders

CPU = SimpleNamespace(device=torch.device("cpu"), mixed_precision="no", process_index=0, num_processes=1)


def make(args, folder, model=sdxl) -> SimpleNamespace:
    """Source, table, encoders, order and loader of a run; its caches lie in `folder`. model: sdxl or sd3."""
    encoders = Encoders(model, args, model.find_base(args), CPU)
    data = dataset.load(args, args.seed, folder / "scan", decode=False)
    data, order, steps, latents = caching.cache_images(
        args, encoders, data, args.seed, args.gradient_accumulation_steps, folder)
    prompts = caching.cache_captions(args, encoders, data, order, steps, folder)
    made = loader.Loader(data, order, latents, prompts, args, args.seed, CPU)
    return SimpleNamespace(encoders=encoders, data=data, table=data.table, notes=data.notes, order=order, steps=steps,
                           latents=latents, prompts=prompts, loader=made)


def note_calls(patch, owner, name: str) -> list:
    """(positional, keyword) arguments of every call of `owner.name` from here on; the calls go through."""
    calls, original = [], getattr(owner, name)

    def through(*given, **named):
        calls.append((given, named))
        return original(*given, **named)

    patch.setattr(owner, name, through)
    return calls

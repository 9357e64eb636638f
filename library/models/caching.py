"""The caches of a run: what is missing is encoded before the first step."""

from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np

from library.data import captions, prepare
from library.data.cache import Store
from library.data.dataset import Data
from library.data.loader import LatentSource, Loader, PromptSource
from library.data.ondemand import OnDemand
from library.data.sampler import Sampler
from library.data.scan import name_faults
from library.diffusion.latents import latent_scale
from library.models.encoders import Encoders
from library.training import agreement, processes
from library.training.accelerator import say
from library.training.plan import total_steps


def cache_images(args, encoders: Encoders, data: Data, seed: int, batches_a_step: int,
                 folder: Path) -> tuple[Data, Sampler, int, LatentSource]:
    """Encode every cut the run will visit -> (data, order of samples, optimizer steps, where latents come from).

    batches_a_step: accumulation x processes. Images that cannot be decoded are all named; with --skip_bad_images the data
    come back without them.
    """
    shift, scale = latent_scale(encoders.model.vae_config(encoders.base))
    recipe = encoders.latent_recipe(folder / "weights.json", args.image_interpolation_mode)
    agreement.check("their VAE", {"the digest of its files and settings": recipe}, "Copy the same model to all machines")
    stores = _open_stores(data, folder / "latents")
    while True:
        table = data.table
        order = Sampler(table.bucket_of, seed, np.array(table.batch_sizes) * batches_a_step, table.set_of,
                        [spec.rate for spec in table.sets])
        steps = total_steps(order, args.num_train_epochs, args.max_train_steps)
        visits = order.visits(steps, len(table.sets))
        most = [_most(spec, args.cache_variants, seen) for spec, seen in zip(table.sets, visits, strict=True)]
        if not (faults := _encode(args, encoders, data, stores, recipe, most)):
            return data, order, steps, LatentSource(stores, recipe, most, len(shift), shift, scale, encoders.encode_images)
        _name_all(faults, data, args.skip_bad_images)
        data = data.without(faults)


def cache_evaluation(args, encoders: Encoders, data: Data, prompts: PromptSource, accelerator, folder: Path) -> Loader:
    """Encode the images kept out of training -> batches of them. Their prompts are in `cache_captions`."""
    shift, scale = latent_scale(encoders.model.vae_config(encoders.base))
    recipe = encoders.latent_recipe(folder / "weights.json", args.image_interpolation_mode)
    stores, most = _open_stores(data, folder / "latents"), [1] * len(data.table.sets)
    while faults := _encode(args, encoders, data, stores, recipe, most):
        _name_all(faults, data, args.skip_bad_images)
        data = data.without(faults)
    latents = LatentSource(stores, recipe, most, len(shift), shift, scale, encoders.encode_images)
    told = replace(prompts, most=most, warmup=[0.0] * len(most), dropout=(0.0,) * len(prompts.dropout))
    return Loader(data, None, latents, told, args, 0, accelerator)


def _encode(args, encoders: Encoders, data: Data, stores: list, recipe: str, most: list) -> dict[int, str]:
    """Fill the stores that are filled before the run -> {row: why it cannot be decoded}."""
    table, faults = data.table, {}
    for store in {id(store): store for store in stores if isinstance(store, Store)}.values():
        sets = [number for number, each in enumerate(stores) if each is store]
        rows = np.flatnonzero(np.isin(table.set_of, sets))
        faults |= prepare.cache_latents(data, rows, store, recipe, most, args.vae_batch_size, args.image_interpolation_mode,
                                        lambda: encoders.encode_images)[0]
        if with_masks := [number for number in sets if table.sets[number].mask]:
            good = rows[np.isin(table.set_of[rows], with_masks) & ~np.isin(rows, list(faults))]
            faults |= prepare.cache_masks(data, good, store, most)
    return faults


def _most(spec, variants: int, visits: int) -> int | None:
    """Different cuts that are made of an image."""
    return None if spec.latents == "off" or spec.every_cut_new else min(variants, visits)


def _open_stores(data: Data, folder: Path) -> list[Store | OnDemand | None]:
    """The store of each data set; sets that name no folder share the run's."""
    opened: dict[tuple[Path, str], Store | OnDemand] = {}
    for spec in data.table.sets:
        place = spec.latent_dir or folder
        if spec.latents != "off" and (place, spec.latents) not in opened:
            store = _open(place)
            opened[place, spec.latents] = OnDemand(store) if spec.latents == "ondemand" else store
    return [opened.get((spec.latent_dir or folder, spec.latents)) for spec in data.table.sets]


def _name_all(faults: dict[int, str], data: Data, skip: bool) -> None:
    for number, source in enumerate(data.sources):
        bad = {int(data.table.source_row[row]): fault for row, fault in faults.items() if data.table.set_of[row] == number}
        say(name_faults(bad, source, skip))


def cache_captions(args, encoders: Encoders, data: Data, order: Sampler, steps: int, folder: Path) -> PromptSource:
    """Encode every prompt the run can show, validation's included -> where prompts come from.

    Text encoders that are trained are asked anew in every step, and all of them are where prompts grow tag by tag.
    """
    table = data.table
    most = [min(args.cache_variants, seen) for seen in order.visits(steps, len(table.sets))]
    prompts = prepare.all_prompts(table, most)
    if data.held_out:
        prompts += prepare.all_prompts(data.held_out.table, [1] * len(data.held_out.table.sets))
    prompts += [*args.validation_prompt, args.validation_negative_prompt or ""]
    warmup = [spec.text.warmup_steps * (steps if spec.text.warmup_steps < 1 else 1) for spec in table.sets]
    store, recipe, tokenize, mode = None, "", encoders.tokenize, data.described.prompts
    if not args.cache_text_encoder_outputs or not encoders.kept or any(captions.endless(spec.text) for spec in table.sets):
        mode = "off"
    if mode == "off":
        encoders.note_long(prompts)
        most = [None] * len(table.sets)
    else:
        store = _open(data.described.prompt_dir or folder / "prompts")
        tokenize = partial(encoders.tokenize, parts=encoders.trained) if encoders.trained else None
        recipe = encoders.prompt_recipe(folder / "weights.json")
        agreement.check("their text encoders", {"the digest of their files and settings": recipe},
                        "Copy the same model to all machines")
    if mode == "disk":
        batch_size = data.described.prompt_batch_size or args.text_encoder_batch_size
        prepare.cache_prompts(prompts, store, recipe, batch_size, lambda: encoders.encode_kept)
    elif mode == "ondemand":
        store = OnDemand(store)
    for limit, cut in encoders.truncated.items():
        if cut:
            say(f"{len(cut)} captions are longer than {limit} and are cut, such as {max(cut, key=len)[:80]!r}")
    return PromptSource(store, recipe, most, tokenize, warmup, encoders.encode_kept, encoders.kept, encoders.assemble,
                        tuple(rate for rate, _ in encoders.dropout))


def _open(folder: Path) -> Store:
    store = Store(folder)
    for shard in processes.gather(store.damaged if store.leads else []):
        say(f"the cache's {shard}; it is thrown away and made again")
    return store

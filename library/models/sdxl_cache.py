"""The caches of an SDXL run: what is missing is encoded before the first step."""

from pathlib import Path

import numpy as np

from library.data import prepare
from library.data.cache import Store
from library.data.loader import LatentSource, PromptSource
from library.data.sampler import Sampler
from library.data.scan import name_faults
from library.data.table import Table
from library.diffusion.latents import latent_scale
from library.models import sdxl
from library.models.sdxl_encoders import Encoders
from library.training.accelerator import say
from library.training.plan import total_steps


def cache_images(args, encoders: Encoders, source, table: Table, seed: int, global_batch: int,
                 folder: Path) -> tuple[Table, Sampler, int, LatentSource]:
    """Encode every cut the run will visit -> (table, order of samples, optimizer steps, where latents come from).

    Images that cannot be decoded are all named; with --skip_bad_images the table comes back without them.
    """
    shift, scale = latent_scale(sdxl.vae_config(encoders.base))
    recipe = encoders.latent_recipe(folder / "weights.json", args.image_interpolation_mode)
    store = _open(folder / "latents") if args.cache_latents else None
    while True:
        order = Sampler(table.bucket_of, seed, global_batch)
        steps = total_steps(order, args.num_train_epochs, args.max_train_steps)
        most = min(args.cache_variants, order.last_visit(steps) + 1)
        faults = {}
        if store:
            faults, _ = prepare.cache_latents(table, source, store, recipe, most, args.vae_batch_size,
                                           args.image_interpolation_mode, lambda: encoders.encode_images)
        if not faults:
            return table, order, steps, LatentSource(store, recipe, most, len(shift), shift, scale)
        bad = {int(table.source_row[row]): fault for row, fault in faults.items()}
        say(name_faults(bad, source, args.skip_bad_images))
        table = table.select(np.array([row for row in range(len(table)) if row not in faults], np.int64))


def cache_captions(args, encoders: Encoders, table: Table, visits: int, folder: Path) -> PromptSource:
    """Encode every prompt the run can show, validation's included -> where prompts come from.

    Text encoders that are trained are asked anew in every step.
    """
    most = min(args.cache_variants, visits)
    prompts = prepare.all_prompts(table, most, args.shuffle_caption, args.keep_tokens)
    prompts += [*args.validation_prompt, args.validation_negative_prompt or ""]
    store, recipe, tokenize = None, "", encoders.tokenize
    if args.cache_text_encoder_outputs and not args.train_text_encoder:
        store, tokenize = _open(folder / "prompts"), None
        recipe = encoders.prompt_recipe(folder / "weights.json")
        prepare.cache_prompts(prompts, store, recipe, args.text_encoder_batch_size, lambda: encoders.encode_prompts)
    else:
        encoders.note_long(prompts)
    if encoders.truncated:
        longest = max(encoders.truncated, key=len)
        say(f"{len(encoders.truncated)} captions are longer than --max_token_length {args.max_token_length} and are cut, "
            f"such as {longest[:80]!r}")
    return PromptSource(store, recipe, most, tokenize, args.proportion_empty_prompts, args.shuffle_caption, args.keep_tokens)


def _open(folder: Path) -> Store:
    store = Store(folder)
    for shard in store.damaged:
        say(f"the cache's {shard}; it is thrown away and made again")
    return store

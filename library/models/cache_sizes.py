"""What the caches of a run will take on disk, told before anything is encoded."""

import os
from types import ModuleType

import numpy as np

from library.data import captions, prepare
from library.data.dataset import Data
from library.models import parts


def on_disk(model: ModuleType, args, data: Data, channels: int, visits: list[int],
            tokenizers: list | None) -> list[tuple[str, int, int]]:
    """(what, how many, bytes) of what a run keeps on disk. model: the module `sdxl` or `sd3`, channels: of its latents.

    visits: how often it shows an image of each set. tokenizers: of the model, None where it is not there.
    """
    table, kept = data.table, [min(args.cache_variants, seen) for seen in visits]
    spare = (table.resized != np.array(table.buckets)[table.bucket_of]).any(axis=1)
    kinds = (table.set_of.astype(np.int64) << 33) | (table.bucket_of.astype(np.int64) << 1) | spare
    _, first, times = np.unique(kinds, return_index=True, return_counts=True)    # images of one kind take the same
    lines = {"latents": [0, 0], "masks": [0, 0]}
    for row, images in zip(first.tolist(), times.tolist(), strict=True):
        spec, (width, height) = table.spec(row), table.buckets[table.bucket_of[row]]
        if spec.latents != "off":
            most = visits[table.set_of[row]] if spec.every_cut_new else kept[table.set_of[row]]
            cuts, pixels = images * table.variants(row, most), width // 8 * (height // 8)
            masks = 4 if spec.mask and spec.latents == "disk" else 0
            for name, size in (("latents", 2 * channels * 4), ("masks", masks)):    # float32: mean and spread
                lines[name][0] += cuts * bool(size)
                lines[name][1] += cuts * pixels * size
    sizes = [(name, many, total) for name, (many, total) in lines.items() if many]
    if args.cache_text_encoder_outputs and not any(captions.endless(s.text) for s in table.sets):
        prompts = {*prepare.all_prompts(table, kept), *args.validation_prompt, args.validation_negative_prompt or ""}
        precision = args.mixed_precision or os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
        if size := numbers_of_prompts(model, args, prompts, tokenizers) * (4 if precision == "no" else 2):
            sizes.append(("prompts", len(prompts), size))
    return sizes


def numbers_of_prompts(model: ModuleType, args, prompts: set[str], tokenizers: list | None) -> int:
    """How many numbers the cache holds of these prompts: what trained text encoders make is not kept.

    Without tokenizers, T5's part is as large as it can be.
    """
    rows = parts.clip_limit(args.max_token_length) + 2
    each = {"hidden": rows * (768 + 1280), "pooled": 1280, "clip_l": rows * 768, "pooled_l": 768, "clip_g": rows * 1280,
            "pooled_g": 1280}
    trained = model.trained_parts(args)
    kept = [name for name, made_by in model.FIELDS.items() if not set(made_by) & set(trained)]
    total = len(prompts) * sum(each[name] for name in kept if name in each)
    if "t5" not in kept or args.no_t5:
        return total
    lengths = [args.tokenizer_max_length] * len(prompts)
    if args.t5_padding == "zero" and tokenizers:    # a token more ends each of them
        lengths = [min(len(ids) + 1, args.tokenizer_max_length) for ids in parts.token_ids(sorted(prompts), tokenizers[2])]
    return total + 4096 * sum(lengths)

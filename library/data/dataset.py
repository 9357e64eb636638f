"""The data set that the flags name -> source and table, checked image by image."""

from pathlib import Path

import numpy as np

from library.data import draws
from library.data.scan import name_faults, scan
from library.data.sources import DataSet, Folder
from library.data.table import Table, build, flatten


def load(args, seed: int, index_dir: Path, decode: bool) -> tuple[object, Table, list[str]]:
    """(source, table, notes for the user). Raises `UserError` naming every image that cannot be read.

    index_dir: where sizes and hashes are remembered. decode: look at the pixels, too (when nothing else will).
    """
    if args.train_data_dir:
        source = Folder(args.train_data_dir, args.caption_column, args.caption_extension, args.skip_bad_images)
    else:
        source = DataSet(args.dataset_name, args.dataset_config_name, args.image_column, args.caption_column, args.cache_dir)
    records, faults = scan(source, index_dir, decode)
    notes = [*source.notes, name_faults(faults, source, args.skip_bad_images)]
    captions, start = flatten(source.captions)
    table = build(
        records, source.names, captions, start, resolution=args.resolution, center_crop=args.center_crop,
        bucket=(args.min_bucket_reso, args.max_bucket_reso, args.bucket_reso_steps) if args.enable_bucket else None,
        no_upscale=args.bucket_no_upscale, random_crop=args.random_crop, random_flip=args.random_flip)
    keep = np.array([row for row in range(len(table)) if row not in faults], np.int64)
    if args.max_train_samples and args.max_train_samples < len(keep):
        chosen = draws.generator(seed, 0, 0, draws.SUBSET).permutation(len(keep))[:args.max_train_samples]
        keep = keep[np.sort(chosen)]
    if len(keep) < len(table):
        table = table.select(keep)
    return source, table, [note for note in notes if note]


def describe(table: Table) -> str:
    """One line: how many images in how many buckets, and how much of them is cut off."""
    shown = np.array(table.buckets)[table.bucket_of].prod(axis=1) / table.resized.prod(axis=1)
    small = int((table.resized > table.size).any(axis=1).sum())
    filled = len(np.unique(table.bucket_of))
    line = f"{len(table)} images in {filled} bucket{'s' if filled > 1 else ''}; "
    line += f"cropping removes {1 - shown.mean():.1%} of their area"
    return line + (f"; {small} are enlarged to fit" if small else "")

"""The data sets that the flags name -> sources and one table, checked image by image."""

import hashlib
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from library.data import draws
from library.data.formats import dreambooth, kohya, simpletuner
from library.data.scan import name_faults, scan
from library.data.sources import opening
from library.data.specs import Described, Origin, Spec
from library.data.table import Table, build, join, subset
from library.errors import UserError
from library.training import agreement

_MASK_TOLERANCE = 0.02    # of the aspect ratio: a mask is made from its image, or it belongs to another one


@dataclass(frozen=True)
class Dropped:
    """An image that is found and not trained on."""

    set_id: str
    name: str
    reason: str


@dataclass
class Data:
    """All data sets of a run. sources, masks (or None): one a set, in the order of `table.sets`."""

    sources: list
    masks: list
    table: Table
    notes: list[str] = field(default_factory=list)
    dropped: list[Dropped] = field(default_factory=list)
    described: Described = field(default_factory=lambda: Described([]))    # what it says of all sets together
    held_out: "Data | None" = None    # evaluation sets: kept out of training

    def read(self, row: int) -> bytes:
        """The file of an image. Raises OSError."""
        return self.sources[self.table.set_of[row]].read(int(self.table.source_row[row]))

    def read_mask(self, row: int) -> bytes:
        """The file of an image's mask. Raises OSError."""
        return self.masks[self.table.set_of[row]].read(int(self.table.source_row[row]))

    def without(self, reasons: dict[int, str]) -> "Data":
        """The same data but for these rows of the table."""
        dropped = [Dropped(self.table.spec(row).id, str(self.table.name[row]), why) for row, why in sorted(reasons.items())]
        keep = np.array([row for row in range(len(self.table)) if row not in reasons], np.int64)
        return replace(self, table=self.table.select(keep), dropped=self.dropped + dropped)


def describe(args) -> Described:
    """The data sets that the flags name, in whatever format. Raises `UserError` for what a description gets wrong."""
    if getattr(args, "instance_prompt", None):    # of scripts that have DreamBooth's flags
        return dreambooth.read(args)
    if args.data_backend_config:
        return simpletuner.read(args)
    if args.dataset_config:
        return kohya.read_config(args)
    if args.in_json:
        return kohya.read_metadata(args)
    if args.dataset_name:
        origin = Origin("dataset", args.dataset_name, captions="column", caption_column=args.caption_column,
                        image_column=args.image_column, config=args.dataset_config_name, downloads=args.cache_dir,
                        streaming=args.streaming, flag="--dataset_name")
        return Described([kohya.plain(args, args.dataset_name, origin)])
    if args.reg_data_dir or kohya.is_dreambooth(args.train_data_dir):
        return kohya.read_folders(args)
    return Described([kohya.plain(args, args.train_data_dir, kohya.folder_origin(args, args.train_data_dir, "--train_data_dir"))])


def load(args, seed: int, index_dir: Path, decode: bool) -> Data:
    """Everything that the flags name, scanned. Raises `UserError` naming every image that cannot be read.

    index_dir: where sizes and hashes are remembered. decode: look at the pixels of every set, too; without it only at
    those of sets whose latents nothing else makes before the run.
    """
    described = describe(args)
    loaded, faults = [], []
    for spec in described.specs:
        try:
            loaded.append(_load_set(spec, args, index_dir, decode or spec.latents != "disk"))
        except UserError as fault:    # all of them at once
            agreement.check_fault(fault)
            faults.append(str(fault))
    if faults:
        raise UserError("\n".join(faults))
    data, held_out = (_join([part for part in loaded if part.table.sets[0].evaluation is kind]) for kind in (False, True))
    if data is None:
        raise UserError("all data sets are kept out of training (dataset_type eval): name images to train on, too")
    data.notes, data.described, data.held_out = described.notes + data.notes, described, held_out
    if held_out:
        # looked at before the run: there is nothing to put off
        held_out.table.sets = [replace(
            spec, flip=False, colour=False, latents="off" if spec.latents == "off" else "disk",
            text=replace(spec.text, empty=0.0, empty_every=0, warmup_steps=0)) for spec in held_out.table.sets]
        data.notes += [*held_out.notes, f"{len(held_out.table)} images are kept out of training, for evaluation"]
    if args.max_train_samples and args.max_train_samples < len(data.table):
        chosen = draws.generator(seed, 0, 0, draws.SUBSET).permutation(len(data.table))[:args.max_train_samples]
        data.table = data.table.select(np.sort(chosen))
    if args.masked_loss and not data.table.masked:
        raise UserError("--masked_loss: no data set has masks; name them by --conditioning_data_dir, or use --alpha_mask")
    data.table.sets = _balance(data.table)
    agreement.check_table(data.table)
    return data


def _load_set(spec: Spec, args, index_dir: Path, decode: bool) -> Data:
    source = _open(spec, args.skip_bad_images, index_dir, decode)
    records, faults = scan(source, index_dir, decode, only_known=spec.only_known)
    notes = [*source.notes, name_faults(faults, source, args.skip_bad_images)]
    masks, mask_content = None, None
    if spec.mask == "alpha":
        masks, mask_content = source, records["content"].copy()
    elif spec.mask:
        masks = opening.open_masks(spec.mask, source.names, args.skip_bad_images)
        mask_content, mask_faults = _scan_masks(masks, records, faults, index_dir)
        notes += [*masks.notes, name_faults(mask_faults, masks, args.skip_bad_images, "are no masks of their images")]
        faults = faults | mask_faults
    table, left_out = build(spec, records, source.names, source.texts, source.text_start, args.train_batch_size, mask_content)
    dropped = [Dropped(spec.id, name, reason) for name, reason in source.left_out]
    left_out = {row: why for row, why in left_out.items() if row not in faults}
    if left_out:
        notes.append(f"{spec.id}: {len(left_out)} of {len(table)} images are left out: {_tally(left_out)}")
    reasons = left_out | faults
    keep = np.array([row for row in range(len(table)) if row not in reasons], np.int64)
    if spec.max_samples and spec.max_samples < len(keep):
        key = int.from_bytes(hashlib.blake2b(spec.id.encode(), digest_size=8).digest(), "little")
        keep = keep[subset(len(keep), spec.max_samples, key)]
        notes.append(f"{spec.id}: {spec.max_samples} images are taken, chosen by its id")
    if spec.held_out:
        aside = subset(len(keep), round(spec.held_out[0] * len(keep)), spec.held_out[1])
        keep = keep[aside] if spec.evaluation else np.delete(keep, aside)
    dropped += [Dropped(spec.id, str(table.name[row]), why) for row, why in sorted(reasons.items())]
    if not len(keep):
        raise UserError(f"there is no image to train on in {source.place}" + (f": {_tally(reasons)}" if reasons else ""))
    return Data([source], [masks], table.select(keep) if len(keep) < len(table) else table, notes, dropped)


def _open(spec: Spec, skip_bad: bool, index_dir: Path, decode: bool):
    """The source of a set. What cannot be a row is named together with what cannot be read. Raises `UserError`."""
    try:
        return opening.open_source(spec, index_dir, skip_bad)
    except UserError as fault:
        if skip_bad:
            raise
        agreement.check_fault(fault)
        try:
            source = opening.open_source(spec, index_dir, True)
            name_faults(scan(source, index_dir, decode)[1], source, skip=False)
        except UserError as other:
            if str(other) != str(fault):
                raise UserError(f"{fault}\n{other}") from None
        raise


def _join(parts: list[Data]) -> Data | None:
    if not parts:
        return None
    return Data([part.sources[0] for part in parts], [part.masks[0] for part in parts], join([part.table for part in parts]),
                [note for part in parts for note in part.notes if note], [each for part in parts for each in part.dropped])


def _scan_masks(masks, records: np.ndarray, faults: dict[int, str], index_dir: Path) -> tuple[np.ndarray, dict[int, str]]:
    """Hashes of the masks [N] S32, and why a row's mask is none: unreadable, or of another shape than the image."""
    found, mask_faults = scan(masks, index_dir, False)
    ratios = [each["width"] / np.maximum(each["height"], 1) for each in (records, found)]
    for row in np.flatnonzero(np.abs(ratios[0] / ratios[1] - 1) > _MASK_TOLERANCE).tolist():
        if row not in mask_faults and row not in faults:
            sizes = [f"{int(each['width'][row])}x{int(each['height'][row])}" for each in (records, found)]
            mask_faults[row] = f"the image is {sizes[0]} and the mask {sizes[1]}: not of one shape"
    return found["content"].copy(), mask_faults


def _balance(table: Table) -> list[Spec]:
    """The sets with the rate of those that are to be seen, all together, as often as everything else."""
    counts = np.bincount(table.set_of, minlength=len(table.sets))
    others = sum(n * spec.rate for n, spec in zip(counts.tolist(), table.sets, strict=True) if not spec.match)
    matched = sum(n * spec.rate for n, spec in zip(counts.tolist(), table.sets, strict=True) if spec.match)
    if matched and not others:
        raise UserError("all data sets are regularisation images: name images to train on, too")
    return [replace(spec, rate=spec.rate * others / matched) if spec.match else spec for spec in table.sets]


def _tally(reasons: dict[int, str]) -> str:
    """'3 a; 1 b', the most frequent reason first."""
    counts: dict[str, int] = {}
    for why in reasons.values():
        counts[why] = counts.get(why, 0) + 1
    return "; ".join(f"{n} {why}" for why, n in sorted(counts.items(), key=lambda item: -item[1])[:5])


def describe_table(table: Table, batches_a_step: int) -> str:
    """One line: how many images in how many buckets, how much of them is cut off, and how many a step takes.

    Buckets of fewer images than a step takes are told of: their steps show some more than once.
    """
    shown = np.array(table.buckets)[table.bucket_of].prod(axis=1) / table.resized.prod(axis=1)
    small = int((table.resized > table.size).any(axis=1).sum())
    counts, sets = [each["images"] for each in table.bucket_counts()], len(table.sets)
    filled, few = len(counts), sum(count < min(table.batch_sizes) * batches_a_step for count in counts)
    line = f"{len(table)} images in {filled} bucket{'s' if filled > 1 else ''}"
    line += f" of {sets} data sets; " if sets > 1 else "; "
    line += f"cropping removes {1 - shown.mean():.1%} of their area"
    line += f"; {small} are enlarged to fit" if small else ""
    line += f"; {few} bucket{'s' if few > 1 else ''} with fewer images than a step takes: some come more than once" if few else ""
    return line + f"; {' or '.join(str(size * batches_a_step) for size in sorted(set(table.batch_sizes)))} a step"

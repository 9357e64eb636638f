"""The data as a table: one row an image, in columns. What is reported, cached, sampled and resumed.

A million rows take tens of megabytes and sort in seconds; pixels are never touched here.
"""

from dataclasses import dataclass, fields, replace
from typing import NamedTuple

import numpy as np

from library.data import aspect, colour, geometry
from library.data.draws import AUGMENT, SUBSET, generator
from library.data.specs import Buckets, Fixed, Spec
from library.errors import UserError

Text = np.dtypes.StringDType()


class Cut(NamedTuple):
    """What one visit sees of an image: a crop of the resized one, taken after flipping."""

    left: int
    top: int
    flip: bool
    colour: tuple[str, float] | None = None    # of library.data.colour


@dataclass
class Table:
    """Columns of N rows. Sizes are (width, height) in pixels.

    source_row: row in the source of its set. name: what messages call it. content: hash of the file's bytes.
    size: original size, as shown. resized: size after resizing. bucket_of: index into `buckets`.
    captions: all texts, flat; row i has those from caption_start[i] to caption_start[i + 1].
    set_of: index into `sets`. mask: row in the set's masks, or -1. mask_content: hash of the mask's file.
    batch_sizes: samples that a device takes at once of each bucket.
    """

    source_row: np.ndarray       # [N] int32
    name: np.ndarray             # [N] str
    content: np.ndarray          # [N] S32
    size: np.ndarray             # [N, 2] int32
    resized: np.ndarray          # [N, 2] int32
    bucket_of: np.ndarray        # [N] int32
    captions: np.ndarray         # [>= N] str
    caption_start: np.ndarray    # [N + 1] int64
    set_of: np.ndarray           # [N] int16
    mask_content: np.ndarray     # [N] S32, or [0] where no set has masks
    buckets: list[tuple[int, int]]
    batch_sizes: list[int]
    sets: list[Spec]

    def __len__(self) -> int:
        return len(self.source_row)

    def texts(self, row: int) -> list[str]:
        return list(self.captions[self.caption_start[row]:self.caption_start[row + 1]])

    def spec(self, row: int) -> Spec:
        return self.sets[self.set_of[row]]

    @property
    def masked(self) -> bool:
        return any(spec.mask for spec in self.sets)

    def select(self, rows: np.ndarray) -> "Table":
        """The table of these rows alone, in this order."""
        captions, start = take_texts(self.captions, self.caption_start, rows)
        columns = {each.name: getattr(self, each.name)[rows] for each in fields(self)
                   if each.name in _COLUMNS or (each.name == "mask_content" and len(self.mask_content))}
        return replace(self, **columns, captions=captions, caption_start=start)

    def variants(self, row: int, most: int | None) -> int | None:
        """How many different cuts of this image there are when at most `most` are kept; None: no end of them."""
        spec = self.spec(row)
        spare = (self.resized[row] != self.buckets[self.bucket_of[row]]).any()
        if spec.colour or (spec.size_style == "random" and spare):
            return most
        return (2 if most is None else min(most, 2)) if spec.flip else 1

    def cut(self, row: int, number: int) -> Cut:
        """The `number`-th cut of an image.

        It depends on the file's content and the number alone, so that its latents can be cached whatever the seed.
        """
        spec, content = self.spec(row), int(self.content[row][:16], 16)
        trim_w, trim_h = (self.resized[row] - self.buckets[self.bucket_of[row]]).tolist()
        flip = spec.flip and (number + content) % 2 == 1    # turn about; half of the images start mirrored
        across, down = generator(content, 0, number, AUGMENT).random(2) if spec.size_style == "random" else (0, 0)
        left, top = geometry.place(spec.size_style, trim_w, across), geometry.place(spec.size_style, trim_h, down)
        return Cut(left, top, flip, colour.draw(content, number) if spec.colour else None)

    def time_ids(self, row: int, number: int) -> tuple[int, int, int, int, int, int]:
        """SDXL's size conditioning: (original h, w, crop top, left, target h, w) of the cut that is made."""
        left, top, *_ = self.cut(row, number)
        (width, height), (target_w, target_h) = self.size[row].tolist(), self.buckets[self.bucket_of[row]]
        return height, width, top, left, target_h, target_w

    def bucket_counts(self) -> list[dict]:
        """Images a bucket: [{"width", "height", "images"}], for reports. Empty buckets are left out."""
        counts: dict[tuple[int, int], int] = {}
        for bucket, n in zip(self.buckets, np.bincount(self.bucket_of, minlength=len(self.buckets)).tolist(), strict=True):
            counts[bucket] = counts.get(bucket, 0) + n
        return [{"width": w, "height": h, "images": n} for (w, h), n in sorted(counts.items()) if n]


_COLUMNS = {"source_row", "name", "content", "size", "resized", "bucket_of", "set_of"}


def flatten(texts: list[list[str]]) -> tuple[np.ndarray, np.ndarray]:
    """Lists of captions -> (all captions, where each list starts)."""
    start = np.zeros(len(texts) + 1, np.int64)
    np.cumsum([len(several) for several in texts], out=start[1:])
    return np.array([text for several in texts for text in several], Text), start


def take_texts(texts: np.ndarray, start: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The lists of captions of these rows alone, flat again."""
    counts = (start[1:] - start[:-1])[rows]
    kept = np.zeros(len(rows) + 1, np.int64)
    np.cumsum(counts, out=kept[1:])
    return texts[np.arange(kept[-1]) + np.repeat(start[:-1][rows] - kept[:-1], counts)], kept


def build(spec: Spec, records: np.ndarray, names: np.ndarray, captions: np.ndarray, caption_start: np.ndarray,
          batch_size: int = 1, masks: np.ndarray | None = None) -> tuple[Table, dict[int, str]]:
    """Choose bucket and resize of every scanned image -> (table, {row: why the data set's sizes leave it out}).

    records: of `scan`. batch_size: of sets that name none. masks: hashes of the masks' files [N] S32, where there are any.
    Raises `UserError` for bounds that contradict each other.
    """
    width, height = records["width"].astype(np.int64), records["height"].astype(np.int64)
    left_out: dict[int, str] = {}
    if isinstance(spec.size, Fixed):
        targets = [np.full(len(records), side, np.int32) for side in spec.size.size]
        resized = geometry.fixed(width, height, spec.size.size)
    elif isinstance(spec.size, Buckets) and spec.size.no_upscale:
        area = spec.size.resolution[0] * spec.size.resolution[1]
        *targets, resized_w, resized_h = geometry.without_upscaling(width, height, area, spec.size.step)
        resized = resized_w, resized_h
    elif isinstance(spec.size, Buckets):
        try:
            buckets = np.array(geometry.make_buckets(spec.size.resolution, spec.size.shortest, spec.size.longest, spec.size.step))
        except ValueError as error:
            raise UserError(str(error)) from None
        targets = buckets[geometry.choose_buckets(width, height, buckets)].T
        resized = geometry.cover(width, height, *targets)
    else:
        *sizes, reasons = aspect.fit(spec.size, width, height, records["content"])
        targets, resized = sizes[:2], sizes[2:]
        left_out = {int(row): aspect.REASONS[reasons[row]] for row in np.flatnonzero(reasons)}
    packed = np.asarray(targets[0], np.int64) << 32 | targets[1]    # one number each: lean
    sides, bucket_of = np.unique(packed, return_inverse=True)
    table = Table(
        source_row=np.arange(len(records), dtype=np.int32), name=names,
        content=records["content"].copy(),    # a view would keep all of `records`: 65 MB a million images
        size=np.stack([width, height], 1).astype(np.int32), resized=np.stack(resized, 1).astype(np.int32),
        bucket_of=bucket_of.reshape(-1).astype(np.int32), buckets=[(side >> 32, side & 2**32 - 1) for side in sides.tolist()],
        captions=captions, caption_start=caption_start, set_of=np.zeros(len(records), np.int16),
        mask_content=np.zeros(0, "S32") if masks is None else masks, batch_sizes=[spec.batch_size or batch_size] * len(sides),
        sets=[spec])
    return table, left_out


def join(tables: list[Table]) -> Table:
    """The sets of a run as one table. Buckets of one shape and batch size are one bucket, whatever set its images are of."""
    kinds = sorted({kind for table in tables for kind in zip(table.buckets, table.batch_sizes, strict=True)})
    place = {kind: number for number, kind in enumerate(kinds)}
    bucket_of, set_of, start, masks = [], [], [np.zeros(1, np.int64)], []
    with_masks = any(len(table.mask_content) for table in tables)
    for number, table in enumerate(tables):
        here = np.array([place[kind] for kind in zip(table.buckets, table.batch_sizes, strict=True)], np.int32)
        bucket_of.append(here[table.bucket_of])
        set_of.append(np.full(len(table), number, np.int16))
        start.append(table.caption_start[1:] + start[-1][-1])
        masks.append(table.mask_content if len(table.mask_content) else np.zeros(len(table) if with_masks else 0, "S32"))
    columns = {name: np.concatenate([getattr(table, name) for table in tables])
               for name in ("source_row", "name", "content", "size", "resized", "captions")}
    return Table(**columns, bucket_of=np.concatenate(bucket_of), caption_start=np.concatenate(start),
                 set_of=np.concatenate(set_of), mask_content=np.concatenate(masks), buckets=[bucket for bucket, _ in kinds],
                 batch_sizes=[size for _, size in kinds], sets=[spec for table in tables for spec in table.sets])


def subset(count: int, chosen: int, key: int) -> np.ndarray:
    """`chosen` of `count` rows, at random by `key`, in their order."""
    return np.sort(generator(key, 0, 0, SUBSET).permutation(count)[:chosen])

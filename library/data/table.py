"""The data as a table: one row an image, in columns. What is reported, cached, sampled and resumed.

A million rows take tens of megabytes and sort in seconds; pixels are never touched here.
"""

from dataclasses import dataclass

import numpy as np

from library.data import geometry
from library.data.draws import AUGMENT, generator
from library.errors import UserError

Text = np.dtypes.StringDType()


@dataclass
class Table:
    """Columns of N rows. Sizes are (width, height) in pixels.

    source_row: row in the source. name: what messages call it. content: hash of the file's bytes.
    size: original size, as shown. resized: size after resizing. bucket_of: index into `buckets`.
    captions: all texts, flat; row i has those from caption_start[i] to caption_start[i + 1].
    """

    source_row: np.ndarray       # [N] int32
    name: np.ndarray             # [N] str
    content: np.ndarray          # [N] S32
    size: np.ndarray             # [N, 2] int32
    resized: np.ndarray          # [N, 2] int32
    bucket_of: np.ndarray        # [N] int32
    buckets: list[tuple[int, int]]
    captions: np.ndarray         # [>= N] str
    caption_start: np.ndarray    # [N + 1] int64
    random_crop: bool = False
    random_flip: bool = False
    half_even: bool = False      # how the middle is rounded: diffusers' fixed size, or kohya's buckets

    def __len__(self) -> int:
        return len(self.source_row)

    def texts(self, row: int) -> list[str]:
        return list(self.captions[self.caption_start[row]:self.caption_start[row + 1]])

    def select(self, rows: np.ndarray) -> "Table":
        """The table of these rows alone, in this order."""
        texts = [self.texts(row) for row in rows]
        flat, start = flatten(texts)
        columns = {name: getattr(self, name)[rows] for name in ("source_row", "name", "content", "size", "resized", "bucket_of")}
        return Table(**columns, captions=flat, caption_start=start, buckets=self.buckets, random_crop=self.random_crop,
                     random_flip=self.random_flip, half_even=self.half_even)

    def variants(self, row: int, most: int | None) -> int | None:
        """How many different cuts of this image there are when at most `most` are kept; None: no end of them."""
        spare = (self.resized[row] != self.buckets[self.bucket_of[row]]).any()
        if self.random_crop and spare:
            return most
        return (2 if most is None else min(most, 2)) if self.random_flip else 1

    def cut(self, row: int, number: int) -> tuple[int, int, bool]:
        """(left, top, flip) of the `number`-th cut of an image: the crop is taken after flipping.

        It depends on the file's content and the number alone, so that its latents can be cached whatever the seed.
        """
        trim_w, trim_h = (self.resized[row] - self.buckets[self.bucket_of[row]]).tolist()
        content = int(self.content[row][:16], 16)
        flip = self.random_flip and (number + content) % 2 == 1    # turn about; half of the images start mirrored
        if not self.random_crop:
            return geometry.middle(trim_w, self.half_even), geometry.middle(trim_h, self.half_even), flip
        across, down = generator(content, 0, number, AUGMENT).random(2)
        return int(across * (trim_w + 1)), int(down * (trim_h + 1)), flip

    def time_ids(self, row: int, number: int) -> tuple[int, int, int, int, int, int]:
        """SDXL's size conditioning: (original h, w, crop top, left, target h, w) of the cut that is made."""
        left, top, _ = self.cut(row, number)
        (width, height), (target_w, target_h) = self.size[row].tolist(), self.buckets[self.bucket_of[row]]
        return height, width, top, left, target_h, target_w

    def bucket_counts(self) -> list[dict]:
        """Images a bucket: [{"width", "height", "images"}], for reports. Empty buckets are left out."""
        counts = np.bincount(self.bucket_of, minlength=len(self.buckets))
        return [{"width": w, "height": h, "images": int(n)} for (w, h), n in zip(self.buckets, counts, strict=True) if n]


def flatten(texts: list[list[str]]) -> tuple[np.ndarray, np.ndarray]:
    """Lists of captions -> (all captions, where each list starts)."""
    start = np.zeros(len(texts) + 1, np.int64)
    np.cumsum([len(several) for several in texts], out=start[1:])
    return np.array([text for several in texts for text in several], Text), start


def build(records: np.ndarray, names: np.ndarray, captions: np.ndarray, caption_start: np.ndarray, *,
          resolution: tuple[int, int], bucket: tuple[int, int, int] | None = None, no_upscale: bool = False,
          center_crop: bool = False, random_crop: bool = False, random_flip: bool = False) -> Table:
    """Choose bucket and resize of every scanned image.

    bucket: (shortest side, longest side, step), or None for the one size of `resolution`.
    center_crop counts without buckets, random_crop with them (diffusers' and kohya's defaults are opposite).
    Raises `UserError` for bounds that contradict each other.
    """
    width, height = records["width"].astype(np.int64), records["height"].astype(np.int64)
    if bucket is None:
        buckets, bucket_of = [resolution], np.zeros(len(records), np.int32)
        resized = geometry.fixed(width, height, resolution)
    elif no_upscale:
        bucket_w, bucket_h, *resized = geometry.without_upscaling(width, height, resolution[0] * resolution[1], bucket[2])
        sides, bucket_of = np.unique(bucket_w.astype(np.int64) << 32 | bucket_h, return_inverse=True)    # a number each: lean
        buckets = [(side >> 32, side & 2**32 - 1) for side in sides.tolist()]
    else:
        try:
            buckets = geometry.make_buckets(resolution, *bucket)
        except ValueError as error:
            raise UserError(str(error)) from None
        bucket_of = geometry.choose_buckets(width, height, buckets)
        resized = geometry.cover(width, height, *np.array(buckets)[bucket_of].T)
    return Table(
        source_row=np.arange(len(records), dtype=np.int32), name=names,
        content=records["content"].copy(),    # a view would keep all of `records`: 65 MB a million images
        size=np.stack([width, height], 1).astype(np.int32), resized=np.stack(resized, 1).astype(np.int32),
        bucket_of=bucket_of.reshape(-1).astype(np.int32), buckets=buckets, captions=captions, caption_start=caption_start,
        random_crop=random_crop if bucket else not center_crop, random_flip=random_flip, half_even=bucket is None)

"""SimpleTuner's sizes: what an image is resized to and which size is cut out of it, by the rules of its documentation.

All arithmetic is on NumPy columns, and each image is judged by itself: another image, or another order of them, changes
nothing. Sizes are (width, height) in pixels.
"""

import numpy as np

from library.data.geometry import cover
from library.data.specs import Aspect

# Why an image is left out; 0 is none of them.
REASONS = ("", "smaller than minimum_image_size", "its aspect ratio is below minimum_aspect_ratio",
           "its aspect ratio is above maximum_aspect_ratio", "so long and thin that its aspect ratio rounds to nothing",
           "every shape of crop_aspect_buckets enlarges it by more than max_upscale_threshold")
_CHUNK = 65536    # rows worked on at once: bounds the memory
_HEX = np.zeros(256)
_HEX[list(b"0123456789abcdef")] = range(16)


def fit(size: Aspect, widths: np.ndarray, heights: np.ndarray, contents: np.ndarray):
    """Target and resize of every image, and why it is left out.

    widths, heights: [N] pixels. contents: [N] S32, hex digest of each file: what `random` shapes are drawn by, so that a
    file keeps its shape for ever.
    Returns (target_w, target_h, resized_w, resized_h) [N] int32 and reasons [N] int8, indices into REASONS. The resized
    image always covers the target. Of an image left out, all four are one `alignment`.
    """
    fitted, reasons = np.empty((4, len(widths)), np.int32), np.empty(len(widths), np.int8)
    for start in range(0, len(widths), _CHUNK):
        rows = slice(start, start + _CHUNK)
        fitted[:, rows], reasons[rows] = _fit(size, widths[rows].astype(np.int64), heights[rows].astype(np.int64), contents[rows])
    return (*fitted, reasons)


def pixels(size: Aspect, value: float) -> int:
    """A value in the unit of an area -> pixels; whole ones, so that 1024 pixel_area and 1.048576 area are the same."""
    return round(value * value if size.unit == "pixel_area" else value * 1e6)


def _fit(size: Aspect, widths, heights, contents):
    ratio, upright = _round(widths / heights, size.rounding), _round(heights / widths, size.rounding)
    measure, least = (np.minimum(widths, heights), size.minimum) if size.unit == "pixel" else (
        widths * heights, pixels(size, size.minimum))
    faults = [measure < least, ratio < (size.min_ratio or 0), ratio > (size.max_ratio or np.inf), (ratio == 0) | (upright == 0)]
    shape, refused = np.maximum(ratio, 10.0 ** -size.rounding), np.zeros(len(ratio), bool)
    if size.crop and size.aspect == "square":
        shape = np.ones(len(ratio))
    elif size.crop and size.aspect != "preserve":
        shape, refused = _choose(size, widths, heights, ratio, contents)
    reasons = np.select([*faults, refused], range(1, 6), 0)
    target_w, target_h = _target(size, shape)

    resized_w, resized_h = widths, heights    # a crop is taken from the image as it is
    if size.crop and size.maximum is not None:
        large, scale = (measure > size.maximum, size.downsample / measure) if size.unit == "pixel" else (
            measure > pixels(size, size.maximum), np.sqrt(pixels(size, size.downsample) / measure))
        resized_w, resized_h = (np.where(large, (side * scale + 0.5).astype(np.int64), side) for side in (widths, heights))
    short = (resized_w < target_w) | (resized_h < target_h) | (not size.crop)
    cover_w, cover_h = cover(widths, heights, target_w, target_h)
    fitted = np.stack([target_w, target_h, np.where(short, cover_w, resized_w), np.where(short, cover_h, resized_h)])
    fitted[:, reasons > 0] = size.alignment
    return fitted, reasons


def _target(size: Aspect, ratio: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Width and height, in multiples of the alignment, of the shape w/h = `ratio`."""
    if size.unit == "pixel":
        return (_align(size, size.resolution * np.maximum(ratio, 1)), _align(size, size.resolution / np.minimum(ratio, 1)))
    edge = _align(size, np.sqrt(pixels(size, size.resolution)))
    return _align(size, edge * np.sqrt(ratio)), _align(size, edge / np.sqrt(ratio))


def _choose(size: Aspect, widths, heights, ratio, contents) -> tuple[np.ndarray, np.ndarray]:
    """Shape of each image out of `size.choices`, and whether none of them is allowed."""
    shapes, weights = np.array(size.choices, np.float64).T
    allowed = np.ones((len(ratio), len(shapes)), bool)
    if size.max_upscale is not None:
        for column, (width, height) in enumerate(zip(*_target(size, shapes), strict=True)):
            limit = 1 + size.max_upscale + 1e-9    # 1.2 is a little less than that in binary
            allowed[:, column] = (width <= widths * limit) & (height <= heights * limit)
    if size.aspect == "closest":
        chosen = np.where(allowed, np.abs(shapes - ratio[:, None]), np.inf).argmin(axis=1)    # the first of equals
    else:
        share = np.cumsum(allowed * weights, axis=1)
        chosen = (share <= (_draw(contents) * share[:, -1])[:, None]).sum(axis=1)
        chosen = np.minimum(chosen, len(shapes) - 1)    # where none is allowed
    return shapes[chosen], ~allowed.any(axis=1)


def _draw(contents: np.ndarray) -> np.ndarray:
    """A number in [0, 1) for each digest, from its second half (the first seeds the cuts)."""
    digits = np.ascontiguousarray(contents).view(np.uint8).reshape(len(contents), -1)[:, 16:29]    # 52 bits, a float's
    return _HEX[digits] @ 16.0 ** -np.arange(1, 14)


def _align(size: Aspect, length) -> np.ndarray:
    """The nearest multiple of the alignment (half to even, as Python rounds), and at least one."""
    return np.maximum(np.rint(length / size.alignment).astype(np.int64) * size.alignment, size.alignment)


def _round(values: np.ndarray, digits: int) -> np.ndarray:
    """Python's `round`, to the last bit: NumPy's own multiplies first and so loses what decides a tie."""
    scaled = values * 10.0 ** digits
    rounded = np.rint(scaled) / 10.0 ** digits
    ties = np.flatnonzero(np.abs(scaled % 1 - 0.5) < 1e-6)
    rounded[ties] = [round(value, digits) for value in values[ties].tolist()]
    return rounded

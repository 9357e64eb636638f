"""Where an image is resized to and what is cut out of it: fixed sizes as diffusers, buckets as kohya.

All arithmetic is on NumPy columns, so that a million rows take a second. Sizes are (width, height) in pixels.
"""

import numpy as np

_CHUNK = 65536    # rows worked on at once where that takes many columns: bounds the memory


def make_buckets(resolution: tuple[int, int], shortest: int, longest: int, step: int) -> list[tuple[int, int]]:
    """kohya's bucket set (`make_bucket_resolutions`): every shape of at most the area of `resolution`.

    `shortest` and `longest` bound both sides and are first rounded down and up to `step`.
    Raises ValueError if `resolution` lies outside of them, or is less than one `step`.
    """
    shortest, longest = shortest // step * step, -(-longest // step) * step
    if min(resolution) < shortest or max(resolution) > longest:
        raise ValueError(f"--resolution {resolution[0]},{resolution[1]} lies outside --min_bucket_reso {shortest} "
                         f"to --max_bucket_reso {longest}: widen these two")
    area = resolution[0] * resolution[1]
    square = int(area ** 0.5) // step * step
    buckets = {(square, square)} if square else set()
    for width in range(max(shortest, step), longest + 1, step):
        height = min(longest, area // width // step * step)
        if height >= max(shortest, step):
            buckets |= {(width, height), (height, width)}
    if not buckets:
        raise ValueError(f"--bucket_reso_steps {step} leaves no bucket of --resolution {resolution[0]},{resolution[1]}: lower it")
    return sorted(buckets)


def choose_buckets(widths: np.ndarray, heights: np.ndarray, buckets: list[tuple[int, int]]) -> np.ndarray:
    """Index of each image's bucket: its own size if there is one, else the nearest w/h (the first of equals)."""
    sides = np.array(buckets)
    ratios = sides[:, 0] / sides[:, 1]
    chosen = np.empty(len(widths), np.int32)
    for start in range(0, len(widths), _CHUNK):
        rows = slice(start, start + _CHUNK)
        distance = np.abs(ratios[None, :] - (widths[rows] / heights[rows])[:, None])
        exact = (widths[rows, None] == sides[None, :, 0]) & (heights[rows, None] == sides[None, :, 1])
        distance[exact] = -1
        chosen[rows] = distance.argmin(axis=1)
    return chosen


def cover(widths, heights, target_w, target_h) -> tuple[np.ndarray, np.ndarray]:
    """Size after resizing so that the image just covers its bucket (kohya's rounding: half up)."""
    wider = widths / heights > target_w / target_h
    scale = np.where(wider, target_h / heights, target_w / widths)
    resized_w = np.maximum((widths * scale + 0.5).astype(np.int64), target_w)
    resized_h = np.maximum((heights * scale + 0.5).astype(np.int64), target_h)
    return resized_w, resized_h


def without_upscaling(widths, heights, area: int, step: int):
    """kohya's `bucket_no_upscale`: bucket and resize of each image, none of them enlarged.

    Larger images shrink to `area`, to the rounding that keeps their shape best; each bucket is the resized
    image rounded down to `step`. Unlike kohya's, no side is ever rounded down to nothing.
    Returns (bucket_w, bucket_h, resized_w, resized_h).
    """
    fitted = np.empty((4, len(widths)), np.int32)
    for start in range(0, len(widths), _CHUNK):
        rows = slice(start, start + _CHUNK)
        fitted[:, rows] = _without_upscaling(widths[rows], heights[rows], area, step)
    return fitted


def _without_upscaling(widths, heights, area: int, step: int):
    ratio = widths / heights
    exact_w = np.sqrt(area * ratio)
    exact_h = area / exact_w
    by_w = np.maximum((exact_w + 0.5).astype(np.int64) // step * step, step)
    by_w_h = np.maximum((by_w / ratio + 0.5).astype(np.int64), 1)
    by_h = np.maximum((exact_h + 0.5).astype(np.int64) // step * step, step)
    by_h_w = np.maximum((by_h * ratio + 0.5).astype(np.int64), 1)
    # compared as kohya does: shape of each candidate bucket against the shape of the image
    error_w = np.abs(by_w / np.maximum(by_w_h // step * step, step) - ratio)
    error_h = np.abs(np.maximum(by_h_w // step * step, step) / by_h - ratio)
    use_w = error_w < error_h
    large = widths * heights > area
    resized_w = np.where(large, np.where(use_w, by_w, by_h_w), widths)
    resized_h = np.where(large, np.where(use_w, by_w_h, by_h), heights)
    bucket_w, bucket_h = np.maximum(resized_w // step * step, step), np.maximum(resized_h // step * step, step)
    tiny = (resized_w < bucket_w) | (resized_h < bucket_h)    # smaller than one step: the only case of enlarging
    if tiny.any():
        cover_w, cover_h = cover(widths[tiny], heights[tiny], bucket_w[tiny], bucket_h[tiny])
        resized_w[tiny], resized_h[tiny] = cover_w, cover_h
    return bucket_w, bucket_h, resized_w, resized_h


def fixed(widths, heights, target: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Size after torchvision's `Resize`: the side that limits becomes exact, the other is rounded down."""
    target_w, target_h = target
    wider = widths * target_h > heights * target_w
    resized_w = np.where(wider, widths * target_h // heights, target_w)
    resized_h = np.where(wider, target_h, heights * target_w // widths)
    return np.maximum(resized_w, target_w), np.maximum(resized_h, target_h)


def place(style: str, trim: int, draw: float) -> int:
    """Offset of a cut from `trim` spare pixels. draw: in [0, 1), for style "random"."""
    if style == "random":
        return int(draw * (trim + 1))
    return {"corner": 0, "center": trim // 2, "center_half_even": middle(trim, True)}[style]


def middle(trim: int, half_even: bool) -> int:
    """Offset of a centred cut: diffusers rounds half to even, kohya rounds down."""
    return int(round(trim / 2)) if half_even else trim // 2

"""Slight changes of colour, as kohya's color_aug.

Theirs are albumentations' `HueSaturationValue(8, 0, 0)`, whose unit is two degrees, and `RandomGamma((95, 105))`.
"""

import numpy as np

from library.data.draws import COLOUR, generator

_SHARE, _HUE, _GAMMA = 0.33, 16.0, 0.05    # of the visits; degrees at the most; bend at the most


def draw(content: int, number: int) -> tuple[str, float] | None:
    """What happens to the `number`-th cut of an image: ("hue", degrees), ("gamma", exponent), or nothing.

    content: an integer made of the file's hash. A third of the cuts change, half of those in hue, half in gamma.
    """
    whether, which, amount = generator(content, 0, number, COLOUR).random(3)
    if whether >= _SHARE:
        return None
    return ("hue", (2 * amount - 1) * _HUE) if which < 0.5 else ("gamma", 1 + (2 * amount - 1) * _GAMMA)


def change(pixels: np.ndarray, kind: str, amount: float) -> np.ndarray:
    """[H, W, 3] uint8 -> the same with its hue turned by `amount` degrees, or its values taken to the power `amount`."""
    if kind == "gamma":
        table = (255 * (np.arange(256) / 255) ** amount + 0.5).astype(np.uint8)
        return table[pixels]
    from PIL import Image  # late: the table, which draws colours, needs no pixels
    hsv = np.array(Image.fromarray(np.ascontiguousarray(pixels)).convert("HSV"))
    hsv[..., 0] += np.uint8(round(amount / 360 * 256) % 256)    # wraps around, as hues do
    return np.array(Image.fromarray(hsv, "HSV").convert("RGB"))

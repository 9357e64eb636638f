"""The handwritten digits of the demo: which scans are trained on, what their pictures and captions look like.

scikit-learn ships 1,797 real scans, 8x8 grey levels from 0 to 16. A third of them is never trained on: the
classifier that reads the generated pictures (read_digits.py) knows only those.
"""

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
SIDE = 64  # pixels of one digit's picture: 8x8 latents, the least that SDXL's two down-samplings allow with grace
NUM_HELD_OUT_SCANS = 600


def split_scans():
    """Two disjoint (scans [n, 8, 8] in 0..1, digits [n]) pairs, stratified by digit: to train on, and held out."""
    digits = load_digits()
    train, held_out, train_digits, held_out_digits = train_test_split(
        digits.images / 16, digits.target, test_size=NUM_HELD_OUT_SCANS, stratify=digits.target, random_state=0
    )
    return (train, train_digits), (held_out, held_out_digits)


def picture(scan):
    """[8, 8] in 0..1 -> RGB picture of 64x64: white ink on black."""
    small = Image.fromarray(np.uint8(scan * 255 + 0.5))
    return small.resize((SIDE, SIDE), Image.Resampling.BICUBIC).convert("RGB")


def is_held_out(first, second):
    """Whether an ordered pair of digits is kept from training: 20 of the 100, each digit twice in either place."""
    return (2 * first + second) % 5 == 0


def caption(digits, tall=False):
    """[4] -> "four"; [4, 2] -> "four two" side by side, or "four over two" when stacked."""
    return (" over " if tall else " ").join(WORDS[digit] for digit in digits)

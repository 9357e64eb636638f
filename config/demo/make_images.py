"""Lay out the demo's image folder from scikit-learn's handwritten digits: a PNG and a caption of the same stem.

    python config/demo/make_images.py out/demo/images
    python config/demo/make_images.py out/demo_sd3/images --singles

One digit (64x64, "four"), two side by side (128x64, "four two"), two stacked (64x128, "four over two").
20 of the 100 ordered pairs never appear (scans.is_held_out): they show whether the model learnt to combine.
With --singles there are no pairs.
"""

import argparse
import functools
from pathlib import Path

import numpy as np
import scans
from build_once import build_once
from PIL import Image

PICTURES_PER_PAIR = 13  # 80 pairs x 13 = 1,040 wide and as many tall pictures beside the 1,197 single digits


def join(pictures, tall):
    """Two 64x64 pictures -> one of 128x64 (width x height), or of 64x128 when stacked."""
    return Image.fromarray(np.concatenate([np.asarray(picture) for picture in pictures], axis=0 if tall else 1))


def save(folder, stem, picture, caption):
    """Write `stem`.png and `stem`.txt."""
    picture.save(folder / f"{stem}.png")
    (folder / f"{stem}.txt").write_text(caption + "\n")


def lay_out(folder, singles):
    """Write every picture and caption into an empty folder, the single digits alone or pairs too; the same on every machine."""
    (train, digits), _ = scans.split_scans()
    pictures = [scans.picture(scan) for scan in train]
    for index, (picture, digit) in enumerate(zip(pictures, digits, strict=True)):
        save(folder, f"one_{index:04d}", picture, scans.caption([digit]))
    draw = np.random.default_rng(0)
    pairs = [(a, b) for a in range(10) for b in range(10) if not scans.is_held_out(a, b)]
    for shape in () if singles else ("wide", "tall"):
        for first, second in pairs:
            for number in range(PICTURES_PER_PAIR):
                chosen = [pictures[draw.choice(np.flatnonzero(digits == digit))] for digit in (first, second)]
                caption = scans.caption([first, second], tall=shape == "tall")
                save(folder, f"{shape}_{first}{second}_{number:02d}", join(chosen, shape == "tall"), caption)


def main():
    """Make the folder, or say that it is there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="the folder to make")
    parser.add_argument("--singles", action="store_true", help="single digits alone")
    args = parser.parse_args()
    out, options = args.out, "singles" if args.singles else ""
    made = build_once(out, [__file__, scans.__file__], functools.partial(lay_out, singles=args.singles), options)
    print(f"{out}: {len(list(out.glob('*.png')))} pictures{'' if made else ', as they were'}")


if __name__ == "__main__":
    main()

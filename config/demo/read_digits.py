"""Read handwritten digits back from pictures: nearest neighbours among real scans that were never trained on.

    python config/demo/read_digits.py             how well it reads the other real scans
    python config/demo/read_digits.py FOLDER      how many pictures of a folder show what their caption says

The caption lies beside a picture (.txt), or is the prompt that generate.py wrote into it.
It shares nothing with the diffusion model but the kind of data: no scan, no weight, no library.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import scans
from PIL import Image
from sklearn.neighbors import KNeighborsClassifier

NUM_NEIGHBORS = 1


def features(picture):
    """64x64 picture (PIL) -> [64]: its 8x8 area means in 0..1, the scans' own resolution."""
    grey = np.asarray(picture.convert("L"), dtype=np.float64) / 255
    return grey.reshape(8, scans.SIDE // 8, 8, scans.SIDE // 8).mean(axis=(1, 3)).ravel()


def fit_reader():
    """A classifier fitted on the held-out scans, seen through the pictures that show them."""
    _, (held_out, digits) = scans.split_scans()
    pictures = np.stack([features(scans.picture(scan)) for scan in held_out])  # [600, 64]
    return KNeighborsClassifier(NUM_NEIGHBORS).fit(pictures, digits)


def halves(picture):
    """The 64x64 parts of a picture of 64x64, 128x64 or 64x128 (width x height): left to right or top to bottom."""
    if sorted(picture.size) not in ([scans.SIDE, scans.SIDE], [scans.SIDE, 2 * scans.SIDE]):
        raise ValueError(f"a picture of {picture.size} pixels holds neither one nor two digits of {scans.SIDE}")
    corners = [(x, y) for y in range(0, picture.height, scans.SIDE) for x in range(0, picture.width, scans.SIDE)]
    return [picture.crop((x, y, x + scans.SIDE, y + scans.SIDE)) for x, y in corners]


def read(reader, picture):
    """The digits in a picture (PIL, or uint8 array [h, w, 3] or [h, w]): [4], or [4, 2] for a wide or a tall one."""
    if isinstance(picture, np.ndarray):
        picture = Image.fromarray(picture)
    return reader.predict(np.stack([features(part) for part in halves(picture)])).tolist()


def digits_of(caption):
    """ "four over two" -> [4, 2]: what a caption says is shown."""
    return [scans.WORDS.index(word) for word in caption.split() if word in scans.WORDS]


def caption_of(path):
    """What a picture is said to show: its text file, or else the prompt in the PNG itself; None if neither is there."""
    if path.with_suffix(".txt").is_file():
        return path.with_suffix(".txt").read_text()
    with Image.open(path) as picture:
        return json.loads(picture.text["generate"])["prompt"] if "generate" in picture.text else None


def main():
    """Report on the scans that the reader does not know, or on a folder of pictures with captions."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", help="pictures (.png) with captions to be read")
    folder = parser.parse_args().folder
    reader = fit_reader()
    if folder is None:
        (others, digits), _ = scans.split_scans()
        right = sum(read(reader, scans.picture(scan)) == [digit] for scan, digit in zip(others, digits, strict=True))
        print(f"{right} of {len(digits)} other real scans read right ({right / len(digits):.1%})")
        return
    pictures = {path: caption for path in sorted(folder.glob("*.png")) if (caption := caption_of(path))}  # grid.png has none
    wrong = []
    for path, caption in pictures.items():
        said, shown = digits_of(caption), read(reader, Image.open(path))
        if said != shown:
            wrong.append(f"  {path.name}: caption {said}, read {shown}")
    print(f"{len(pictures) - len(wrong)} of {len(pictures)} pictures show their caption", *wrong[:20], sep="\n")


if __name__ == "__main__":
    main()

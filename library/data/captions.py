"""Which text an image is shown with: list choice, tag shuffle, dropout. Plain strings; no files, no torch."""

import hashlib

import numpy as np

from library.data.draws import CAPTION, generator

SEPARATOR = ","


def shuffle_tags(caption: str, keep: int, order: np.random.Generator) -> str:
    """Shuffle the comma-separated tags of `caption` but for the first `keep`."""
    tags = [tag.strip() for tag in caption.split(SEPARATOR)]
    fixed, flexible = tags[:keep], tags[keep:]
    return f"{SEPARATOR} ".join(fixed + [flexible[i] for i in order.permutation(len(flexible))])


def variant(caption: str, number: int, shuffle: bool, keep: int) -> str:
    """The caption as its `number`-th order of tags shows it.

    The order depends on the caption's text and the number alone, so that its embedding can be cached.
    """
    if not shuffle or SEPARATOR not in caption:
        return caption
    text = int.from_bytes(hashlib.blake2b(caption.encode(), digest_size=8).digest(), "little")
    return shuffle_tags(caption, keep, generator(text, 0, number, CAPTION))


def pick(captions: list[str], seed: int, row: int, visit: int, variants: int | None, *,
         empty: float, shuffle: bool, keep: int) -> str:
    """The prompt of one visit of one image.

    captions: the image's captions, of which one is drawn; none is the empty prompt.
    variants: tag orders to choose from (the visit takes them in turn), or None for a new one each visit.
    empty: probability of the empty prompt, drawn anew at each visit.
    """
    draw = generator(seed, row, visit, CAPTION)
    drop, which = draw.random(2)
    if not captions or drop < empty:
        return ""
    chosen = captions[int(which * len(captions))]
    return variant(chosen, visit if variants is None else visit % variants, shuffle, keep)


def possible(captions: list[str], variants: int, *, shuffle: bool, keep: int) -> set[str]:
    """Every prompt that `pick` can give for these captions, but for the empty one."""
    return {variant(caption, number, shuffle, keep) for caption in captions
            for number in range(variants if shuffle else 1)}

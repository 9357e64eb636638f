"""Images that are there twice: the same file (by its hash), or nearly the same picture (by a perceptual hash).

Columns of a whole data set at once: a hundred thousand images take seconds, not N^2 comparisons.
"""

import io
import os
from concurrent.futures import ThreadPoolExecutor
from itertools import combinations
from pathlib import Path

import numpy as np
from tqdm import tqdm

from library.data import images
from library.data.cache import sweep, write_whole

FURTHEST = 7                     # bits: beyond that, different pictures meet by chance
FLAT = 0                         # hash of a picture without features: like nothing else
SIDE, _KEPT = 32, 8              # pixels compared, and cosines kept, each way
_FLAT_SPREAD = 2.0               # of 255: one colour, and the noise of a JPEG
_RECORD = np.dtype([("content", "S32"), ("hash", "u8")])
_PROBES = 1 << 22                # comparisons held in memory at once
_COSINES = np.cos(np.pi / SIDE * np.outer(np.arange(_KEPT), np.arange(SIDE) + 0.5))    # DCT-II


def perceptual_hash(grey: np.ndarray) -> int:
    """The pHash of a picture: 64 bits, of which similar pictures differ in few; 0 for one without features.

    grey: [32, 32]. The bits say which of the 8 x 8 lowest cosines (2-D DCT-II) lie above their median, as in the
    `imagehash` package (Zauner, "Implementation and Benchmarking of Perceptual Image Hash Functions", 2010).
    """
    grey = np.asarray(grey, np.float64)
    if grey.std() < _FLAT_SPREAD:
        return FLAT
    lowest = _COSINES @ grey @ _COSINES.T
    return int.from_bytes(np.packbits(lowest > np.median(lowest)).tobytes(), "big")


def hash_images(read, content: np.ndarray, memory: Path | None = None) -> tuple[np.ndarray, dict[int, str]]:
    """Perceptual hashes [N] uint64 of N images, and why one has none (its hash is then 0).

    read(row) -> encoded image; called from many threads. content: hashes of the files [N] S32: each is decoded once.
    memory: a .npy file where the result is kept for the next time.
    """
    kinds, first, kind_of = np.unique(content, return_index=True, return_inverse=True)
    hashes, known = np.zeros(len(kinds), np.uint64), _load(memory)
    at = np.minimum(np.searchsorted(known["content"], kinds), max(len(known) - 1, 0))
    found = known["content"][at] == kinds if len(known) else np.zeros(len(kinds), bool)
    hashes[found] = known["hash"][at[found]]
    todo, faults = np.flatnonzero(~found), {}
    todo = todo[np.argsort(first[todo])]    # in the order of rows, for sources that can only be read forwards

    def look(kind):
        try:
            picture = images.read_pixels(read(int(first[kind])), (SIDE, SIDE), "lanczos")
            return perceptual_hash(picture.convert("L")), None
        except (images.BadImage, OSError) as fault:
            return FLAT, str(fault)

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool, \
            tqdm(total=len(todo), desc="compare images", unit="image", disable=not len(todo)) as bar:
        for start in range(0, len(todo), 4096):    # in slices: a million waiting futures would take a gigabyte
            part = todo[start:start + 4096]
            for kind, (value, fault) in zip(part, pool.map(look, part), strict=True):
                hashes[kind] = value
                if fault:
                    faults[int(kind)] = fault
                bar.update()
    if memory and len(todo):
        whole = np.ones(len(kinds), bool)
        whole[list(faults)] = False
        _save(memory, known, kinds[whole], hashes[whole])
    kind_of = kind_of.reshape(-1)
    return hashes[kind_of], {row: faults[kind] for row, kind in enumerate(kind_of.tolist()) if kind in faults} if faults else {}


def same_file(content: np.ndarray) -> np.ndarray:
    """For each of N files (hashes [N] S32) the first row with the same content [N] int64; -1 where there is no other."""
    _, first, kind, count = np.unique(content, return_index=True, return_inverse=True, return_counts=True)
    kind = kind.reshape(-1)
    return np.where(count[kind] > 1, first[kind], -1)


def near(hashes: np.ndarray, distance: int) -> np.ndarray:
    """For each of N pictures the first row of those it is chained to by steps of at most `distance` bits [N] int64.

    -1 where there is no other, and for pictures without features. distance: 0 to `FURTHEST`.
    """
    kinds, kind_of = np.unique(hashes, return_inverse=True)
    kind_of = kind_of.reshape(-1)
    chain = _chains(len(kinds), near_pairs(kinds, distance))[kind_of]
    first = np.full(len(kinds), len(hashes), np.int64)
    np.minimum.at(first, chain, np.arange(len(hashes)))
    alone = (np.bincount(chain, minlength=len(kinds))[chain] < 2) | (hashes == FLAT)
    return np.where(alone, -1, first[chain])


def near_pairs(hashes: np.ndarray, distance: int) -> np.ndarray:
    """All pairs [P, 2] int64 (i < j) of *different* hashes [N] uint64 that differ in at most `distance` bits.

    Multi-index hashing (Norouzi, Punjani, Fleet, "Fast Search in Hamming Space with Multi-Index Hashing", 2012): of four
    bands of 16 bits, one differs in at most distance // 4 bits; only what meets in a band is compared in full.
    Hashes of 0 (no features) are in no pair. Raises ValueError for a distance beyond `FURTHEST`.
    """
    if not 0 <= distance <= FURTHEST:
        raise ValueError(f"the distance is {distance}, expected 0 to {FURTHEST}")
    masks = [sum(1 << bit for bit in bits) for flips in range(distance // 4 + 1) for bits in combinations(range(16), flips)]
    found = [np.zeros((0, 2), np.int64)]
    for band in range(4) if distance else ():
        key = (hashes >> np.uint64(16 * band)).astype(np.uint16)
        order = np.argsort(key, kind="stable")
        starts = np.searchsorted(key[order], np.arange(1 << 16))
        ends = np.append(starts[1:], len(order))
        for mask in masks:
            probe = key ^ np.uint16(mask)
            count = (ends - starts)[probe]
            reach = np.cumsum(count)
            for part in np.split(np.arange(len(hashes)), np.searchsorted(reach, np.arange(_PROBES, reach[-1], _PROBES))) \
                    if len(hashes) else ():
                one = np.repeat(part, count[part])
                within = np.arange(len(one)) - np.repeat(np.cumsum(count[part]) - count[part], count[part])
                other = order[np.repeat(starts[probe[part]], count[part]) + within]
                close = (one < other) & (np.bitwise_count(hashes[one] ^ hashes[other]) <= distance)
                found.append(np.stack([one[close], other[close]], 1))
    pairs = np.unique(np.concatenate(found), axis=0)
    return pairs[(hashes[pairs] != FLAT).all(axis=1)]


def _chains(count: int, pairs: np.ndarray) -> np.ndarray:
    """The lowest member of each one's connected component [count]."""
    lowest = np.arange(count)
    while True:
        before = lowest.copy()
        reached = np.minimum(lowest[pairs[:, 0]], lowest[pairs[:, 1]])
        for side in (0, 1):
            np.minimum.at(lowest, lowest[pairs[:, side]], reached)    # a whole component follows its lowest at once
            np.minimum.at(lowest, pairs[:, side], reached)
        lowest = lowest[lowest]
        if (lowest == before).all():
            return lowest


def _load(path: Path | None) -> np.ndarray:
    """What is remembered, sorted by content; nothing if it is lost or unreadable: then the images are looked at again."""
    try:
        known = np.load(path, allow_pickle=False) if path else np.zeros(0, _RECORD)
    except (OSError, ValueError, EOFError):
        return np.zeros(0, _RECORD)
    return known if known.dtype == _RECORD else np.zeros(0, _RECORD)


def _save(path: Path, known: np.ndarray, content: np.ndarray, hashes: np.ndarray) -> None:
    fresh = np.empty(len(content), _RECORD)
    fresh["content"], fresh["hash"] = content, hashes
    joined = np.concatenate([fresh, known[~np.isin(known["content"], content)]])
    buffer = io.BytesIO()    # np.save to a file says nothing of a full disk
    np.save(buffer, np.sort(joined, order="content"), allow_pickle=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    sweep(path.parent)
    write_whole(path, buffer.getbuffer())

"""Duplicates: equal files, and pictures that look the same; against comparisons of every pair."""

import hashlib
import io

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageDraw

from library.data import duplicates


def picture(seed: int, size=(300, 200)) -> Image.Image:
    """A picture with large shapes: no two of them are alike."""
    draw = np.random.default_rng(seed)
    image = Image.new("RGB", size, tuple(draw.integers(0, 255, 3).tolist()))
    for _ in range(12):
        box = np.sort(draw.integers(0, size[0], (2, 2)), axis=0) * (1, size[1] / size[0])
        ImageDraw.Draw(image).ellipse(box.reshape(-1).tolist(), fill=tuple(draw.integers(0, 255, 3).tolist()))
    return image


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    data = io.BytesIO()
    image.save(data, kind, **options)
    return data.getvalue()


def contents(files: list[bytes]) -> np.ndarray:
    return np.array([hashlib.blake2b(data, digest_size=16).hexdigest() for data in files], "S32")


def hashes_of(files: list[bytes]) -> np.ndarray:
    return duplicates.hash_images(lambda row: files[row], contents(files))[0]


def every_pair(hashes, distance: int) -> set[tuple[int, int]]:
    numbers = [int(each) for each in hashes]
    return {(i, j) for j in range(len(numbers)) for i in range(j) if numbers[i] and numbers[j]
            and bin(numbers[i] ^ numbers[j]).count("1") <= distance}


def grouped(count: int, pairs: set[tuple[int, int]]) -> list[int]:
    """The lowest member of each one's group, or -1: by walking from neighbour to neighbour."""
    lowest = [-1] * count
    for start in range(count):
        if lowest[start] < 0 and any(start in pair for pair in pairs):
            reached, pending = {start}, [start]
            while pending:
                here = pending.pop()
                beside = {i + j - here for i, j in pairs if here in (i, j)} - reached
                reached |= beside
                pending += beside
            for each in reached:
                lowest[each] = start
    return lowest


@st.composite
def crowded(draw):
    """Hashes of which many are near each other, equal, or 0."""
    seeds = draw(st.lists(st.integers(1, 2**64 - 1), min_size=1, max_size=3))
    flips = st.lists(st.integers(0, 63), max_size=9)
    near = [seed ^ sum(1 << bit for bit in set(bits)) for seed in seeds for bits in draw(st.lists(flips, max_size=9))]
    return np.array(draw(st.permutations([*seeds, *near, *draw(st.lists(st.just(0), max_size=2))])), np.uint64)


@given(crowded(), st.integers(0, duplicates.FURTHEST))
def test_near_is_what_comparing_every_pair_finds(hashes, distance):
    pairs = every_pair(hashes, distance)
    assert duplicates.near(hashes, distance).tolist() == grouped(len(hashes), pairs)
    kinds = np.unique(hashes)
    assert set(map(tuple, duplicates.near_pairs(kinds, distance).tolist())) == every_pair(kinds, distance)


def test_long_chains_and_slices(monkeypatch):
    chain = np.array([(1 << length) - 1 for length in range(1, 65)], np.uint64)    # each one bit from the next
    assert duplicates.near(chain[::-1], 1).tolist() == [0] * 64
    monkeypatch.setattr(duplicates, "_PROBES", 3)
    assert duplicates.near(chain, 1).tolist() == [0] * 64


@pytest.mark.parametrize("distance", [-1, duplicates.FURTHEST + 1])
def test_a_distance_that_the_bands_cannot_find_is_refused(distance):
    with pytest.raises(ValueError, match="expected 0 to 7"):
        duplicates.near_pairs(np.array([1, 2], np.uint64), distance)


def test_no_images():
    assert duplicates.near(np.zeros(0, np.uint64), 4).tolist() == []
    assert duplicates.same_file(np.zeros(0, "S32")).tolist() == []


@given(st.lists(st.sampled_from("abcdef"), min_size=1, max_size=20))
def test_same_file(letters):
    expected = [letters.index(each) if letters.count(each) > 1 else -1 for each in letters]
    assert duplicates.same_file(np.array(letters, "S32")).tolist() == expected


def test_the_hash_is_imagehashs():
    imagehash = pytest.importorskip("imagehash", reason="the package imagehash is not installed")
    for seed in range(20):
        image = picture(seed)
        grey = image.convert("L").resize((32, 32), Image.Resampling.LANCZOS)
        assert f"{duplicates.perceptual_hash(grey):016x}" == str(imagehash.phash(image))


def test_the_hash_by_its_definition():
    grey = np.asarray(picture(3).convert("L").resize((32, 32)), float)
    at = np.arange(32) + 0.5
    wave = [[(grey * np.cos(np.pi / 32 * down * at)[:, None] * np.cos(np.pi / 32 * across * at)).sum() for across in range(8)]
            for down in range(8)]
    flat = [value for line in wave for value in line]
    bits = "".join("1" if value > np.median(flat) else "0" for value in flat)
    assert duplicates.perceptual_hash(grey) == int(bits, 2)


def test_copies_are_near_and_others_are_not():
    original = [picture(seed) for seed in range(30)]
    copies = [encoded(original[0], "JPEG", quality=40), encoded(original[1].resize((150, 100), Image.Resampling.LANCZOS)),
              encoded(original[2], "WEBP", quality=60), encoded(original[3].resize((900, 600), Image.Resampling.BICUBIC))]
    near = duplicates.near(hashes_of([*map(encoded, original), *copies]), 4)
    assert near[30:].tolist() == [0, 1, 2, 3] and near[:4].tolist() == [0, 1, 2, 3] and (near[4:30] == -1).all()


def test_turned_by_exif_is_the_same_picture():
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = encoded(picture(5).transpose(Image.Transpose.ROTATE_90), "JPEG", quality=95, exif=exif)
    assert duplicates.near(hashes_of([encoded(picture(5)), turned, encoded(picture(6))]), 4).tolist() == [0, 0, -1]


def test_plain_pictures_are_like_nothing():
    plain = [encoded(Image.new("RGB", (64, 64), colour)) for colour in ("white", "black", "red", "white")]
    assert hashes_of(plain).tolist() == [duplicates.FLAT] * 4
    assert (duplicates.near(hashes_of(plain), 7) == -1).all()


def test_each_file_is_decoded_once_and_remembered(tmp_path):
    files = [encoded(picture(seed)) for seed in (0, 1, 0, 2)]
    read = []

    def reader(row):
        read.append(row)
        return files[row]

    memory = tmp_path / "scan" / "perceptual.npy"
    first, faults = duplicates.hash_images(reader, contents(files), memory)
    assert sorted(read) == [0, 1, 3] and not faults and first[0] == first[2] != first[1]
    files.append(encoded(picture(7)))
    read.clear()
    again, _ = duplicates.hash_images(reader, contents(files), memory)
    assert read == [4] and again[:4].tolist() == first.tolist()
    read.clear()
    assert duplicates.hash_images(reader, contents(files), memory)[0].tolist() == again.tolist() and not read
    memory.write_bytes(memory.read_bytes()[:50])    # damaged: looked at anew
    assert duplicates.hash_images(reader, contents(files), memory)[0].tolist() == again.tolist() and len(read) == 4


def test_what_cannot_be_read_is_named_and_not_remembered(tmp_path):
    files = [encoded(picture(0)), b"no image", b"", b"no image"]
    for _ in range(2):
        hashes, faults = duplicates.hash_images(lambda row: files[row], contents(files), tmp_path / "memory.npy")
        assert hashes[1:].tolist() == [0, 0, 0] and sorted(faults) == [1, 2, 3] and faults[2] == "the file is empty"
    assert len(np.load(tmp_path / "memory.npy")) == 1


def test_rows_are_read_in_their_order(monkeypatch):
    monkeypatch.setattr(duplicates.os, "cpu_count", lambda: 1)
    files, read = [encoded(picture(seed, (40, 40))) for seed in range(40)], []
    duplicates.hash_images(lambda row: read.append(row) or files[row], contents(files))
    assert read == sorted(read)    # a stream cannot go back


def test_a_hundred_thousand_take_seconds_not_hours():
    import time
    hashes = np.random.default_rng(0).integers(1, 2**63, 100_000, dtype=np.uint64)
    hashes[500:600] = hashes[:100] ^ np.uint64(0b1011)
    start = time.perf_counter()
    near = duplicates.near(hashes, 4)
    assert time.perf_counter() - start < 10
    assert (near >= 0).sum() == 200 and near[500:600].tolist() == list(range(100))

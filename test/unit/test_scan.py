"""The scan of a data set: what it finds, names, remembers and notices, and the table that comes of it."""

import warnings
from pathlib import Path

import numpy as np
import pytest
from files import png, replace_quietly
from tiny import make_images

import train_sdxl
from library.data import dataset
from library.data.sampler import Sampler
from library.data.scan import scan
from library.data.sources import Folder
from library.errors import UserError

NAMES = ["image000.png", "image001.png", "image002.png"]


@pytest.fixture
def folder(tmp_path) -> Path:
    return make_images(tmp_path / "images", [(24, 16)] * 3)


def load(folder: Path, *flags: str, seed: int = 0, decode: bool = False):
    """(source, table, notes) of a folder, as the script loads it. A warning is an error."""
    args = train_sdxl.parse_args(["--pretrained_model_name_or_path=x", f"--train_data_dir={folder}", "--resolution=64", *flags])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return dataset.load(args, seed, folder.parent / "index", decode)


def forbid_reading(source) -> Folder:
    def read(row):
        raise AssertionError(f"{source.names[row]} is read again")
    source.read = read
    return source


@pytest.mark.parametrize("decode", [False, True])
def test_the_second_scan_reads_no_image(folder, tmp_path, decode):
    first, faults = scan(Folder(str(folder)), tmp_path / "index", decode)
    assert not faults and len(set(first["content"].tolist())) == 3
    assert first[["width", "height"]].tolist() == [(24, 16)] * 3
    second, _ = scan(forbid_reading(Folder(str(folder))), tmp_path / "index", decode)
    assert np.array_equal(first, second)
    (folder / "new.png").write_bytes(png(8, (16, 24)))
    (folder / "new.txt").write_text("a new one")
    source, read = Folder(str(folder)), []
    source.read = lambda row: read.append(source.names[row]) or (folder / source.names[row]).read_bytes()
    third, _ = scan(source, tmp_path / "index", decode)
    assert read == ["new.png"] and third[["width", "height"]].tolist()[3] == (16, 24)


def test_pixels_are_looked_at_once_when_they_first_matter(folder, tmp_path):
    scan(Folder(str(folder)), tmp_path / "index", decode=False)
    with pytest.raises(AssertionError, match="read again"):
        scan(forbid_reading(Folder(str(folder))), tmp_path / "index", decode=True)
    scan(Folder(str(folder)), tmp_path / "index", decode=True)
    for decode in (True, False):
        scan(forbid_reading(Folder(str(folder))), tmp_path / "index", decode)


def test_new_content_under_the_old_size_and_time_is_noticed(folder, tmp_path):
    before, _ = scan(Folder(str(folder)), tmp_path / "index", False)
    replace_quietly(folder / NAMES[0], png(7))
    after, _ = scan(Folder(str(folder)), tmp_path / "index", False)
    assert (before["content"] != after["content"]).tolist() == [True, False, False]


@pytest.mark.parametrize("spoil", [lambda path: path.write_bytes(b""), lambda path: path.write_bytes(path.read_bytes()[:50]),
                                   lambda path: path.write_bytes(b"no numbers"), Path.unlink])
def test_a_lost_index_is_made_again(folder, tmp_path, spoil):
    before, _ = scan(Folder(str(folder)), tmp_path / "index", False)
    index, = (tmp_path / "index").iterdir()
    spoil(index)
    assert np.array_equal(scan(Folder(str(folder)), tmp_path / "index", False)[0], before)
    scan(forbid_reading(Folder(str(folder))), tmp_path / "index", False)


# what cannot be read is named, all of it

BAD = {"cut.png": png(1, (200, 200))[:2000], "empty.jpg": b"", "text.png": b"a photo of a cat", "noise.gif": bytes(range(256))}
REASONS = {"cut.png": "truncated", "empty.jpg": "empty", "text.png": "known format", "noise.gif": "known format"}


@pytest.fixture
def spoilt(folder) -> Path:
    """Three good images, four files that are none, and a link to nowhere. The bad ones are among the good in the table."""
    for name, data in BAD.items():
        (folder / name).write_bytes(data)
    (folder / "gone.webp").symlink_to(folder / "nowhere.webp")
    for name in [*BAD, "gone.webp"]:
        (folder / name).with_suffix(".txt").write_text(f"text of {name}")
    return folder


def test_every_bad_image_is_named_with_its_reason(spoilt):
    with pytest.raises(UserError) as error:
        load(spoilt, decode=True)
    lines = str(error.value).splitlines()
    for name, reason in (REASONS | {"gone.webp": "No such file"}).items():
        assert sum(name in line and reason in line for line in lines) == 1, name
    assert "5 of 8" in lines[0] and str(spoilt) in lines[0] and "--skip_bad_images" in lines[-1]
    assert not any(name in str(error.value) for name in NAMES)


@pytest.mark.parametrize("size", [["--center_crop"], ["--enable_bucket", "--min_bucket_reso=32"],
                                  ["--enable_bucket", "--min_bucket_reso=32", "--bucket_no_upscale", "--bucket_reso_steps=8"]])
def test_skipping_bad_images_leaves_the_good_ones_as_they_are(spoilt, size):
    source, table, notes = load(spoilt, "--skip_bad_images", *size, decode=True)
    assert len(notes) == 1 and all(name in notes[0] for name in [*BAD, "gone.webp"]) and "5 of 8" in notes[0]
    assert table.name.tolist() == NAMES
    for row, name in enumerate(NAMES):
        assert source.read(int(table.source_row[row])) == (spoilt / name).read_bytes()
        assert table.texts(row) == [(spoilt / name).with_suffix(".txt").read_text()]
    for name in [*BAD, "gone.webp"]:
        (spoilt / name).unlink()
    alone = load(spoilt, *size, decode=True)[1]
    for column in ("content", "size", "resized", "name"):
        assert np.array_equal(getattr(table, column), getattr(alone, column))
    assert [table.buckets[where] for where in table.bucket_of] == [alone.buckets[where] for where in alone.bucket_of]
    assert table.time_ids(0, 1) == alone.time_ids(0, 1)
    assert "3 images in 1 bucket" in dataset.describe(table)


def test_without_decoding_only_headers_are_looked_at(spoilt):
    notes = load(spoilt, "--skip_bad_images", decode=False)[2]
    assert "cut.png" not in notes[0] and "4 of 8" in notes[0]


@pytest.mark.parametrize("decode", [False, True])
def test_a_bad_image_is_named_at_every_scan(spoilt, decode):
    notes = [load(spoilt, "--skip_bad_images", decode=decode)[2] for _ in range(3)]
    assert notes[0] and notes[0] == notes[1] == notes[2]


def test_a_mended_image_is_good_again(spoilt):
    load(spoilt, "--skip_bad_images", decode=True)
    for name in BAD:
        (spoilt / name).write_bytes(png(5))
    (spoilt / "gone.webp").unlink()
    assert len(load(spoilt, decode=True)[1]) == 7


def test_nothing_but_bad_images(folder):
    for name in NAMES:
        (folder / name).write_bytes(b"")
    table = load(folder, "--skip_bad_images")[1]
    with pytest.raises(UserError, match="no image"):
        Sampler(table.bucket_of, 0, 4)


# a part of the data

def test_max_train_samples_draws_a_part_by_the_seed(tmp_path):
    folder = make_images(tmp_path / "images", [(16 + number, 40) for number in range(20)])
    whole = load(folder)[1]
    parts = {seed: load(folder, "--max_train_samples=6", seed=seed)[1] for seed in range(4)}
    assert len({tuple(part.source_row.tolist()) for part in parts.values()}) == 4
    for seed, part in parts.items():
        rows = part.source_row.tolist()
        assert len(rows) == 6 and rows == sorted(set(rows))
        assert [part.texts(row) for row in range(6)] == [whole.texts(row) for row in rows]
        assert [part.time_ids(row, 2) for row in range(6)] == [whole.time_ids(row, 2) for row in rows]
        assert load(folder, "--max_train_samples=6", seed=seed)[1].source_row.tolist() == rows
    assert len(load(folder, "--max_train_samples=20")[1]) == len(load(folder, "--max_train_samples=99")[1]) == 20


def test_the_description_counts_what_is_cut_and_enlarged(tmp_path):
    folder = make_images(tmp_path / "images", [(128, 64), (64, 64), (32, 32)])
    line = dataset.describe(load(folder)[1])
    assert line == "3 images in 1 bucket; cropping removes 16.7% of their area; 1 are enlarged to fit"

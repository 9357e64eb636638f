"""The scan of a data set: what it finds, names, remembers and notices, and the table that comes of it."""

import hashlib
import threading
import warnings
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
from files import png, replace_quietly
from hypothesis import given
from hypothesis import strategies as st
from tiny import make_images

import train_sdxl
from library.data import dataset
from library.data import scan as scanning
from library.data.scan import RECORD, scan
from library.data.sources.opening import open_source
from library.data.specs import Fixed, Origin, Spec
from library.errors import UserError

NAMES = ["image000.png", "image001.png", "image002.png"]
PNGS = [png(number, (20 + number, 30 - number)) for number in range(5)]


@pytest.fixture
def folder(tmp_path) -> Path:
    return make_images(tmp_path / "images", [(24, 16)] * 3)


def opened(folder: Path):
    return open_source(Spec("test", Origin("folder", str(folder)), Fixed((64, 64))), folder.parent / "index", False)


def load(folder: Path, *flags: str, seed: int = 0, decode: bool = False) -> dataset.Data:
    """The data of a folder, as the script loads it. A warning is an error."""
    args = train_sdxl.parse_args(["--pretrained_model_name_or_path=x", f"--train_data_dir={folder}", "--resolution=64", *flags])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return dataset.load(args, seed, folder.parent / "index", decode)


def forbid_reading(source):
    def read(row):
        raise AssertionError(f"{source.names[row]} is read again")
    source.read = read
    return source


@pytest.mark.parametrize("decode", [False, True])
def test_the_second_scan_reads_no_image(folder, tmp_path, decode):
    first, faults = scan(opened(folder), tmp_path / "index", decode)
    assert not faults and len(set(first["content"].tolist())) == 3
    assert first[["width", "height"]].tolist() == [(24, 16)] * 3
    second, _ = scan(forbid_reading(opened(folder)), tmp_path / "index", decode)
    assert np.array_equal(first, second)
    (folder / "new.png").write_bytes(png(8, (16, 24)))
    (folder / "new.txt").write_text("a new one")
    source, read = opened(folder), []
    source.read = lambda row: read.append(source.names[row]) or (folder / source.names[row]).read_bytes()
    third, _ = scan(source, tmp_path / "index", decode)
    assert read == ["new.png"] and third[["width", "height"]].tolist()[3] == (16, 24)


def test_pixels_are_looked_at_once_when_they_first_matter(folder, tmp_path):
    scan(opened(folder), tmp_path / "index", decode=False)
    with pytest.raises(AssertionError, match="read again"):
        scan(forbid_reading(opened(folder)), tmp_path / "index", decode=True)
    scan(opened(folder), tmp_path / "index", decode=True)
    for decode in (True, False):
        scan(forbid_reading(opened(folder)), tmp_path / "index", decode)


def test_new_content_under_the_old_size_and_time_is_noticed(folder, tmp_path):
    before, _ = scan(opened(folder), tmp_path / "index", False)
    replace_quietly(folder / NAMES[0], png(7))
    after, _ = scan(opened(folder), tmp_path / "index", False)
    assert (before["content"] != after["content"]).tolist() == [True, False, False]


@pytest.mark.parametrize("spoil", [lambda path: path.write_bytes(b""), lambda path: path.write_bytes(path.read_bytes()[:50]),
                                   lambda path: path.write_bytes(b"no numbers"), Path.unlink,
                                   lambda path: np.save(path, np.zeros(3, [("name", "S32"), ("size", "i8")]))])
def test_a_lost_index_is_made_again(folder, tmp_path, spoil):
    before, _ = scan(opened(folder), tmp_path / "index", False)
    index, = (tmp_path / "index").iterdir()
    spoil(index)
    assert np.array_equal(scan(opened(folder), tmp_path / "index", False)[0], before)
    scan(forbid_reading(opened(folder)), tmp_path / "index", False)


# a source of our own: what the scan asks of it, and when

def status(data: bytes | None, when: int) -> tuple[int, int, int]:
    """Size, mtime and ctime."""
    return len(data or b""), when, when


class Shelf:
    """Images by name in this process. Notes what is read and what is asked for its stamp; None cannot be read."""

    window = None

    def __init__(self, files: dict[str, tuple[bytes | None, int]], place: str = "shelf"):
        self.files, self.place, self.names = files, place, np.array(list(files), np.dtypes.StringDType())
        self.read_rows, self.stamped, self.threads = [], [], set()

    def read(self, row: int) -> bytes:
        self.read_rows.append(row)
        self.threads.add(threading.get_ident())
        if self.files[self.names[row]][0] is None:
            raise OSError(5, "the disk is broken")
        return self.files[self.names[row]][0]

    def stamp(self, row: int) -> tuple[str, int, int, int]:
        self.stamped.append(row)
        return f"/{self.place}/{self.names[row]}", *status(*self.files[self.names[row]])


class Columns(Shelf):
    """One that knows all stamps at once."""

    def stamps(self):
        return tuple(np.array([status(*file) for file in self.files.values()], np.int64).reshape(-1, 3).T)

    def identities(self) -> list[str]:
        return [f"/{self.place}/{name}" for name in self.names.tolist()]


FILES = st.dictionaries(st.text("abc", min_size=1, max_size=2), st.sampled_from([*PNGS, b"no image", None]), max_size=9)


@given(st.lists(FILES, min_size=1, max_size=4), st.sampled_from([Shelf, Columns]), st.booleans())
def test_a_scan_with_a_memory_finds_what_a_first_scan_finds(tmp_path_factory, history, kind, decode):
    index, known, touched, last = tmp_path_factory.mktemp("index"), {}, {}, {}
    for now, contents in enumerate(history):
        touched |= {name: now for name, data in contents.items() if last.get(name, b"") != data}
        last |= contents
        files = {name: (data, touched[name]) for name, data in contents.items()}
        source = kind(files)
        found, faults = scan(source, index, decode)
        data = [files[name][0] for name in source.names]
        assert faults == {row: "the disk is broken" if each is None else "not an image in a known format"
                          for row, each in enumerate(data) if each not in PNGS}
        for row, each in enumerate(data):
            if each in PNGS:
                assert found[["width", "height"]][row].item() == (20 + PNGS.index(each), 30 - PNGS.index(each))
                assert found["content"][row].decode() == hashlib.blake2b(each, digest_size=16).hexdigest()
        assert sorted(source.read_rows) == [row for row, name in enumerate(source.names)
                                            if row in faults or known.get(name) != files[name]]
        assert bool(source.stamped) == bool(kind is Shelf and files)
        known |= {name: files[name] for row, name in enumerate(source.names.tolist()) if row not in faults}


@pytest.mark.parametrize("number", [1, 2, 3])
def test_size_and_both_times_are_what_a_file_is_known_by(tmp_path, number):
    stamp = ["/shelf/a", 10, 20, 30]
    source = Shelf({"a": (PNGS[0], 0)})
    source.stamp = lambda row: tuple(stamp)
    scan(source, tmp_path, False)
    stamp[number] += 1
    scan(source, tmp_path, False)
    assert source.read_rows == [0, 0]


def test_half_a_hash_is_not_the_name(tmp_path, monkeypatch):
    monkeypatch.setattr(scanning, "_hashes", lambda names: np.array([[7] * len(names), [ord(name[-1]) for name in names]], "u8"))
    scan(Shelf({"a": (PNGS[0], 0)}), tmp_path, False)
    other = Shelf({"b": (PNGS[1], 0)})
    other.stamp = lambda row: ("/shelf/b", *status(PNGS[0], 0))
    assert scan(other, tmp_path, False)[0]["width"].tolist() == [21] and other.read_rows == [0]


def test_a_part_of_a_folder_does_not_forget_the_rest(tmp_path):
    files = {str(number): (data, 0) for number, data in enumerate(PNGS)}
    scan(Shelf(files), tmp_path, False)
    scan(Shelf(dict(list(files.items())[:2]) | {"new": (png(9), 0)}), tmp_path, False)
    again = Shelf(files | {"new": (png(9), 0)})
    assert not scan(again, tmp_path, False)[1] and not again.read_rows


def test_the_same_rows_in_the_same_order_are_not_looked_up_by_name(tmp_path, monkeypatch):
    files = {str(number): (data, 0) for number, data in enumerate([*PNGS, b"no image"])}
    looked_up, lookup = [], scanning._hashes
    monkeypatch.setattr(scanning, "_hashes", lambda names: looked_up.append(len(names)) or lookup(names))

    def again(files, only_known=False) -> tuple[list[int], list[int]]:
        source = Columns(files)
        found, faults = scan(source, tmp_path, False, only_known)
        data = [files[name][0] for name in source.names]
        assert list(faults) == [row for row, each in enumerate(data) if each == b"no image"]
        assert all(found["width"][row] == 20 + PNGS.index(each) for row, each in enumerate(data) if each in PNGS)
        names, looked_up[:] = list(looked_up), []
        return source.read_rows, names

    assert again(files) == ([0, 1, 2, 3, 4, 5], [6])
    assert again(files) == ([5], []) and again(files, only_known=True) == ([5], [])
    other = dict(sorted(files.items(), reverse=True))
    assert again(other) == ([0], [6]) and again(other) == ([0], []) and again(files) == ([5], [6])
    assert again(files | {"3": (PNGS[0], 1)}) == ([3, 5], [])
    assert again(dict(list(files.items())[:2])) == ([], [2]) and again(files) == ([3, 5], [6])    # "3" is as it was at first


def test_bytes_in_file_names_that_are_no_text(tmp_path):
    class Odd(Columns):
        def identities(self):
            return [f"/{name}\udcff" for name in self.names.tolist()]
    assert not scan(Odd({"a": (PNGS[0], 0)}), tmp_path, False)[1]
    again = Odd({"a": (PNGS[0], 0)})
    assert scan(again, tmp_path, False)[0]["width"].tolist() == [20] and not again.read_rows


@pytest.mark.parametrize("kind", [Shelf, Columns])
def test_what_is_known_by_name_is_taken_as_it_was(tmp_path, kind):
    old = {str(number): (data, 0) for number, data in enumerate(PNGS)}
    before, _ = scan(Shelf(old), tmp_path, False)
    changed = old | {"0": (PNGS[4], 9), "1": (None, 9), "new": (png(9, (50, 40)), 9)}    # altered, gone, new
    source = kind(changed)
    found, faults = scan(source, tmp_path, False, only_known=True)
    assert not faults and found["width"].tolist() == [*before["width"].tolist(), 50]
    assert source.read_rows == [5] and (kind is Shelf or not source.stamped)
    full = kind(changed)
    found, faults = scan(full, tmp_path, False)    # which has forgotten nothing that a full scan must notice
    assert found["width"].tolist()[0] == 24 and list(faults) == [1] and sorted(full.read_rows) == [0, 1]


def test_a_trusted_index_does_not_say_of_headers_that_the_pixels_are_whole(tmp_path):
    files = {"a": (png(1, (200, 200))[:2000], 0)}
    assert not scan(Columns(files), tmp_path, False)[1]
    assert "truncated" in scan(Columns(files), tmp_path, True, only_known=True)[1][0]


@pytest.mark.parametrize("window", [None, 100])
def test_a_stream_is_read_by_one_thread_from_front_to_back(tmp_path, monkeypatch, window):
    monkeypatch.setattr(scanning, "_PIECE", 2)
    monkeypatch.setattr(scanning, "_THREADS", 4)
    source = Shelf({f"{number:03d}": (PNGS[number % 5], 0) for number in range(300)})
    source.window, barrier = window, threading.Barrier(4)
    if window is None:    # that many read at the same time
        read = source.read
        source.read = lambda row: (row < 8 and row % 2 == 0 and barrier.wait(30), read(row))[1]
    assert not scan(source, tmp_path, False)[1]
    assert sorted(source.read_rows) == list(range(300))
    if window:
        assert source.read_rows == list(range(300)) and len(source.threads) == 1


def test_an_interrupted_scan_keeps_what_it_has_seen(tmp_path, monkeypatch):
    monkeypatch.setattr(scanning, "_PIECE", 4)
    files = {f"{number:03d}": (PNGS[number % 5], 0) for number in range(400)}

    class Interrupted(Shelf):
        def read(self, row):
            if row == 200:
                raise KeyboardInterrupt
            return super().read(row)

    with pytest.raises(KeyboardInterrupt):
        scan(Interrupted(files), tmp_path, False)
    rest = Shelf(files)
    found, faults = scan(rest, tmp_path, False)
    assert not faults and (found["width"] >= 20).all() and (found["content"] != b"").all()
    assert 200 in rest.read_rows and 150 <= len(rest.read_rows) <= 220 and min(rest.read_rows) > 150


def test_processes_share_the_scan(tmp_path, monkeypatch):
    """Three, as threads: each reads its own part once, all find the same, and the next scan reads only what is bad.

    In the third scan the index comes to light when only one of them has looked for it: all are of its opinion, or none.
    """
    own, meeting, given = threading.local(), threading.Barrier(3, timeout=60), {}

    def gather(values):
        given[own.rank] = values
        meeting.wait()
        joined = list(chain(*(given[rank] for rank in range(3))))
        meeting.wait()
        return joined

    monkeypatch.setattr(scanning.processes, "rank", lambda: own.rank)
    monkeypatch.setattr(scanning.processes, "world", lambda: 3)
    monkeypatch.setattr(scanning.processes, "gather", gather)
    files = {f"{number:03d}": (PNGS[number % 5] if number % 40 else b"", 0) for number in range(200)}

    def run_all():
        sources, ends = [Shelf(files) for _ in range(3)], [None] * 3

        def run(rank):
            own.rank = rank
            ends[rank] = scan(sources[rank], tmp_path, False)
        threads = [threading.Thread(target=run, args=[rank]) for rank in range(3)]
        [thread.start() for thread in threads]
        [thread.join() for thread in threads]
        assert all(np.array_equal(found, ends[0][0]) and faults == ends[0][1] for found, faults in ends)
        return [source.read_rows for source in sources], *ends[0]

    rows, found, faults = run_all()
    assert sorted(chain(*rows)) == list(range(200)) and all(len(part) in (66, 67) for part in rows)
    assert faults == {row: "the file is empty" for row in range(0, 200, 40)}
    again, second, _ = run_all()
    assert sorted(chain(*again)) == sorted(faults) and np.array_equal(second, found)
    load = scanning._load
    monkeypatch.setattr(scanning, "_load", lambda path: load(path if own.rank == 1 else path.with_name("none")))
    third, found, faults = run_all()
    assert sorted(chain(*third)) == list(range(200)) and np.array_equal(second, found)


def test_an_index_shared_read_only_is_used_and_not_written(tmp_path, monkeypatch):
    files = {str(number): (data, 0) for number, data in enumerate(PNGS)}
    scan(Shelf(files), tmp_path, False)

    def refuse(path, data):
        raise PermissionError(13, "Permission denied", str(path))
    monkeypatch.setattr(scanning, "write_whole", refuse)
    source = Shelf(files | {"new": (png(9), 0)})
    assert not scan(source, tmp_path, False)[1] and source.read_rows == [5]


def test_a_row_of_the_index_is_small():
    assert RECORD.itemsize <= 100    # bytes: a hundred megabytes a million images


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
    data = load(spoilt, "--skip_bad_images", *size, decode=True)
    table, notes = data.table, data.notes
    assert len(notes) == 1 and all(name in notes[0] for name in [*BAD, "gone.webp"]) and "5 of 8" in notes[0]
    assert sorted(each.name for each in data.dropped) == sorted([*BAD, "gone.webp"])
    assert all(REASONS.get(each.name, "No such file") in each.reason for each in data.dropped)
    assert table.name.tolist() == NAMES
    for row, name in enumerate(NAMES):
        assert data.read(row) == (spoilt / name).read_bytes()
        assert table.texts(row) == [(spoilt / name).with_suffix(".txt").read_text()]
    for name in [*BAD, "gone.webp"]:
        (spoilt / name).unlink()
    alone = load(spoilt, *size, decode=True).table
    for column in ("content", "size", "resized", "name"):
        assert np.array_equal(getattr(table, column), getattr(alone, column))
    assert [table.buckets[where] for where in table.bucket_of] == [alone.buckets[where] for where in alone.bucket_of]
    assert table.time_ids(0, 1) == alone.time_ids(0, 1)
    assert "3 images in 1 bucket" in dataset.describe_table(table, 1)


def test_without_decoding_only_headers_are_looked_at(spoilt):
    notes = load(spoilt, "--skip_bad_images", decode=False).notes
    assert "cut.png" not in notes[0] and "4 of 8" in notes[0]


@pytest.mark.parametrize("decode", [False, True])
def test_a_bad_image_is_named_at_every_scan(spoilt, decode):
    notes = [load(spoilt, "--skip_bad_images", decode=decode).notes for _ in range(3)]
    assert notes[0] and notes[0] == notes[1] == notes[2]


def test_a_mended_image_is_good_again(spoilt):
    load(spoilt, "--skip_bad_images", decode=True)
    for name in BAD:
        (spoilt / name).write_bytes(png(5))
    (spoilt / "gone.webp").unlink()
    assert len(load(spoilt, decode=True).table) == 7


def test_nothing_but_bad_images(folder):
    for name in NAMES:
        (folder / name).write_bytes(b"")
    with pytest.raises(UserError, match=f"there is no image to train on in {folder}: 3 the file is empty"):
        load(folder, "--skip_bad_images")


# a part of the data

def test_max_train_samples_draws_a_part_by_the_seed(tmp_path):
    folder = make_images(tmp_path / "images", [(16 + number, 40) for number in range(20)])
    whole = load(folder).table
    parts = {seed: load(folder, "--max_train_samples=6", seed=seed).table for seed in range(4)}
    assert len({tuple(part.source_row.tolist()) for part in parts.values()}) == 4
    for seed, part in parts.items():
        rows = part.source_row.tolist()
        assert len(rows) == 6 and rows == sorted(set(rows))
        assert [part.texts(row) for row in range(6)] == [whole.texts(row) for row in rows]
        assert [part.time_ids(row, 2) for row in range(6)] == [whole.time_ids(row, 2) for row in rows]
        assert load(folder, "--max_train_samples=6", seed=seed).table.source_row.tolist() == rows
    assert len(load(folder, "--max_train_samples=20").table) == len(load(folder, "--max_train_samples=99").table) == 20


def test_the_description_counts_what_is_cut_and_enlarged(tmp_path):
    folder = make_images(tmp_path / "images", [(128, 64), (64, 64), (32, 32)])
    line = dataset.describe_table(load(folder, "--train_batch_size=2").table, 3)
    start = "3 images in 1 bucket; cropping removes 16.7% of their area; 1 are enlarged to fit"
    assert line == f"{start}; 1 bucket with fewer images than a step takes: some come more than once; 6 a step"
    assert dataset.describe_table(load(folder, "--train_batch_size=1").table, 3) == f"{start}; 3 a step"    # as many as there are

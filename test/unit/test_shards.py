"""Tars of images: what is a row, what is not and why, and the index that is read instead of the tars."""

import functools
import io
import json
import multiprocessing
import os
import pickle
import string
import subprocess
import sys
import tarfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import webdataset
from files import png, replace_quietly
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from library.data.sources import shards
from library.data.sources.opening import open_source
from library.data.specs import Fixed, Origin, Spec
from library.errors import UserError

REPOSITORY = Path(__file__).resolve().parents[2]
SAMPLES = {f"{n:09d}": (png(n), f"caption {n}") for n in range(6)}


def write_tar(path: Path, members, format=tarfile.PAX_FORMAT) -> None:
    """members: (name, bytes), or TarInfo for what is no plain file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=format) as tar:
        for member in members:
            info = member if isinstance(member, tarfile.TarInfo) else tarfile.TarInfo(member[0])
            if not isinstance(member, tarfile.TarInfo):
                info.size = len(member[1])
            tar.addfile(info, None if isinstance(member, tarfile.TarInfo) else io.BytesIO(member[1]))


def laion(keys) -> list[tuple[str, bytes]]:
    """The members that img2dataset writes."""
    return [member for key in keys for member in (
        (f"{key}.jpg", SAMPLES[key][0]), (f"{key}.txt", SAMPLES[key][1].encode()),
        (f"{key}.json", json.dumps({"caption": f"json {SAMPLES[key][1]}", "key": key, "width": 1, "height": 1}).encode()))]


@pytest.fixture
def tars(tmp_path) -> Path:
    """The layout of LAION: tars, .parquet and _stats.json beside them."""
    for number in range(2):
        write_tar(tmp_path / f"tars/{number:05d}.tar", laion(list(SAMPLES)[number * 3:number * 3 + 3]))
        for beside in (f"{number:05d}.parquet", f"{number:05d}_stats.json"):
            (tmp_path / "tars" / beside).write_bytes(b"{}")
    return tmp_path / "tars"


def opened(path, skip_bad: bool = False, **options):
    origin = Origin("shards", str(path), **{"captions": "auto", **options})
    return open_source(Spec("set", origin, Fixed((64, 64))), Path(f"{path}.index"), skip_bad)


def rows_of(source) -> dict[str, tuple[bytes, list[str]]]:
    bounds = source.text_start.tolist()
    assert len(bounds) == len(source.names) + 1 and len(source.texts) == bounds[-1]
    return {str(name): (source.read(row), source.texts[bounds[row]:bounds[row + 1]].tolist())
            for row, name in enumerate(source.names)}


def refused(call, *words: str) -> None:
    with pytest.raises(UserError) as error:
        call()
    for word in words:
        assert word in str(error.value), f"{word!r} is not in {error.value}"


def test_laion(tars):
    source = opened(tars)
    assert rows_of(source) == {f"{number // 3:05d}.tar/{key}.jpg": (data, [f"json {text}"])
                               for number, (key, (data, text)) in enumerate(SAMPLES.items())}
    assert source.notes == source.left_out == [] and source.window is None and source.place == str(tars)
    assert source.names.dtype == source.texts.dtype == np.dtypes.StringDType() and source.text_start.dtype == np.int64
    single = opened(tars / "00001.tar")
    assert rows_of(single) == {name: row for name, row in rows_of(source).items() if name.startswith("00001")}
    nested = opened(tars.parent)
    assert nested.names.tolist() == [f"tars/{name}" for name in source.names.tolist()]


def test_as_webdataset_groups_and_reads_them(tmp_path):
    draw = np.random.default_rng(0)
    members = []
    for number in draw.permutation(40).tolist():
        folder = ["", "a/", "a/b.c/", "./d/"][number % 4]
        members += [(f"{folder}{number:04d}.{kind}", f"{kind} {number}".encode()) for kind in draw.permutation(
            ["jpg", "txt", "cls", "seg.png", "more.txt"]).tolist()]
    write_tar(tmp_path / "t/x.tar", members)
    theirs = {each["__key__"].removeprefix("./"): (each["jpg"], [each["txt"].decode()])
              for each in webdataset.WebDataset(str(tmp_path / "t/x.tar"), shardshuffle=False, empty_check=False)}
    source = opened(tmp_path / "t")
    assert {name.removeprefix("x.tar/").removesuffix(".jpg"): row for name, row in rows_of(source).items()} == theirs
    assert len(source.notes) == 1 and "40 members" in source.notes[0] and "seg.png and 35 more" in source.notes[0]


@pytest.mark.parametrize("options, expected", [
    ({}, "j"), ({"captions": "textfile"}, "t"), ({"captions": "filename"}, "one two"), ({"caption_column": "other"}, "o"),
    ({"captions": "column", "caption_column": "none", "fallback_column": "other"}, "o"),
    ({"captions": "column", "caption_column": "none"}, "t"), ({"captions": "phrase", "phrases": ("p", "q")}, ["p", "q"]),
    ({"caption_column": "several"}, ["a", "b"]),
    ({"captions": "textfile", "lines": "each", "extensions": (".tags",)}, ["x", "y"]),
    ({"captions": "textfile", "extensions": (".none",), "phrases": ("dog",)}, "dog")], ids=str)
def test_captions(tmp_path, options, expected):
    values = {"caption": "j", "other": "o", "text": None, "several": ["a", "b"]}
    write_tar(tmp_path / "t/0.tar", [("one_two.png", png(1)), ("one_two.json", json.dumps(values).encode()),
                                     ("one_two.txt", "\ufefft\r\n".encode()), ("one_two.tags", b"x\n\ny\n")])
    assert rows_of(opened(tmp_path / "t", **options)) == {
        "0.tar/one_two.png": (png(1), expected if isinstance(expected, list) else [expected])}


@pytest.mark.parametrize("name, data, reason", [
    ("bad.json", b"{", "not valid JSON"), ("bad.json", b"[" * 100_000, "not valid JSON"), ("bad.json", b"[1]", "not an object"),
    ("bad.json", b'{"caption": 3}', "neither text"), ("bad.json", b'{"caption": "\\ud800"}', "surrogate"),
    ("bad.txt", b"H\xfcnd", "not UTF-8 (byte 1)"), ("other.txt", b"x", "without a caption")], ids=range(7))
def test_a_caption_that_cannot_be_read_is_named(tmp_path, name, data, reason):
    write_tar(tmp_path / "t/0.tar", [("bad.jpg", png(1)), (name, data), *laion(["000000000"])])
    refused(lambda: opened(tmp_path / "t"), "1 of 2", "0.tar/bad.jpg", reason, "--skip_bad_images")
    source = opened(tmp_path / "t", skip_bad=True)
    assert source.names.tolist() == ["0.tar/000000000.jpg"] and len(source.left_out) == 1
    assert source.left_out[0][0] == "0.tar/bad.jpg" and reason in source.left_out[0][1]


def special(name: str, kind: bytes, target: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


def test_what_a_tar_may_not_do(tmp_path):
    (tmp_path / "secret.jpg").write_bytes(png(9))
    bad = {"../out.jpg": "leads out", "/abs.jpg": "leads out", "a/../../b.jpg": "leads out", "link.jpg": "links",
           "hard.jpg": "links", "pipe.jpg": "no plain files", "dev.jpg": "no plain files", "twice.jpg": "twice"}
    write_tar(tmp_path / "t/0.tar", [
        *laion(["000000000"]), ("../out.jpg", png(1)), ("../out.txt", b"x"), ("/abs.jpg", png(1)), ("a/../../b.jpg", png(1)),
        special("link.jpg", tarfile.SYMTYPE, str(tmp_path / "secret.jpg")), special("hard.jpg", tarfile.LNKTYPE, "000000000.jpg"),
        special("pipe.jpg", tarfile.FIFOTYPE), special("dev.jpg", tarfile.CHRTYPE), special("folder.jpg", tarfile.DIRTYPE),
        ("twice.jpg", png(2)), ("twice.txt", b"x"), ("twice.jpg", png(3)), (".hidden.jpg", png(1)), ("x/._y.jpg", png(1))])
    before = sorted(tmp_path.rglob("*"))
    refused(lambda: opened(tmp_path / "t"), *bad, *bad.values())
    source = opened(tmp_path / "t", skip_bad=True)
    assert rows_of(source).keys() == {"0.tar/000000000.jpg"}
    assert {name: word for name, word in source.left_out if "txt" not in name}.keys() == {f"0.tar/{name}" for name in bad}
    assert [path for path in sorted(tmp_path.rglob("*")) if ".index" not in str(path)] == before


def test_names_of_all_kinds(tmp_path):
    names = ["ein Hünd.jpg", "emoji 😀.png", "new\nline.webp", "x" * 200 + ".jpg", "a/b c/d.JPG", "./dot/e.jpg", "half 1.5.jpg"]
    for number, format in enumerate((tarfile.PAX_FORMAT, tarfile.GNU_FORMAT)):
        write_tar(tmp_path / f"t/ü {number}.tar", [member for row, name in enumerate(names) for member in (
            (name, png(row)), (os.path.splitext(name)[0] + ".txt", f"text {row}".encode()))], format)
    with tarfile.open(tmp_path / "t/z.tar", "w", errors="surrogateescape", format=tarfile.GNU_FORMAT) as tar:
        tar.addfile(tarfile.TarInfo("\udcff.jpg"))
    refused(lambda: opened(tmp_path / "t"), "\\udcff.jpg", "not UTF-8")
    source = opened(tmp_path / "t", skip_bad=True)
    assert rows_of(source) == {f"ü {number}.tar/{name.removeprefix('./')}": (png(row), [f"text {row}"])
                               for number in range(2) for row, name in enumerate(names)}


def test_members_that_belong_to_no_image(tmp_path):
    write_tar(tmp_path / "t/0.tar", [*laion(["000000000"]), ("train-0001.txt", b"x"), ("000000000.png", png(3))])
    source = opened(tmp_path / "t")
    assert rows_of(source)["0.tar/000000000.png"] == (png(3), ["json caption 0"])
    assert "1 members" in source.notes[0] and "0.tar/train-0001.txt" in source.notes[0]
    assert "1 images" in source.notes[1] and "share" in source.notes[1] and "000000000.png" in source.notes[1]


def test_a_second_image_of_a_sample_is_a_row_if_it_has_a_caption_of_its_own(tmp_path):
    write_tar(tmp_path / "t/0.tar", [(name, png(1)) for name in ("a.jpg", "a.seg.png", "a.b.png", "b.x.png")]
              + [(name, name.encode()) for name in ("a.b.txt", "a.txt", "b.txt")])
    source = opened(tmp_path / "t")
    assert {name: texts for name, (_, texts) in rows_of(source).items()} == {
        "0.tar/a.jpg": ["a.txt"], "0.tar/a.b.png": ["a.b.txt"], "0.tar/b.x.png": ["b.txt"]}
    assert len(source.notes) == 1 and "a.seg.png" in source.notes[0]
    write_tar(tmp_path / "t/0.tar", [("a.jpg", png(1)), ("a.seg.png", png(2))])
    assert opened(tmp_path / "t", captions="phrase", phrases=("x",)).names.tolist() == ["0.tar/a.jpg"]


@pytest.mark.parametrize("share", np.linspace(0, 1, 24, endpoint=False))
def test_a_tar_that_is_cut_off(tars, share):
    whole = rows_of(opened(tars))
    data = (tars / "00001.tar").read_bytes()
    end = data.rindex(b"}") // 512 * 512 + 512    # behind it are zeros alone
    (tars / "00001.tar").write_bytes(data[:int(end * share)])
    refused(lambda: opened(tars), "00001.tar", "cut off")
    source = opened(tars, skip_bad=True)
    found = rows_of(source)
    assert found.items() <= whole.items() and list(found)[:3] == list(whole)[:3]
    # samples of one size; of the last one before the cut it is not known whether it is whole
    assert len(found) == 3 + max(0, (int(end * share) - 512) // (end // 3))
    assert any(name.startswith("00001.tar") and "cut off" in reason for name, reason in source.left_out)


@pytest.mark.parametrize("spoil, reason", [
    (lambda data: b"no tar at all" * 100, "cut off or damaged"), (lambda data: data[:512] + b"\xff" * 512 + data[1024:], None),
    (lambda data: data + data, "followed by another tar"), (lambda data: data.rstrip(b"\0") + bytes(512), "cut off at byte")])
def test_a_damaged_tar(tars, spoil, reason):
    path = tars / "00001.tar"
    data = path.read_bytes()
    path.write_bytes(spoil(data))
    if reason is None:    # pixels that are altered: the matter of whoever decodes them
        assert len(opened(tars).names) == 6
        return
    refused(lambda: opened(tars), "00001.tar", reason)
    assert len(opened(tars, skip_bad=True).names) >= 3


@pytest.mark.parametrize("mode, name", [("gz", "0.tar.gz"), ("bz2", "0.tar"), ("xz", "0.tar"), ("gz", "0.tar"), ("gz", "0.tgz")])
def test_compressed_tars_are_refused(tars, mode, name):
    with tarfile.open(tars / name, f"w:{mode}") as tar:
        tar.add(tars / "00000.tar", "x")
    refused(lambda: opened(tars), name, "unpack", "--skip_bad_images")
    source = opened(tars, skip_bad=True)
    assert len(source.names) == 6 and [left for left, _ in source.left_out] == [name]


def test_nothing_to_read(tmp_path):
    refused(lambda: opened(tmp_path / "none", flag="set.json, a"), "set.json, a", "none")
    (tmp_path / "t").mkdir()
    refused(lambda: opened(tmp_path / "t"), "holds no .tar")
    write_tar(tmp_path / "t/0.tar", [("a.txt", b"x")])
    refused(lambda: opened(tmp_path / "t"), "no image", ".png")
    refused(lambda: opened(tmp_path / "t", captions="table", table="x.csv"), ".json and .txt")


# the index

def forbid(monkeypatch, *allowed: str) -> list[str]:
    """Reading a tar from front to back fails, but for those `allowed`; the list of those that were."""
    read, real = [], shards.read_tar

    def read_tar(path, origin):
        assert os.path.basename(path) in allowed, f"{path} is read again"
        read.append(os.path.basename(path))
        return real(path, origin)
    monkeypatch.setattr(shards, "read_tar", read_tar)
    return read


def test_unchanged_tars_are_not_read_again(tars, monkeypatch):
    first = opened(tars)
    expected, stamps = rows_of(first), [first.stamp(row) for row in range(6)]
    read = forbid(monkeypatch, "00001.tar")
    again = opened(tars)
    assert rows_of(again) == expected and [again.stamp(row) for row in range(6)] == stamps and not read
    replace_quietly(tars / "00001.tar", (tars / "00001.tar").read_bytes().replace(b"json caption 4", b"JSON caption 4"))
    changed = opened(tars)
    assert read == ["00001.tar"] and rows_of(changed)["00001.tar/000000004.jpg"][1] == ["JSON caption 4"]
    assert [changed.stamp(row) == stamps[row] for row in range(6)] == [True] * 3 + [False] * 3
    with pytest.raises(AssertionError, match="00000.tar is read again"):
        opened(tars, captions="textfile")    # the same tars with other captions


@pytest.mark.parametrize("spoil", [lambda data: data[:len(data) // 2], lambda data: b"", lambda data: data[:-30] + bytes(30),
                                   lambda data: data.replace(b"caption 0", b"caption X")])
def test_a_damaged_index_is_made_anew(tars, monkeypatch, spoil):
    expected = rows_of(opened(tars))
    files = sorted(Path(f"{tars}.index").glob("tar-*.npz"))
    assert len(files) == 2 and [path.suffix for path in Path(f"{tars}.index").iterdir()] == [".npz"] * 2
    for path in files:
        path.write_bytes(spoil(path.read_bytes()))
    assert rows_of(opened(tars)) == expected


def test_an_index_that_cannot_be_written_is_made_each_time(tars, monkeypatch):
    expected = rows_of(opened(tars))
    for path in Path(f"{tars}.index").iterdir():
        path.unlink()

    def write(path, content):
        raise PermissionError(13, "Permission denied", str(path))
    monkeypatch.setattr(shards, "write_whole", write)
    read = forbid(monkeypatch, "00000.tar", "00001.tar")
    assert rows_of(opened(tars)) == expected and read == ["00000.tar", "00001.tar"]


def test_stamps_of_all_rows_are_those_of_each(tars):
    source = opened(tars)
    stamps = [(name, *map(int, each)) for name, *each in zip(source.identities(), *source.stamps(), strict=True)]
    assert stamps == [source.stamp(row) for row in range(6)] and len(set(stamps)) == 6
    assert stamps[4][:2] == (f"{tars}/00001.tar!000000004.jpg", len(png(4)))


def test_many_readers(tars, monkeypatch):
    source, open_before = opened(tars), len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
    monkeypatch.setattr(shards, "_open", functools.lru_cache(1)(shards._open.__wrapped__))    # opened and closed all the time
    rows = np.random.default_rng(0).integers(0, 6, 4000).tolist()
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(source.read, rows)) == [png(row) for row in rows]
    copied = pickle.loads(pickle.dumps(source))
    assert [copied.read(row) for row in range(6)] == [png(row) for row in range(6)]
    with multiprocessing.get_context("fork").Pool(2) as pool:    # with the open files of this process
        assert pool.map(source.read, rows[:200]) == [png(row) for row in rows[:200]]
    assert not os.path.isdir("/proc/self/fd") or len(os.listdir("/proc/self/fd")) < open_before + 20


def test_a_tar_that_changes_while_it_is_used(tars):
    source = opened(tars)
    (tars / "00000.tar").write_bytes(b"")
    with pytest.raises(OSError, match="changed after it was indexed"):
        source.read(0)


TWO = """
import json, sys
import torch.distributed as dist
from pathlib import Path
from library.data.sources import shards
from library.data.sources.opening import open_source
from library.data.specs import Fixed, Origin, Spec
rank, place, index = int(sys.argv[1]), sys.argv[2], Path(sys.argv[3])
dist.init_process_group("gloo", init_method=f"file://{sys.argv[4]}", rank=rank, world_size=2)
read, real = [], shards.read_tar
shards.read_tar = lambda path, origin: read.append(path[-9:]) or real(path, origin)
source = open_source(Spec("set", Origin("shards", place), Fixed((64, 64))), index, False)
print(json.dumps([read, source.names.tolist(), source.texts.tolist()]))
dist.barrier()
"""


@pytest.mark.parametrize("shared", [True, False])
def test_two_processes_share_the_indexing(tars, tmp_path, shared):
    runs = [subprocess.Popen(
        [sys.executable, "-c", TWO, str(rank), tars, tmp_path / f"index{0 if shared else rank}", tmp_path / "meet"],
        cwd=REPOSITORY, stdout=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}) for rank in range(2)]
    found = [json.loads(run.communicate(timeout=120)[0]) for run in runs]
    source = opened(tars)
    assert all(each[1:] == [source.names.tolist(), source.texts.tolist()] for each in found)
    own, all_of_them = [["00000.tar"], ["00001.tar"]], ["00000.tar", "00001.tar"]
    assert [each[0] for each in found] == own if shared else all(sorted(each[0]) == all_of_them for each in found)


# the same images in tars as in a folder

letters = st.text(string.ascii_letters + string.digits + " _-äß犬😀.()", min_size=1, max_size=12).filter(
    lambda name: not name.startswith(".") and not name.endswith((".", " ")))
images = st.dictionaries(
    st.tuples(st.sampled_from(["", "a/", "a/b.c/", "ü x/"]), letters, st.sampled_from([".jpg", ".PNG", ".webp"])).map("".join),
    st.tuples(st.binary(max_size=2000), st.text(st.characters(codec="utf-8"), max_size=50)), min_size=1, max_size=12)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(images, st.integers(1, 3), st.sampled_from([tarfile.PAX_FORMAT, tarfile.GNU_FORMAT]), st.randoms(use_true_random=False))
def test_any_folder_packed_into_tars_is_the_same(tmp_path_factory, images, number, format, random):
    root = tmp_path_factory.mktemp("any")
    files = {}
    for name, (data, text) in images.items():
        files |= {name: data, os.path.splitext(name)[0] + ".txt": text.encode()}
    for name, data in files.items():
        (root / "folder" / name).parent.mkdir(parents=True, exist_ok=True)
        (root / "folder" / name).write_bytes(data)
    order = sorted(files)
    random.shuffle(order)    # members of a sample need not lie beside each other
    tar_of = {stem: random.randrange(number) for stem in sorted({os.path.splitext(name)[0] for name in files})}
    for tar in range(number):
        write_tar(root / f"tars/{tar}.tar",
                  [(name, files[name]) for name in order if tar_of[os.path.splitext(name)[0]] == tar], format)
    plain = open_source(Spec("set", Origin("folder", str(root / "folder")), Fixed((64, 64))), root / "index", False)
    packed = opened(root / "tars")
    assert {name.split("/", 1)[1]: row for name, row in rows_of(packed).items()} == rows_of(plain)

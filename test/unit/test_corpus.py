"""Bad and unusual input, each file alone and all together: a named error, a named skip, or the right pixels."""

import os
import re
import shutil
import warnings
from pathlib import Path

import corpus
import numpy as np
import pytest

import train_sdxl
from library.data import dataset
from library.data.images import BadImage, read_pixels, read_size
from library.data.scan import name_faults, scan
from library.data.sources.opening import open_source
from library.data.specs import Fixed, Origin, Spec
from library.errors import UserError

pytestmark = pytest.mark.timeout(120)    # nothing hangs
IMAGES, CAPTIONS, TARS = corpus.images(), corpus.captions(), corpus.tars()
MIB = 2**20


@pytest.fixture(scope="session")
def made(tmp_path_factory):
    """(folder of the corpus, what is to come of each file)."""
    folder = tmp_path_factory.mktemp("corpus")
    return folder, corpus.make(folder)


@pytest.fixture(autouse=True)
def no_file_is_touched(made):
    def snapshot():
        return sorted((str(path), path.lstat().st_size, path.lstat().st_mtime_ns) for path in made[0].rglob("*"))
    before = snapshot()
    yield
    assert snapshot() == before


def opened(kind: str, path: Path, index: Path, skip_bad: bool = True, **options):
    return open_source(Spec("set", Origin(kind, str(path), **options), Fixed((64, 64))), index, skip_bad)


def left_out(source, index: Path) -> dict[str, str]:
    """Reason by name of everything that is not to be trained on; all of it is told to the user."""
    faults = scan(source, index, decode=True)[1]
    found = dict(source.left_out) | {str(source.names[row]): why for row, why in faults.items()}
    told = "\n".join(filter(None, [*source.notes, name_faults(faults, source, skip=True)]))
    assert all(name in told for name in found), told
    return found


def alone(folder: Path, name: str, target: Path) -> Path:
    """A folder with only this entry, and its caption."""
    target.mkdir()
    shutil.copy2(folder / name, target / name, follow_symlinks=False)
    if (caption := (folder / name).with_suffix(".txt")).exists():
        shutil.copy2(caption, target / caption.name)
    return target


@pytest.mark.parametrize("name", IMAGES, ids=ascii)
def test_an_image_alone(made, tmp_path, name):
    data, case = IMAGES[name]
    source = opened("folder", alone(made[0] / "images", name, tmp_path / "one"), tmp_path / "index")
    assert source.names.tolist() == [name] and source.texts.tolist() == [f"a picture called {Path(name).stem}".strip()]
    assert source.read(0) == data
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        bad = left_out(source, tmp_path / "index")
        if case.fault:
            assert list(bad) == [name] and re.search(case.fault, bad[name])
            with pytest.raises(BadImage, match=re.escape(bad[name])):
                read_pixels(data, (64, 64), "lanczos")
            return
        height, width = case.pixels.shape[:2]
        assert not bad and read_size(data) == (width, height)
        pixels = np.asarray(read_pixels(data, (width, height), "lanczos"), float)
    assert np.abs(pixels - case.pixels).mean() <= case.tolerance


@pytest.mark.parametrize("name", ["gone.jpg", "itself.jpg", "pipe.jpg", "locked.png"])
def test_an_odd_entry_alone(made, tmp_path, name):
    folder, cases = made
    case, target = cases[f"images/{name}"], tmp_path / "one"
    if name == "pipe.jpg":    # opening it would wait for ever
        target.mkdir()
        os.mkfifo(target / name)
        (target / "pipe.txt").write_text("a pipe")
    elif name == "locked.png":    # copying it would need the right to read it
        target.mkdir()
        (target / name).hardlink_to(folder / "images" / name)
    else:
        alone(folder / "images", name, target)
    corpus.scene(1).save(target / "good.png")
    (target / "good.txt").write_text("a good one")
    (target / "locked.txt").write_text("a locked one")
    source = opened("folder", target, tmp_path / "index")
    bad = left_out(source, tmp_path / "index")
    assert "good.png" in source.names and "good.png" not in bad
    assert (name in bad) == bool(case.fault) and re.search(case.fault or "", bad.get(name, ""))


def test_a_link_in_a_circle_is_followed_once_and_noted(made, tmp_path):
    source = opened("folder", made[0] / "images", tmp_path / "index")
    assert not [name for name in source.names if name.startswith("round/")]
    assert any("round" in note and re.search(made[1]["images/round"].note, note) for note in source.notes)


@pytest.mark.parametrize("stem", CAPTIONS)
def test_a_caption_alone(made, tmp_path, stem):
    case = CAPTIONS[stem][1]
    source = opened("folder", alone(made[0] / "captions", f"{stem}.png", tmp_path / "one"), tmp_path / "index")
    if case.fault:
        assert not len(source.names)
        (name, reason), = source.left_out
        assert name == f"{stem}.png" and re.search(case.fault, reason) and any(reason in note for note in source.notes)
    else:
        assert source.texts.tolist() == [case.caption] and not source.left_out
    if stem == "long":
        assert len(case.caption) > MIB


@pytest.mark.parametrize("name", TARS)
def test_a_tar_alone(made, tmp_path, name):
    case = TARS[name][1]
    def look(skip_bad):
        return opened("shards", made[0] / "tars" / name, tmp_path / "index", skip_bad, captions="column")

    def fault(skip_bad) -> str:
        with pytest.raises(UserError) as error:
            left_out(look(skip_bad), tmp_path / "index")
        return str(error.value)

    if case.note:
        assert re.search(case.note, fault(True)) and re.search(case.note, fault(False))
        return
    source = look(True)
    assert source.names.tolist() == [f"{name}/{row}" for row in case.rows]
    bad = left_out(source, tmp_path / "index")
    assert bool(bad) == bool(case.fault)
    assert not bad or all(re.search(case.fault, f"{what} {why}") for what, why in bad.items())
    for row, member in enumerate(case.rows[:3]):
        number = int(member[:5])
        assert source.texts[row] == f"number {number}"
        assert np.array_equal(read_pixels(source.read(row), (24, 16), "lanczos"), corpus.scene(number, 24, 16))
    if case.fault and name != "a bad image.tar":    # that is for the scan to find
        assert name in fault(False) and re.search(case.fault, fault(False))
    assert {path.name for path in tmp_path.iterdir()} <= {"index"} and not (tmp_path.parent / "outside.png").exists()


def test_a_table_without_captions(made, tmp_path):
    (name, case), = [(name, case) for name, case in made[1].items() if name.startswith("tables/")]
    with pytest.raises(UserError) as error:
        opened("dataset", made[0] / name, tmp_path / "index", captions="column", caption_column="text")
    assert re.search(case.fault, str(error.value)) and name in str(error.value)


def load(folder: Path, index: Path, *flags: str) -> dataset.Data:
    args = train_sdxl.parse_args(["--pretrained_model_name_or_path=x", f"--train_data_dir={folder}", "--resolution=64", *flags])
    return dataset.load(args, 0, index, decode=True)


@pytest.mark.parametrize("part, flags", [("images", []), ("images", ["--enable_bucket", "--bucket_no_upscale"]),
                                         ("captions", []), ("tars", [])])
def test_all_of_it_together(made, tmp_path, part, flags):
    """Every file is trained on or named with its reason; without --skip_bad_images nothing is, and the first are named."""
    folder, cases = made
    cases = {name.partition("/")[2]: case for name, case in cases.items() if name.startswith(f"{part}/")}
    data = load(folder / part, tmp_path / "index", "--skip_bad_images", *flags)
    good = set(data.table.name.tolist())
    dropped = {each.name: each.reason for each in data.dropped}
    assert not good & dropped.keys() and len(good) == len(data.table)
    said = "\n".join(data.notes)
    with pytest.raises(UserError) as error:
        load(folder / part, tmp_path / "index", *flags)
    for name, case in cases.items():
        if case.note:
            assert name in said
        elif part == "tars":
            assert {row for row in good if row.startswith(f"{name}/")} == {
                f"{name}/{row}" for row in case.rows if not row.startswith("00003")}
            about = [f"{what} {why}" for what, why in dropped.items() if what.startswith(name)]
            assert bool(about) == bool(case.fault) and all(re.search(case.fault, each) for each in about)
        else:
            assert (name in good) != (name in dropped)
            assert (name in dropped) == bool(case.fault) and re.search(case.fault or "", dropped.get(name, ""))
    assert all(name in said for name in dropped)
    # sources name what they cannot take before anything is scanned: then the scan names the rest
    first = [name for name, why in dropped.items() if why in str(error.value)]
    assert first and all(name in str(error.value) for name in first)

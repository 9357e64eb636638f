"""Where images and captions come from, and what is said when they are not as they should be."""

import json
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from files import png, replace_quietly

from library.data.sources import DataSet, Folder
from library.errors import UserError

NAMES = ["a.png", "b/c.png", "b/d e.png"]


@pytest.fixture
def folder(tmp_path) -> Path:
    """Three pictures, one of them in the root."""
    for number, name in enumerate(NAMES):
        (tmp_path / "images" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "images" / name).write_bytes(png(number))
    return tmp_path / "images"


def captions_of(source) -> dict[str, list[str]]:
    return dict(zip(source.names.tolist(), source.captions, strict=True))


def write_captions(folder: Path, extension: str = ".txt", names=NAMES) -> None:
    for name in names:
        (folder / name).with_suffix(extension).write_text(f"text of {name}\n", encoding="utf-8")


def refused(call, *words: str) -> None:
    """The call is refused, in one message with all the words."""
    with pytest.raises(UserError) as error:
        call()
    for word in words:
        assert word in str(error.value), f"{word!r} is not in {error.value}"


# a folder

@pytest.mark.parametrize("extension", [".txt", ".caption"])
def test_text_files_beside_the_images(folder, extension):
    write_captions(folder, extension)
    source = Folder(str(folder))
    assert captions_of(source) == {name: [f"text of {name}"] for name in NAMES}
    assert [source.read(row) for row in range(3)] == [png(number) for number in range(3)]
    assert source.notes == []


def test_txt_goes_before_caption_and_the_flag_before_both(folder):
    write_captions(folder, ".txt")
    for extension in (".caption", ".tags"):
        (folder / "a").with_suffix(extension).write_text(extension)
    assert captions_of(Folder(str(folder)))["a.png"] == ["text of a.png"]
    for extension in (".tags", "tags", ".caption"):
        refused(lambda extension=extension: Folder(str(folder), caption_extension=extension), "b/c.png")
        kept = Folder(str(folder), caption_extension=extension, skip_bad=True)
        assert captions_of(kept) == {"a.png": ["." + extension.lstrip(".")]}


def test_without_any_caption_the_file_names_are_the_captions(folder):
    (folder / "red_cat.jpg").write_bytes(png(4))
    source = Folder(str(folder))
    assert captions_of(source) == {"a.png": ["a"], "b/c.png": ["c"], "b/d e.png": ["d e"], "red_cat.jpg": ["red cat"]}
    assert "file names" in source.notes[0]


def test_missing_captions_are_named(folder):
    write_captions(folder, names=NAMES[1:])
    refused(lambda: Folder(str(folder)), "1 of 3", "a.png", "--skip_bad_images")
    source = Folder(str(folder), skip_bad=True)
    assert captions_of(source).keys() == set(NAMES[1:])
    assert source.read(0) == png(1) and "a.png" in source.notes[0]


def test_an_empty_caption_file_is_the_empty_caption(folder):
    write_captions(folder)
    (folder / "a.txt").write_text("")
    assert captions_of(Folder(str(folder)))["a.png"] == [""]


def test_a_byte_order_mark_is_no_text(folder):
    write_captions(folder)
    (folder / "a.txt").write_text("ein Hünd\r\n", encoding="utf-8-sig")
    assert captions_of(Folder(str(folder)))["a.png"] == ["ein Hünd"]


@pytest.mark.parametrize("encoding", ["latin-1", "utf-16"])
def test_a_caption_that_is_not_utf8_is_named(folder, encoding):
    write_captions(folder)
    (folder / "b/c.txt").write_text("ein Hünd", encoding=encoding)
    refused(lambda: Folder(str(folder)), "b/c.txt", "UTF-8")


def test_hidden_files_and_folders_are_passed_over(folder):
    write_captions(folder)
    for name in ("._a.png", ".thumbs/x.png", "b/.cache/y.png"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"nothing")
    assert Folder(str(folder)).names.tolist() == NAMES


def test_extensions_in_capitals_and_links_are_followed(folder, tmp_path):
    (folder / "B.JPG").write_bytes(png(5))
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/z.WebP").write_bytes(png(6))
    (folder / "linked").symlink_to(tmp_path / "elsewhere")
    source = Folder(str(folder))
    assert source.names.tolist() == ["B.JPG", *NAMES, "linked/z.WebP"]
    assert source.read(4) == png(6)


def test_a_link_back_to_a_folder_above_is_not_walked_in_circles(folder):
    (folder / "b/loop").symlink_to(folder)
    (folder / "b/here").symlink_to(folder / "b")
    assert Folder(str(folder)).names.tolist() == NAMES


def test_no_folder_and_no_images(tmp_path):
    refused(lambda: Folder(str(tmp_path / "none")), "--train_data_dir", "none")
    (tmp_path / "a.txt").write_text("text")
    refused(lambda: Folder(str(tmp_path)), "no image", ".png")


ROWS = [{"file_name": name, "text": f"text, of {name}", "other": name.upper()} for name in NAMES]


def write_metadata(path: Path, rows: list[dict]) -> None:
    if path.suffix == ".jsonl":
        path.write_text("\n".join(json.dumps(row) for row in rows) + "\n\n")
    else:
        lines = [",".join(f'"{value}"' for value in row.values()) for row in rows]
        path.write_text("\n".join([",".join(rows[0]), *lines]) + "\n")


@pytest.mark.parametrize("kind", ["metadata.jsonl", "metadata.csv"])
def test_metadata(folder, kind):
    write_metadata(folder / kind, ROWS)
    assert captions_of(Folder(str(folder))) == {name: [f"text, of {name}"] for name in NAMES}
    assert captions_of(Folder(str(folder), caption_column="other")) == {name: [name.upper()] for name in NAMES}
    write_metadata(folder / kind, [ROWS[0], {**ROWS[1], "file_name": "./b/../b/c.png"}])
    refused(lambda: Folder(str(folder)), "1 of 3", "b/d e.png")
    write_metadata(folder / kind, [*ROWS, {"file_name": "gone.png", "text": "x"}])
    refused(lambda: Folder(str(folder)), "gone.png", "not there")


@pytest.mark.parametrize("kind", ["metadata.jsonl", "metadata.csv"])
def test_metadata_in_subfolders_names_files_beside_itself(folder, kind):
    write_metadata(folder / kind, ROWS[:1])
    write_metadata(folder / "b" / kind, [{**row, "file_name": Path(row["file_name"]).name} for row in ROWS[1:]])
    assert captions_of(Folder(str(folder))) == {name: [f"text, of {name}"] for name in NAMES}


def test_of_two_kinds_of_metadata_jsonl_goes_before_csv(folder):
    for kind in ("metadata.jsonl", "metadata.csv"):    # whatever the order in which the file system lists them
        write_metadata(folder / kind, [{**row, "text": kind} for row in ROWS])
        assert captions_of(Folder(str(folder))) == {name: ["metadata.jsonl"] for name in NAMES}


def test_several_captions_of_an_image(folder):
    write_metadata(folder / "metadata.jsonl", [{**row, "text": ["one", "two"]} for row in ROWS])
    assert captions_of(Folder(str(folder)))["a.png"] == ["one", "two"]


@pytest.mark.parametrize("kind, text, words", [
    ("metadata.jsonl", '{"file_name": "a.png", "caption": "x"}', ("line 1", "'text'", "--caption_column", "file_name, caption")),
    ("metadata.csv", "file_name,caption\na.png,x\n", ("line 2", "'text'", "--caption_column", "file_name, caption")),
    ("metadata.jsonl", '{"image": "a.png", "text": "x"}', ("line 1", "'file_name'", "image, text")),
    ("metadata.jsonl", '\n{"file_name": "a.png"', ("line 2", "JSON")),
    ("metadata.jsonl", '["a.png", "x"]', ("line 1", "object")),
    ("metadata.jsonl", '{"file_name": "a.png", "text": 3}', ("line 1", "3")),
    ("metadata.jsonl", '{"file_name": "a.png", "text": []}', ("line 1", "[]")),
    ("metadata.jsonl", '{"file_name": 7, "text": "x"}', ("line 1", "file_name", "7")),
    ("metadata.csv", "text,file_name\nhello\n", ("line 2", "file_name", "None")),
    ("metadata.csv", "file_name,text\na.png\n", ("line 2", "None")),
    ("metadata.csv", f"file_name,text\na.png,{'x' * 200_000}\n", ("CSV",)),
    ("metadata.jsonl", '{"file_name": "a.png", "text": "H\udcfcnd"}', ("UTF-8",))])
def test_what_is_wrong_with_metadata_is_said_with_its_line(folder, kind, text, words):
    (folder / kind).write_bytes(text.encode(errors="surrogateescape"))
    refused(lambda: Folder(str(folder)), kind, *words)


# a data set of the datasets library

def read_all(source) -> list[bytes]:
    return [source.read(row) for row in range(len(source.names))]


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> str:
    return str(tmp_path_factory.mktemp("datasets"))


def data_set(path, cache, image_column="image", caption_column="text") -> DataSet:
    return DataSet(str(path), None, image_column, caption_column, cache)


IMAGES = [png(number) for number in range(3)]
STRUCTS = [{"bytes": data, "path": f"{number}.png"} for number, data in enumerate(IMAGES)]
CAPTIONS = ["red", "green", ""]


@pytest.mark.parametrize("column", [IMAGES, STRUCTS], ids=["bytes", "struct"])
def test_parquet(tmp_path, cache, column):
    pq.write_table(pa.table({"image": column, "text": CAPTIONS, "id": [7, 8, 9]}), tmp_path / "train.parquet")
    source = data_set(tmp_path / "train.parquet", cache)
    assert source.names.tolist() == ["row 0", "row 1", "row 2"]
    assert source.captions == [["red"], ["green"], [""]]
    assert read_all(source) == IMAGES


def test_parquet_with_paths_and_several_captions(tmp_path, cache):
    paths = []
    for number, data in enumerate(IMAGES):
        paths.append(str(tmp_path / f"{number}.png"))
        Path(paths[-1]).write_bytes(data)
    pq.write_table(pa.table({"file": paths, "texts": [["a", "b"], ["c"], ["d", "e"]]}), tmp_path / "train.parquet")
    source = data_set(tmp_path / "train.parquet", cache, "file", "texts")
    assert source.captions == [["a", "b"], ["c"], ["d", "e"]] and read_all(source) == IMAGES
    before = [source.stamp(row) for row in range(3)]
    replace_quietly(Path(paths[1]), png(9))    # the file of a row can change while the data set stays
    after = [data_set(tmp_path / "train.parquet", cache, "file", "texts").stamp(row) for row in range(3)]
    assert [one == other for one, other in zip(before, after, strict=True)] == [True, False, True]


@pytest.mark.parametrize("split", [False, True])
def test_saved_to_disk(tmp_path, cache, split):
    whole = datasets.Dataset.from_dict({"image": STRUCTS, "text": CAPTIONS})
    whole = whole.cast_column("image", datasets.Image())
    (datasets.DatasetDict({"train": whole}) if split else whole).save_to_disk(tmp_path / "saved")
    source = data_set(tmp_path / "saved", cache)
    assert read_all(source) == IMAGES and source.captions == [["red"], ["green"], [""]]


def test_a_folder_of_images_by_name(folder, cache):
    write_metadata(folder / "metadata.jsonl", ROWS)
    source = data_set(folder, cache)
    assert sorted(zip(read_all(source), source.captions, strict=True)) == sorted(
        (png(number), [f"text, of {name}"]) for number, name in enumerate(NAMES))


def test_faults_of_a_data_set(tmp_path, cache):
    refused(lambda: data_set(tmp_path / "none", cache), "--dataset_name", "none")
    path = tmp_path / "train.parquet"
    pq.write_table(pa.table({"image": IMAGES, "text": ["a", None, "b"]}), path)
    refused(lambda: data_set(path, cache, caption_column="caption"), "--caption_column", "'caption'", "image, text")
    refused(lambda: data_set(path, cache, image_column="picture"), "--image_column", "'picture'", "image, text")
    refused(lambda: data_set(path, cache), "row 1", "column text", "None")

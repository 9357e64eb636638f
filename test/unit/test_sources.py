"""Where images and captions come from, and what is said when they are not as they should be."""

import http.server
import json
import os
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from files import png, replace_quietly

from library.data.sources import downloads
from library.data.sources.opening import open_masks, open_source
from library.data.specs import Fixed, Origin, Spec
from library.errors import UserError

NAMES = ["a.png", "b/c.png", "b/d e.png"]
ROOT = os.getuid() == 0    # whom no permission stops


@pytest.fixture
def folder(tmp_path) -> Path:
    """Three pictures, one of them in the root."""
    for number, name in enumerate(NAMES):
        (tmp_path / "images" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "images" / name).write_bytes(png(number))
    return tmp_path / "images"


def opened(path, kind: str = "folder", skip_bad: bool = False, index=None, **options):
    return open_source(Spec("set", Origin(kind, str(path), **options), Fixed((64, 64))), Path(index or f"{path}.index"), skip_bad)


def captions_of(source) -> dict[str, list[str]]:
    assert source.text_start[0] == 0 and len(source.text_start) == len(source.names) + 1
    assert source.texts.dtype == source.names.dtype == np.dtypes.StringDType() and source.text_start[-1] == len(source.texts)
    bounds = source.text_start.tolist()
    return {name: source.texts[start:end].tolist()
            for name, start, end in zip(source.names.tolist(), bounds[:-1], bounds[1:], strict=True)}


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
    source = opened(folder)
    assert captions_of(source) == {name: [f"text of {name}"] for name in NAMES}
    assert [source.read(row) for row in range(3)] == [png(number) for number in range(3)]
    assert source.notes == []


def test_txt_goes_before_caption_and_the_flag_before_both(folder):
    write_captions(folder, ".txt")
    for extension in (".caption", ".tags"):
        (folder / "a").with_suffix(extension).write_text(extension)
    assert captions_of(opened(folder))["a.png"] == ["text of a.png"]
    for extension in (".tags", ".caption"):
        refused(lambda extension=extension: opened(folder, extensions=(extension,), captions="textfile"), "b/c.png")
        kept = opened(folder, extensions=(extension,), skip_bad=True)
        assert captions_of(kept) == {"a.png": [extension]}


def test_without_any_caption_the_file_names_are_the_captions(folder):
    (folder / "red_cat.jpg").write_bytes(png(4))
    source = opened(folder)
    assert captions_of(source) == {"a.png": ["a"], "b/c.png": ["c"], "b/d e.png": ["d e"], "red_cat.jpg": ["red cat"]}
    assert "file names" in source.notes[0]


def test_missing_captions_are_named(folder):
    write_captions(folder, names=NAMES[1:])
    refused(lambda: opened(folder), "1 of 3", "a.png", "--skip_bad_images")
    source = opened(folder, skip_bad=True)
    assert captions_of(source).keys() == set(NAMES[1:])
    assert source.read(0) == png(1) and "a.png" in source.notes[0]


def test_an_empty_caption_file_is_the_empty_caption(folder):
    write_captions(folder)
    (folder / "a.txt").write_text("")
    assert captions_of(opened(folder))["a.png"] == [""]


def test_a_byte_order_mark_is_no_text(folder):
    write_captions(folder)
    (folder / "a.txt").write_text("ein Hünd\r\n", encoding="utf-8-sig")
    assert captions_of(opened(folder))["a.png"] == ["ein Hünd"]


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be"])
def test_utf16_with_a_byte_order_mark_is_read(folder, encoding):
    write_captions(folder)
    mark = "" if encoding == "utf-16" else "\ufeff"
    (folder / "a.txt").write_bytes((mark + "ein Hünd, 犬\r\n").encode(encoding))
    assert captions_of(opened(folder))["a.png"] == ["ein Hünd, 犬"]


@pytest.mark.parametrize("data, words", [
    ("ein Hünd".encode("latin-1"), ("UTF-8 (byte 5)",)), ("\ufeffHü".encode("utf-32-le"), ("UTF-8 (byte 0)",)),
    ("\ufeffHünd".encode("utf-16-le")[:-1], ("UTF-16", "byte 8"))], ids=["latin-1", "utf-32", "half a utf-16"])
def test_a_caption_in_another_encoding_is_named(folder, data, words):
    write_captions(folder)
    (folder / "b/c.txt").write_bytes(data)
    refused(lambda: opened(folder), "1 of 3", f"{folder}/b/c.txt", *words)
    source = opened(folder, skip_bad=True)
    assert captions_of(source).keys() == {"a.png", "b/d e.png"} and source.read(1) == png(2)
    assert [name for name, _ in source.left_out] == ["b/c.png"] and words[0] in source.left_out[0][1] + source.notes[0]


@pytest.mark.parametrize("lines, text, expected", [
    ("whole", " one\n\n two \n", ["one\n\n two"]), ("first", " one \r\ntwo\r\n", ["one"]),
    ("each", "one\n\n two \r\n", ["one", "two"]), ("each", "\n \n", [""]), ("first", "", [""]),
    ("whole", "x" * 1_000_000, ["x" * 1_000_000]), ("whole", "ab" * 32768, ["ab" * 32768])], ids=range(7))
def test_lines_of_a_caption_file(folder, lines, text, expected):
    write_captions(folder)
    (folder / "a.txt").write_bytes(text.encode())
    assert captions_of(opened(folder, captions="textfile", lines=lines))["a.png"] == expected


def test_a_file_that_is_too_large_for_a_caption(folder, monkeypatch):
    write_captions(folder)
    monkeypatch.setattr("library.data.sources.folder.LARGEST", 1000)
    (folder / "a.txt").write_bytes(b"x" * 1001)
    refused(lambda: opened(folder), "larger than", "a.txt")


def test_phrases_are_captions_of_all_images_or_of_those_without_a_file(folder):
    write_captions(folder, names=NAMES[:1])
    assert captions_of(opened(folder, captions="phrase", phrases=("red", "green"))) == {name: ["red", "green"] for name in NAMES}
    expected = {name: ["sks dog"] for name in NAMES} | {"a.png": ["text of a.png"]}
    assert captions_of(opened(folder, captions="textfile", phrases=("sks dog",))) == expected
    assert captions_of(opened(folder, captions="filename"))["b/d e.png"] == ["d e"]


def test_images_that_share_a_caption_file_and_files_that_belong_to_none(folder):
    write_captions(folder)
    (folder / "a.jpg").write_bytes(png(7))
    for name in ("b/stray.txt", "README.txt"):
        (folder / name).write_text("x")
    source = opened(folder)
    assert captions_of(source)["a.jpg"] == captions_of(source)["a.png"] == ["text of a.png"]
    assert "2 caption files" in source.notes[0] and "README.txt, b/stray.txt" in source.notes[0]
    assert "1 images" in source.notes[1] and "a.png" in source.notes[1] and "share" in source.notes[1]


def test_an_unreadable_caption_and_names_that_no_text_has(folder):
    write_captions(folder)
    (folder / "a.txt").unlink()
    (folder / "a.txt").symlink_to("nowhere")    # a file that is gone is no file
    refused(lambda: opened(folder), "without a caption: a.png")
    (folder / "a.txt").unlink()
    (folder / "a.txt").write_text("a")
    os.mkfifo(folder / "pipe.png")    # reading it would wait for ever
    os.mkfifo(folder / "b/c2.txt")
    with open(os.fsencode(folder) + b"/\xff.png", "wb"):
        pass
    refused(lambda: opened(folder), "2 of 5", "pipe.png", "\\udcff.png", "UTF-8")
    source = opened(folder, skip_bad=True)
    assert source.names.tolist() == NAMES and [name for name, _ in source.left_out] == ["\\udcff.png", "pipe.png"]


@pytest.mark.skipif(ROOT, reason="nothing stops root")
def test_a_folder_that_may_not_be_read(folder):
    write_captions(folder)
    (folder / "b").chmod(0)
    try:
        refused(lambda: opened(folder), "b/", "Permission denied", "--skip_bad_images")
        assert opened(folder, skip_bad=True).left_out == [("b/", "in a folder that cannot be read (Permission denied)")]
    finally:
        (folder / "b").chmod(0o755)


def test_a_folder_that_cannot_be_listed(folder, monkeypatch):
    write_captions(folder)
    real = os.scandir

    def scandir(path):
        if str(path).rstrip("/").endswith("/b"):
            raise PermissionError(13, "Permission denied", path)
        return real(path)
    monkeypatch.setattr("library.data.sources.folder.os.scandir", scandir)
    refused(lambda: opened(folder), "b/", "Permission denied", "--skip_bad_images")
    source = opened(folder, skip_bad=True)
    assert source.names.tolist() == ["a.png"]
    assert source.left_out == [("b/", "in a folder that cannot be read (Permission denied)")]


def test_stamps_of_all_rows_are_those_of_each(folder):
    write_captions(folder)
    (folder / "gone.png").symlink_to("nowhere")
    source = opened(folder, captions="filename")
    stamps = [(name, *map(int, each)) for name, *each in zip(source.identities(), *source.stamps(), strict=True)]
    assert stamps[:3] == [source.stamp(row) for row in range(3)] and stamps[3][1:] == (-1, 0, 0)
    assert stamps[0][0] == str(folder / "a.png") and all(column.dtype == np.int64 for column in source.stamps())
    with pytest.raises(FileNotFoundError):
        source.stamp(3)


def test_hidden_files_and_folders_are_passed_over(folder):
    write_captions(folder)
    for name in ("._a.png", ".thumbs/x.png", "b/.cache/y.png"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"nothing")
    assert opened(folder).names.tolist() == NAMES


def test_extensions_in_capitals_and_links_are_followed(folder, tmp_path):
    (folder / "B.JPG").write_bytes(png(5))
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/z.WebP").write_bytes(png(6))
    (folder / "linked").symlink_to(tmp_path / "elsewhere")
    source = opened(folder)
    assert source.names.tolist() == ["B.JPG", *NAMES, "linked/z.WebP"]
    assert source.read(4) == png(6)


def test_a_link_back_to_a_folder_above_is_not_walked_in_circles(folder):
    (folder / "b/loop").symlink_to(folder)
    (folder / "b/here").symlink_to(folder / "b")
    (folder / "b/self.png").symlink_to("self.png")
    (folder / "x").mkdir()
    (folder / "y").mkdir()
    (folder / "x/to").symlink_to("../y")
    (folder / "y/to").symlink_to("../x")
    (folder / "y/e.png").write_bytes(png(5))
    source = opened(folder, captions="filename")
    assert source.names.tolist() == sorted([*NAMES, "b/self.png", "x/to/e.png", "y/e.png"])
    assert "4 links" in source.notes[0] and "b/here, b/loop, x/to/to, y/to/to" in source.notes[0]


def test_no_folder_and_no_images(tmp_path):
    refused(lambda: opened(tmp_path / "none"), "--train_data_dir", "none")
    (tmp_path / "a.txt").write_text("text")
    refused(lambda: opened(tmp_path), "no image", ".png")


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
    assert captions_of(opened(folder)) == {name: [f"text, of {name}"] for name in NAMES}
    assert captions_of(opened(folder, caption_column="other")) == {name: [name.upper()] for name in NAMES}
    write_metadata(folder / kind, [ROWS[0], {**ROWS[1], "file_name": "./b/../b/c.png"}])
    refused(lambda: opened(folder), "1 of 3", "b/d e.png")
    write_metadata(folder / kind, [*ROWS, {"file_name": "gone.png", "text": "x"}])
    refused(lambda: opened(folder), "gone.png", "not there")


@pytest.mark.parametrize("kind", ["metadata.jsonl", "metadata.csv"])
def test_metadata_in_subfolders_names_files_beside_itself(folder, kind):
    write_metadata(folder / kind, ROWS[:1])
    write_metadata(folder / "b" / kind, [{**row, "file_name": Path(row["file_name"]).name} for row in ROWS[1:]])
    assert captions_of(opened(folder)) == {name: [f"text, of {name}"] for name in NAMES}


def test_of_two_kinds_of_metadata_jsonl_goes_before_csv(folder):
    for kind in ("metadata.jsonl", "metadata.csv"):    # whatever the order in which the file system lists them
        write_metadata(folder / kind, [{**row, "text": kind} for row in ROWS])
        assert captions_of(opened(folder)) == {name: ["metadata.jsonl"] for name in NAMES}


def test_several_captions_of_an_image(folder):
    write_metadata(folder / "metadata.jsonl", [{**row, "text": ["one", "two"]} for row in ROWS])
    assert captions_of(opened(folder))["a.png"] == ["one", "two"]


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
    ("metadata.jsonl", '{"file_name": "a.png", "text": "\\ud800"}', ("line 1", "surrogate")),
    ("metadata.jsonl", '{"file_name": "a.png", "txt": "x"}', ("'text'", "did you mean 'txt'?")),
    ("metadata.csv", f"file_name,text\na.png,{'x' * 200_000}\n", ("CSV",)),
    ("metadata.jsonl", '{"file_name": "a.png", "text": "H\udcfcnd"}', ("UTF-8",))])
def test_what_is_wrong_with_metadata_is_said_with_its_line(folder, kind, text, words):
    (folder / kind).write_bytes(text.encode(errors="surrogateescape"))
    refused(lambda: opened(folder), kind, *words)


def test_a_line_of_metadata_without_a_caption(folder):
    (folder / "metadata.csv").write_text("file_name,text\na.png\nb/c.png,x\nb/d e.png,\n")
    refused(lambda: opened(folder), "1 of 3", "without a caption: a.png")
    assert captions_of(opened(folder, skip_bad=True)) == {"b/c.png": ["x"], "b/d e.png": [""]}


# a table

TABLES = [".jsonl", ".csv", ".parquet"]


def write_table(path: Path, rows: list[dict]) -> str:
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        write_metadata(path, rows)
    return str(path)


@pytest.mark.parametrize("extension", TABLES)
def test_captions_from_a_table(folder, tmp_path, extension):
    rows = [{"id": name, "words": f"text, of {name}", "other": name.upper(), "bulk": "x"} for name in NAMES]
    options = dict(captions="table", name_column="id", caption_column="words", flag="set.json, images")
    table = write_table(tmp_path / f"t{extension}", [
        {**rows[0], "id": str(folder / NAMES[0])}, {**rows[1], "id": "c.png"}, rows[2], {**rows[0], "id": "elsewhere.png"}])
    source = opened(folder, table=table, **options)
    assert captions_of(source) == {name: [f"text, of {name}"] for name in NAMES}    # by absolute path, by name alone, by path
    assert len(source.notes) == 1 and "elsewhere.png" in source.notes[0]
    table = write_table(tmp_path / f"t{extension}", rows[1:])
    refused(lambda: opened(folder, table=table, **options), "1 of 3", "a.png", "--skip_bad_images")
    assert opened(folder, table=table, skip_bad=True, **options).left_out == [("a.png", "without a caption")]
    refused(lambda: opened(folder, table=table, **options | {"caption_column": "word"}), "'word'", "'words'")
    refused(lambda: opened(folder, table=table, **options | {"name_column": "other"}), "names no image", "B/C.PNG", "a.png")
    refused(lambda: opened(folder, table=str(tmp_path / "none.csv"), **options), "set.json, images", "none.csv")


@pytest.mark.parametrize("extension", TABLES)
def test_names_without_extension_fallback_and_rows_of_one_image(folder, tmp_path, extension):
    none = "" if extension == ".csv" else None
    rows = [{"id": "a", "words": "one", "other": "x"}, {"id": "a", "words": "two", "other": "x"},
            {"id": "b/c", "words": none, "other": "three"}, {"id": "b/d e", "words": "", "other": "four"}]
    options = dict(captions="table", table=write_table(tmp_path / f"t{extension}", rows), name_column="id",
                   caption_column="words", names_have_extension=False)
    source = opened(folder, fallback_column="other", **options)
    assert captions_of(source) == {"a.png": ["one", "two"], "b/c.png": ["three"], "b/d e.png": ["four"]}
    assert len(source.notes) == 1 and "1 rows" in source.notes[0]
    if extension == ".csv":    # which does not know nothing from empty
        assert captions_of(opened(folder, **options)) == {"a.png": ["one", "two"], "b/c.png": [""], "b/d e.png": [""]}
    else:
        refused(lambda: opened(folder, **options), "without a caption: b/c.png")


def test_a_table_of_numbers_lists_and_nonsense(folder, tmp_path):
    for number in range(3):
        (folder / NAMES[number]).rename(folder / f"{number}.png")
    table = write_table(tmp_path / "t.parquet", [{"file_name": n, "text": [f"{n}", "x"]} for n in range(3)])
    options = dict(captions="table", table=table, names_have_extension=False)
    assert captions_of(opened(folder, **options)) == {f"{n}.png": [f"{n}", "x"] for n in range(3)}
    write_table(tmp_path / "t.parquet", [{"file_name": n, "text": n} for n in range(3)])
    refused(lambda: opened(folder, **options), "3 of 3", "row 1", "neither text")
    (tmp_path / "t.parquet").write_bytes(b"PAR1 and nothing else")
    refused(lambda: opened(folder, **options), "t.parquet", "parquet")
    refused(lambda: opened(folder, captions="table", table=str(folder / "0.png")), "neither .parquet nor .jsonl nor .csv")


def test_the_same_name_elsewhere_takes_no_caption_of_another_image(folder, tmp_path):
    (folder / "b/a.png").write_bytes(png(8))
    table = write_table(tmp_path / "t.jsonl", [{"file_name": name, "text": name} for name in NAMES])
    refused(lambda: opened(folder, captions="table", table=table), "without a caption: b/a.png")


def test_kohyas_metadata(folder, tmp_path):
    known = {"a": {"caption": "one\nuno", "tags": "x"}, str(folder / "b/c.png"): {"tags": "two"}, "b/d e": {"caption": "three"}}
    table = tmp_path / "meta.json"
    table.write_text(json.dumps(known))
    options = dict(captions="metadata", table=str(table), lines="each")
    assert captions_of(opened(folder, **options)) == {"a.png": ["one, x", "uno, x"], "b/c.png": ["two"], "b/d e.png": ["three"]}
    known["gone"] = known.pop("a")
    table.write_text(json.dumps(known))
    refused(lambda: opened(folder, **options), "not there", "gone", "gives no caption: a.png")
    assert captions_of(opened(folder, skip_bad=True, **options)).keys() == set(NAMES[1:])


# masks

def test_masks_go_by_path_and_stem(folder, tmp_path):
    masks = tmp_path / "masks"
    (masks / "b").mkdir(parents=True)
    for number, name in enumerate(("a.webp", "b/c.png", "b/c.jpg")):
        (masks / name).write_bytes(png(20 + number))
    names = opened(folder, captions="filename").names
    refused(lambda: open_masks(str(masks), names), "1 of 3", "b/d e.png", str(masks))
    refused(lambda: open_masks(str(tmp_path / "none"), names), "--conditioning_data_dir", "none")
    found = open_masks(str(masks), names, skip_bad=True)
    assert [found.read(0), found.read(1)] == [png(20), png(21)] and found.names.tolist() == NAMES
    assert found.missing.tolist() == [2] and found.stamp(0)[0] == str(masks / "a.webp")
    for call in (found.read, found.stamp):
        with pytest.raises(OSError, match="no mask"):
            call(2)
    (masks / "b/d e.bmp").write_bytes(png(30))
    (masks / "b/d e.gif").write_bytes(png(31))
    refused(lambda: open_masks(str(masks), names), "several", "b/d e.png")


# addresses

class Server(http.server.BaseHTTPRequestHandler):
    hits: list[str] = []
    fails: dict[str, int] = {}

    def do_GET(self):
        Server.hits.append(self.path)
        if Server.fails.get(self.path, 0) > 0:
            Server.fails[self.path] -= 1
            self.send_error(503)
        elif self.path.startswith("/gone"):
            self.send_error(404)
        else:
            data = png(int(self.path.split("=")[-1])) + bytes(5000 * self.path.startswith("/large"))
            self.send_response(200)
            self.send_header("Content-Length", str(len(data) + 10 * self.path.startswith("/short")))
            self.end_headers()
            self.wfile.write(data)

    def log_message(self, *_):
        pass


@pytest.fixture
def address(monkeypatch):
    monkeypatch.setattr(downloads, "PAUSE", 0)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server)
    Server.hits, Server.fails = [], {}
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_addresses(address, folder, tmp_path):
    rows = [{"url": f"{address}/ä b?n={n}", "text": f"number {n}"} for n in range(5)]
    rows += [{"url": "images/a.png", "text": "beside"}, {"url": str(folder / "b/c.png"), "text": "absolute"},
             {"url": (folder / "b/d e.png").as_uri(), "text": "file"}]
    write_metadata(tmp_path / "list.csv", rows)
    Server.fails = {f"/%C3%A4%20b?n={n}": n for n in range(3)}    # the third answers at the third try
    source = opened(tmp_path / "list.csv", "urls", name_column="url", flag="--x")
    assert captions_of(source) == {row["url"]: [row["text"]] for row in rows}
    assert [source.read(row) for row in range(8)] == [png(n) for n in (0, 1, 2, 3, 4, 0, 1, 2)]
    assert len(Server.hits) == 5 + 0 + 1 + 2 and len({source.stamp(row)[0] for row in range(8)}) == 8
    assert sorted(os.listdir(tmp_path / "list.csv.index/downloads")) == sorted(Path(source.stamp(n)[0]).name for n in range(5))
    opened(tmp_path / "list.csv", "urls", name_column="url")
    assert len(Server.hits) == 8, "fetched again"
    kept = opened(tmp_path / "list.csv", "urls", name_column="url", downloads=str(tmp_path / "kept"), captions="phrase",
                  phrases=("x",))
    assert len(os.listdir(tmp_path / "kept")) == 5 and captions_of(kept)[rows[0]["url"]] == ["x"]


def test_addresses_that_cannot_be_fetched(address, tmp_path, monkeypatch):
    bad = {f"{address}/gone": "404", f"{address}/busy?n=1": "503", f"{address}/short?n=1": "broke off after", "http://[": "",
           f"{address}/large?n=2": "larger than"}
    write_metadata(tmp_path / "list.csv", [{"url": each, "text": "x"} for each in [*bad, f"{address}/?n=1"]])
    Server.fails = {"/busy?n=1": 99}
    monkeypatch.setattr(downloads, "LARGEST", 4000)
    assert len(png(1)) < 4000
    refused(lambda: opened(tmp_path / "list.csv", "urls", name_column="url"), "5 of 6", *bad, *bad.values())
    assert Server.hits.count("/busy?n=1") == Server.hits.count("/short?n=1") == 3 and Server.hits.count("/gone") == 1
    source = opened(tmp_path / "list.csv", "urls", name_column="url", skip_bad=True)
    assert source.names.tolist() == [f"{address}/?n=1"] and dict(source.left_out).keys() == bad.keys()
    assert not list((tmp_path / "list.csv.index").rglob("*.tmp"))


# a data set of the datasets library

def read_all(source) -> list[bytes]:
    return [source.read(row) for row in range(len(source.names))]


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> str:
    return str(tmp_path_factory.mktemp("datasets"))


def data_set(path, cache, image_column="image", caption_column="text", **options):
    return opened(path, "dataset", image_column=image_column, caption_column=caption_column, downloads=cache,
                  flag="--dataset_name", captions="column", **options)


def texts_of(source) -> list[list[str]]:
    return list(captions_of(source).values())


IMAGES = [png(number) for number in range(3)]
STRUCTS = [{"bytes": data, "path": f"{number}.png"} for number, data in enumerate(IMAGES)]
CAPTIONS = ["red", "green", ""]


@pytest.mark.parametrize("column", [IMAGES, STRUCTS], ids=["bytes", "struct"])
def test_parquet(tmp_path, cache, column):
    pq.write_table(pa.table({"image": column, "text": CAPTIONS, "id": [7, 8, 9]}), tmp_path / "train.parquet")
    source = data_set(tmp_path / "train.parquet", cache)
    assert source.names.tolist() == ["row 0", "row 1", "row 2"]
    assert texts_of(source) == [["red"], ["green"], [""]]
    assert read_all(source) == IMAGES


def test_parquet_with_paths_and_several_captions(tmp_path, cache):
    paths = []
    for number, data in enumerate(IMAGES):
        paths.append(str(tmp_path / f"{number}.png"))
        Path(paths[-1]).write_bytes(data)
    pq.write_table(pa.table({"file": paths, "texts": [["a", "b"], ["c"], ["d", "e"]]}), tmp_path / "train.parquet")
    source = data_set(tmp_path / "train.parquet", cache, "file", "texts")
    assert texts_of(source) == [["a", "b"], ["c"], ["d", "e"]] and read_all(source) == IMAGES
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
    assert read_all(source) == IMAGES and texts_of(source) == [["red"], ["green"], [""]]


def test_a_folder_of_images_by_name(folder, cache):
    write_metadata(folder / "metadata.jsonl", ROWS)
    source = data_set(folder, cache)
    assert sorted(zip(read_all(source), texts_of(source), strict=True)) == sorted(
        (png(number), [f"text, of {name}"]) for number, name in enumerate(NAMES))


def test_faults_of_a_data_set(tmp_path, cache):
    refused(lambda: data_set(tmp_path / "none", cache), "--dataset_name", "none")
    path = tmp_path / "train.parquet"
    pq.write_table(pa.table({"image": IMAGES, "text": ["a", None, "b"]}), path)
    refused(lambda: data_set(path, cache, caption_column="caption"), "--caption_column", "'caption'", "image, text")
    refused(lambda: data_set(path, cache, image_column="picture"), "--image_column", "'picture'", "image, text")
    refused(lambda: data_set(path, cache), "1 of 3 rows", "without a caption: row 1")
    source = data_set(path, cache, skip_bad=True)
    assert source.names.tolist() == ["row 0", "row 2"] and read_all(source) == [IMAGES[0], IMAGES[2]]
    refused(lambda: data_set(path, cache, split="test"), "--dataset_name", "test")
    refused(lambda: data_set(path, cache, fallback_column="txt"), "--fallback_column", "'txt'", "did you mean 'text'?")


# a stream

@pytest.fixture
def parts(tmp_path) -> Path:
    """A folder of parquet files, 40 rows in all; row 3 has no caption but for the fallback."""
    rows = [{"image": {"bytes": png(n), "path": None}, "text": None if n == 3 else f"text {n}", "more": f"more {n}"}
            for n in range(40)]
    (tmp_path / "parts/deep").mkdir(parents=True)
    for part in range(4):
        name = f"deep/p{part}.parquet" if part == 3 else f"p{part}.parquet"
        pq.write_table(pa.Table.from_pylist(rows[part * 10:part * 10 + 10]), tmp_path / "parts" / name)
    return tmp_path / "parts"


@pytest.mark.parametrize("streaming", [False, True])
def test_a_folder_of_parquet_files(parts, cache, streaming):
    source = data_set(parts, cache, fallback_column="more", streaming=streaming)
    texts = texts_of(source)
    assert sorted(texts) == sorted([[f"text {n}"] if n != 3 else ["more 3"] for n in range(40)])
    assert read_all(source) == [png(int(text.split()[1])) for text, in texts]
    assert source.window == (512 if streaming else None) and len({source.stamp(row) for row in range(40)}) == 40
    kept = data_set(parts, cache, streaming=streaming, skip_bad=True)
    assert len(kept.left_out) == 1 and read_all(kept) == [png(int(text.split()[1])) for text, in texts_of(kept)]
    phrases = opened(parts, "dataset", captions="phrase", phrases=("x",), downloads=cache, streaming=streaming)
    assert texts_of(phrases) == [["x"]] * 40


def test_a_stream_is_read_once_if_rows_are_asked_for_in_nearly_rising_order(parts, cache, monkeypatch):
    source = data_set(parts, cache, fallback_column="more", streaming=True)
    expected, starts = read_all(data_set(parts, cache, fallback_column="more")), []

    class Counted:
        def __init__(self, images):
            self.images = images

        def __iter__(self):
            starts.append(1)
            return iter(self.images)
    source._images = Counted(source._images)
    order = [row ^ 3 for row in range(40)]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(source.read, order)) == [expected[row] for row in order]
    assert len(starts) == 1
    monkeypatch.setattr(type(source), "window", 4)
    source = data_set(parts, cache, fallback_column="more", streaming=True)
    source._images = Counted(source._images)
    for row, begun in ((39, 2), (36, 2), (35, 3), (38, 3), (0, 4)):    # back by more than the window: from the start
        assert source.read(row) == expected[row] and len(starts) == begun and len(source._kept) <= 4
    source._images = source._images.images
    copied = pickle.loads(pickle.dumps(source))    # as for a worker that is spawned
    assert [copied.read(row) for row in (5, 1)] == [expected[5], expected[1]]


def test_a_stream_whose_files_change_has_other_stamps(parts, cache):
    before = data_set(parts, cache, fallback_column="more", streaming=True).stamp(0)
    assert before == data_set(parts, cache, fallback_column="more", streaming=True).stamp(0)
    os.utime(parts / "p1.parquet", (1, 1))
    assert before != data_set(parts, cache, fallback_column="more", streaming=True).stamp(0)
    refused(lambda: data_set(parts, cache, "picture", streaming=True), "--image_column", "image, text, more")
    refused(lambda: data_set(parts / "none", cache, streaming=True), "--dataset_name", "none")

"""Captions from tables: parquet, JSON lines, csv, kohya's metadata; and which row of one belongs to which image."""

import csv
import difflib
import json
import os
from collections.abc import Iterator
from pathlib import Path

from library.data.sources.rows import Caption, as_caption, few, split
from library.data.specs import Origin
from library.errors import UserError

METADATA = ("metadata.jsonl", "metadata.csv")
_BATCH = 65536    # rows of a parquet table read at a time


def read_rows(path: Path, columns: tuple[str, ...], flag: str) -> Iterator[tuple[str, dict]]:
    """(where, row) of a .parquet, .jsonl or .csv file; of a parquet file these `columns` alone. Raises `UserError`."""
    if not path.is_file():
        raise UserError(f"{flag}: there is no file {path}")
    if path.suffix in (".parquet", ".pq"):
        yield from _parquet_rows(path, columns, flag)
        return
    if path.suffix not in (".jsonl", ".ndjson", ".csv"):
        raise UserError(f"{flag}: {path} is neither .parquet nor .jsonl nor .csv")
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            if path.suffix == ".csv":
                yield from ((f"{path}, line {number}", row) for number, row in enumerate(csv.DictReader(file), 2))
                return
            for number, line in enumerate(file, 1):
                if line.strip():
                    row = json.loads(line)
                    if not isinstance(row, dict):
                        raise UserError(f"{path}, line {number}: not an object in braces")
                    yield f"{path}, line {number}", row
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8: {error}") from None
    except (json.JSONDecodeError, RecursionError) as error:
        raise UserError(f"{path}, line {number}: not valid JSON: {error}") from None
    except csv.Error as error:
        raise UserError(f"{path} is not valid CSV: {error}") from None


def _parquet_rows(path: Path, columns: tuple[str, ...], flag: str) -> Iterator[tuple[str, dict]]:
    import pyarrow  # half a second of import: only for runs that need it
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
        present = [column for column in columns if column in file.schema_arrow.names]
        if columns[0] not in present or len(present) < 2:
            raise UserError(missing_column(str(path), next(each for each in columns if each not in present),
                                           file.schema_arrow.names, flag))
        first = 0
        for batch in file.iter_batches(_BATCH, columns=present):
            for number, values in enumerate(zip(*(batch.column(name).to_pylist() for name in present), strict=True), first):
                yield f"{path}, row {number}", dict(zip(present, values, strict=True))
            first += len(batch)
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{flag}: {path} cannot be read as parquet: {error}") from None


def missing_column(where: str, column: str, present, flag: str) -> str:
    """The message for a column that is not there, with the nearest that is."""
    dashes = "--" if flag.startswith("--") else ""
    near = difflib.get_close_matches(column, [str(each) for each in present], 1)
    hint = f" (did you mean {near[0]!r}?)" if near else ""
    return f"{where}: there is no column {column!r}{hint}; columns are {', '.join(map(str, present))} " \
           f"({dashes}caption_column names the caption's)"


def named_captions(path: Path, origin: Origin, numbers: bool, notes: list[str]
                   ) -> tuple[dict[str, Caption | None], list[tuple[str, str]]]:
    """Captions by the names in a table, and (name, reason) of those that are none. Several rows of one name: all its captions.

    numbers: whether a name may be a number. Raises `UserError` for a column that is not there.
    """
    captions: dict[str, Caption | None] = {}
    faults, again = [], 0
    fallback = (origin.fallback_column,) if origin.fallback_column else ()
    for where, row in read_rows(path, (origin.name_column, origin.caption_column, *fallback), origin.flag):
        if origin.name_column not in row or not any(column in row for column in (origin.caption_column, *fallback)):
            absent = origin.caption_column if origin.name_column in row else origin.name_column
            raise UserError(missing_column(where, absent, row, origin.flag))
        name = row[origin.name_column]
        if numbers and isinstance(name, int):
            name = str(name)
        if not isinstance(name, str):
            raise UserError(f"{where}: {origin.name_column} is not text but {name!r}")
        try:
            caption = as_caption(row.get(origin.caption_column), where) or None
            for column in fallback if caption is None else ():
                caption = as_caption(row.get(column), where)
            if caption is None and row.get(origin.caption_column) == "":
                caption = ""    # written down as the empty caption
        except ValueError as fault:
            faults.append((name, str(fault)))
            caption = ""
        if captions.get(name) is not None and caption is not None:
            old, new = ([each] if isinstance(each, str) else each for each in (captions[name], caption))
            caption, again = list(dict.fromkeys([*old, *new])), again + 1
        captions[name] = caption if caption is not None else captions.get(name)
    if again:
        notes.append(f"{again} rows of {path} name an image that an earlier row names: it has the captions of both")
    return captions, faults


def from_metadata(root: str, place: str, files: list[str], images: list[str], origin: Origin
                  ) -> tuple[list[Caption | None], list[tuple[str, str]]]:
    """Captions from metadata.jsonl and metadata.csv, whose names are relative to where they lie."""
    known, faults, notes = {}, [], []
    plain = Origin("folder", origin.path, caption_column=origin.caption_column, fallback_column=origin.fallback_column,
                   flag=origin.flag)
    for name in sorted(files):    # of two beside each other, jsonl counts
        captions, wrong = named_captions(Path(place) / name, plain, False, notes)
        here = os.path.dirname(name)
        known.update((os.path.normpath(os.path.join(here, key)), value) for key, value in captions.items())
        faults += [(os.path.normpath(os.path.join(here, key)), reason) for key, reason in wrong]
    absent = sorted(known.keys() - set(images))
    faults += [(name, f"that are not there, but {Path(place) / files[0]} names them") for name in absent]
    return [known.get(name) for name in images], faults


def from_table(root: str, images: list[str], origin: Origin, notes: list[str]
               ) -> tuple[list[Caption | None], list[tuple[str, str]]]:
    """Captions from `origin.table`. Rows of images that are not in the folder are counted in a note."""
    captions, wrong = named_captions(Path(origin.table), origin, not origin.names_have_extension, notes)
    keys, unused = _match(root, images, captions, {True: (_whole,), False: (_stem,)}[origin.names_have_extension], notes)
    if unused and all(key is None for key in keys):
        raise UserError(f"{origin.flag}: {origin.table} names no image of {root}: its column {origin.name_column!r} holds "
                        f"{few(unused, 2)}, the folder {few(images, 2)}; another column may be meant"
                        + ("" if origin.names_have_extension else ", or names with extension"))
    if unused:
        notes.append(f"{len(unused)} names in {origin.table} are not in {root}: {few(unused)}")
    reasons = dict(wrong)
    faults = [(name, reasons[key]) for name, key in zip(images, keys, strict=True) if key in reasons]
    return [None if key is None else captions[key] for key in keys], faults


def from_kohya(root: str, images: list[str], origin: Origin, separator: str, notes: list[str]
               ) -> tuple[list[Caption | None], list[tuple[str, str]]]:
    """Captions from kohya's metadata JSON, whose names may lack folder and extension. It says what the data set is: images
    that it does not name are faults, and so are names without an image."""
    from library.data.formats import kohya
    captions = kohya.read_captions(Path(origin.table), separator)
    keys, unused = _match(root, images, captions, (_whole, _stem), notes)
    faults = [(name, f"that are not there, but {origin.table} names them") for name in unused]
    faults += [(name, f"that {origin.table} gives no caption") for name, key in zip(images, keys, strict=True) if key is None]
    return [None if key is None else split(captions[key], origin.lines) for key in keys], faults


def _match(root: str, images: list[str], known: dict, forms: tuple, notes: list[str]) -> tuple[list[str | None], list[str]]:
    """(key of each image or None, keys of no image). A key is a path, absolute or relative to `root`; or a file name alone, if
    no image has just that path."""
    base = os.path.join(root, "")
    paths = {os.path.normpath(key).removeprefix(base): key for key in known}
    keys = [next((paths[form(name)] for form in forms if form(name) in paths), None) for name in images]
    exact = {key for key in keys if key is not None}
    for row, name in enumerate(images):
        if keys[row] is None and "/" in name:
            alone = os.path.basename(name)
            keys[row] = next((key for form in forms if (key := paths.get(form(alone))) is not None and key not in exact), None)
    used = {key for key in keys if key is not None}
    shared = len(keys) - keys.count(None) - len(used)
    if shared:
        notes.append(f"{shared} images in {root} share a name, and so a caption, with another one")
    return keys, [key for key in known if key not in used]


def _whole(name: str) -> str:
    return name


def _stem(name: str) -> str:
    return os.path.splitext(name)[0]

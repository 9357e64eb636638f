"""Data sets of the `datasets` library: hub ids, local folders and files, in random order or as a stream."""

import difflib
import os
import threading
from collections.abc import Iterator
from errno import EIO
from pathlib import Path

import numpy as np

from library.data.sources.folder import stamp_file
from library.data.sources.rows import NO_CAPTION, Caption, Text, as_caption, flatten, settle
from library.data.specs import Origin
from library.errors import UserError

_BATCH = 10_000    # rows whose captions are read at a time
_FORMATS = {"jsonl": "json", "tar": "webdataset", "pq": "parquet"}    # by extension, where `datasets` has another word


class DataSet:
    """A data set read by `datasets.load_dataset`: a hub id, a local folder, a saved data set, or a parquet, csv, json or arrow
    file. The interface of all sources: `open_source`. Raises `UserError` for what cannot be loaded or has no caption."""

    window = None

    def __init__(self, origin: Origin, skip_bad: bool):
        self.place, self.notes, self._base = origin.path, [], _base(origin.path)
        loaded, self._identity = _load(origin)
        self._images, self._column = _images(loaded, origin), origin.image_column
        _take_captions(self, loaded, origin, skip_bad)
        self._by_path = len(loaded) > 0 and isinstance(_encoded(self._images[0][self._column]), str)

    def read(self, row: int) -> bytes:
        return _bytes(self._image(row), self._base)

    def stamp(self, row: int) -> tuple[str, int, int, int]:
        if self._by_path and isinstance(value := self._image(row), str):    # the file can change and the data set not
            return stamp_file(_locate(value, self._base))
        return f"{self._identity} {self._column} {self.names[row]}", 0, 0, 0

    def _image(self, row: int) -> bytes | str | None:
        return _encoded(self._images[int(self._rows[row])][self._column])


class Streamed:
    """A data set that is read forwards only (`streaming=True`): nothing of it is kept on the disk.

    Its captions are read at each start. Asking for a row reads up to it; asking for one further back than the last
    `window` images begins anew. So `window` tells whoever reads to ask in nearly rising order.
    """

    window = 512

    def __init__(self, origin: Origin, skip_bad: bool):
        self.place, self.notes, self._base = origin.path, [], _base(origin.path)
        loaded, self._identity = _load(origin)
        self._images, self._column = _images(loaded, origin), origin.image_column
        _take_captions(self, loaded, origin, skip_bad)
        self._begin()

    def read(self, row: int) -> bytes:
        if self._process != os.getpid():    # a forked worker reads a stream of its own
            self._begin()
        row = int(self._rows[row])
        with self._lock:
            if row not in self._kept and (self._stream is None or row < self._position):
                self._stream, self._position = iter(self._images), 0
                self._kept.clear()
            while row not in self._kept:
                self._advance()
            value = self._kept[row]
        return _bytes(value, self._base)

    def stamp(self, row: int) -> tuple[str, int, int, int]:
        """By the data set's own fingerprint: of images that are named by path, a change of the file alone is not seen."""
        return f"{self._identity} {self._column} {self.names[row]}", 0, 0, 0

    def _advance(self) -> None:
        """Read one image more."""
        try:
            example = next(self._stream)
        except StopIteration:
            self._stream = None
            raise OSError(EIO, f"{self.place} has fewer rows than when its captions were read") from None
        except Exception as error:    # what a network can do has no common ancestor
            self._stream = None
            raise OSError(EIO, f"{self.place} broke off: {error}") from error
        self._kept[self._position] = _encoded(example[self._column])
        self._position += 1
        self._kept.pop(self._position - 1 - self.window, None)

    def _begin(self) -> None:
        self._process, self._lock, self._stream, self._position, self._kept = os.getpid(), threading.Lock(), None, 0, {}

    def __getstate__(self) -> dict:    # for workers that are not forked
        return {key: value for key, value in vars(self).items() if key not in ("_lock", "_stream", "_kept")} | {"_process": 0}


def _load(origin: Origin):
    """(data set, what identifies its content). Raises `UserError`."""
    import datasets  # a second of import: only for runs that need it
    datasets.disable_progress_bars()
    name, suffix = origin.path, Path(origin.path).suffix.lstrip(".")
    kind, files = (_FORMATS.get(suffix, suffix), name) if Path(name).is_file() else (name, None)
    options = dict(data_files=files, cache_dir=origin.downloads, revision=origin.revision)
    try:
        if (Path(name) / "dataset_info.json").exists() or (Path(name) / "dataset_dict.json").exists():
            loaded = datasets.load_from_disk(name)
            loaded = loaded[origin.split] if isinstance(loaded, datasets.DatasetDict) else loaded
        elif origin.streaming:
            builder = datasets.load_dataset_builder(kind, origin.config, **options)
            return builder.as_streaming_dataset(split=origin.split), f"{builder.config_id} {builder.hash} {origin.split}"
        else:
            loaded = datasets.load_dataset(kind, origin.config, split=origin.split, **options)
        return loaded.to_iterable_dataset() if origin.streaming else loaded, loaded._fingerprint
    except Exception as error:    # its many kinds of errors have no common ancestor
        split = f" (split {origin.split!r})" if isinstance(error, KeyError) else ""
        raise UserError(f"{origin.flag}: cannot load {name}{split}: {error}") from error


def _images(loaded, origin: Origin):
    """The column of images alone, encoded as they are. Raises `UserError` for a column that is not there."""
    import datasets
    columns = loaded.column_names or list(next(iter(loaded), {}))
    wanted = [("image_column", origin.image_column), ("caption_column", origin.caption_column),
              ("fallback_column", origin.fallback_column)]
    for key, column in wanted[:1] if origin.captions == "phrase" else wanted:
        if column and column not in columns:
            near = difflib.get_close_matches(column, columns, 1)
            place = f"--{key}" if origin.flag.startswith("--") else f"{origin.flag}, {key}"
            raise UserError(f"{place}: {origin.path} has no column {column!r}; it has {', '.join(columns)}"
                            + (f" (did you mean {near[0]!r}?)" if near else ""))
    images = loaded.select_columns([origin.image_column])
    if isinstance((loaded.features or {}).get(origin.image_column), datasets.Image):
        images = images.cast_column(origin.image_column, datasets.Image(decode=False))
    return images


def _take_captions(source: DataSet | Streamed, loaded, origin: Origin, skip_bad: bool) -> None:
    """Set names, texts, text_start, left_out, and which rows of the data set are rows of the source."""
    if origin.captions not in ("auto", "column", "phrase"):
        raise UserError(f"{origin.flag}: {origin.path} has its captions in a column, or phrases for all: not {origin.captions}")
    rows, source.left_out = [], []

    def good() -> Iterator[Caption]:
        for row, caption in enumerate(_captions(loaded, origin)):
            if isinstance(caption, ValueError):
                source.left_out.append((f"row {row}", str(caption)))
            else:
                rows.append(row)
                yield caption

    source.texts, source.text_start = flatten(good())
    source._rows = np.array(rows, np.int64)
    source.names = np.array([f"row {row}" for row in rows], Text)
    source.notes += settle(source.left_out, len(rows) + len(source.left_out), source.place, skip_bad, "rows")


def _captions(loaded, origin: Origin) -> Iterator[Caption | ValueError]:
    """Of every row in turn, from its columns alone; an error, the reason for `settle`, where there is none."""
    if origin.captions == "phrase":
        others = [name for name in loaded.column_names or [] if name != origin.image_column][:1]
        rows = range(len(loaded)) if hasattr(loaded, "__len__") else loaded.select_columns(others or [origin.image_column])
        yield from (list(origin.phrases) for _ in rows)
        return
    columns = [name for name in (origin.caption_column, origin.fallback_column) if name]
    row = 0
    for batch in loaded.select_columns(columns).with_format("arrow").iter(_BATCH):
        for values in zip(*(batch.column(name).to_pylist() for name in columns), strict=True):
            try:
                several = [as_caption(value, f"row {row}, column {name}") for name, value in zip(columns, values, strict=True)]
                caption = next((each for each in several if each), several[0])
                yield caption if caption is not None else ValueError(NO_CAPTION)
            except ValueError as fault:
                yield fault
            row += 1


def _encoded(value) -> bytes | str | None:
    """The bytes that are in the data set, or the path of the file that has them."""
    if isinstance(value, dict):
        return value["bytes"] if value.get("bytes") is not None else value.get("path")
    return value


def _bytes(value: bytes | str | None, base: str) -> bytes:
    return Path(_locate(value, base)).read_bytes() if isinstance(value, str) else value or b""


def _locate(path: str, base: str) -> str:
    """A path in a table is one from the table's folder, if there is such a file."""
    beside = os.path.join(base, path)
    return beside if os.path.exists(beside) else os.path.abspath(path)


def _base(path: str) -> str:
    return os.path.abspath(path if os.path.isdir(path) else os.path.dirname(path))

"""Where images and captions come from: a folder, or a data set of the `datasets` library.

Both kinds have the same four members: `place` (what messages call it), `names` and `captions` of the rows, and
`read(row)`, the encoded bytes of an image. `stamp(row)` changes whenever those bytes may have changed.
"""

import csv
import json
import os
from pathlib import Path

import numpy as np

from library.data.images import EXTENSIONS
from library.errors import UserError

Text = np.dtypes.StringDType()
SIDECARS = (".txt", ".caption")
METADATA = ("metadata.jsonl", "metadata.csv")


class Folder:
    """Images in `root` and its subfolders, in the order of their paths.

    Captions come from metadata.jsonl or metadata.csv (columns file_name and `caption_column`), else from a text file
    beside each image, else from the file names. Raises `UserError`, naming what is missing or cannot be read.
    """

    def __init__(self, root: str, caption_column: str = "text", caption_extension: str | None = None,
                 skip_bad: bool = False):
        self.root, self.place = Path(root), str(root)
        if not self.root.is_dir():
            raise UserError(f"--train_data_dir: there is no folder {root}")
        images, others = _walk(self.root)
        if not images:
            raise UserError(f"--train_data_dir: {root} holds no image ({' '.join(EXTENSIONS)})")
        self.notes: list[str] = []
        metadata = [name for name in others if os.path.basename(name) in METADATA]
        if metadata:
            captions = self._from_metadata(metadata, images, caption_column)
        else:
            captions = self._from_sidecars(images, others, caption_extension)
        missing = [name for name in images if captions.get(name) is None]
        if missing and not skip_bad:
            raise UserError(f"{len(missing)} of {len(images)} images in {root} have no caption: {_few(missing)}. "
                            "Write them, remove the images, or leave them out with --skip_bad_images")
        if missing:
            self.notes.append(f"{len(missing)} images without a caption are left out: {_few(missing)}")
        kept = [name for name in images if captions.get(name) is not None]
        self.names = np.array(kept, Text)
        self.captions = [captions[name] for name in kept]

    def read(self, row: int) -> bytes:
        return (self.root / self.names[row]).read_bytes()

    def stamp(self, row: int) -> tuple[str, int, int, int]:
        return _stamp(self.root / self.names[row])

    def _from_metadata(self, files: list[str], images: list[str], column: str) -> dict[str, list[str]]:
        captions, present = {}, set(images)
        for name in files:
            for line, row in _metadata_rows(self.root / name):
                if "file_name" not in row or column not in row:
                    absent = "file_name" if "file_name" not in row else column
                    hint = "" if absent == "file_name" else " (--caption_column names the caption's)"
                    raise UserError(f"{self.root / name}, line {line}: there is no column {absent!r}{hint}; "
                                    f"columns are {', '.join(map(str, row))}")
                if not isinstance(row["file_name"], str):
                    raise UserError(f"{self.root / name}, line {line}: file_name is not text but {row['file_name']!r}")
                path = os.path.normpath(os.path.join(os.path.dirname(name), row["file_name"]))
                captions[path] = _texts(row[column], f"{self.root / name}, line {line}")
        absent = [path for path in captions if path not in present]
        if absent:
            raise UserError(f"{self.root / files[0]} names {len(absent)} images that are not there: {_few(absent)}")
        return captions

    def _from_sidecars(self, images: list[str], others: list[str], extension: str | None) -> dict[str, list[str]]:
        extensions = (("." + extension.lstrip(".")),) if extension else SIDECARS
        present = set(others)
        beside = {name: next((stem + ext for ext in extensions if stem + ext in present), None)
                  for name in images for stem in [os.path.splitext(name)[0]]}
        if extension is None and not any(beside.values()):
            self.notes.append("no caption files: the file names are the captions")
            return {name: [os.path.splitext(os.path.basename(name))[0].replace("_", " ")] for name in images}
        return {name: [_read_text(self.root / text)] for name, text in beside.items() if text}


class DataSet:
    """A data set read by `datasets.load_dataset`: a hub id, a local folder, or a parquet/csv/json/arrow file."""

    def __init__(self, name: str, config: str | None, image_column: str, caption_column: str, cache_dir: str | None):
        import datasets  # a second of import: only for runs that need it
        datasets.disable_progress_bars()
        self.place, self.notes = name, []
        kind = Path(name).suffix.lstrip(".").replace("jsonl", "json")
        try:
            if Path(name).is_file():
                loaded = datasets.load_dataset(kind, data_files=name, split="train", cache_dir=cache_dir)
            elif (Path(name) / "dataset_info.json").exists() or (Path(name) / "dataset_dict.json").exists():
                loaded = datasets.load_from_disk(name)
                loaded = loaded["train"] if isinstance(loaded, datasets.DatasetDict) else loaded
            else:
                loaded = datasets.load_dataset(name, config, split="train", cache_dir=cache_dir)
        except Exception as error:    # its many kinds of errors have no common ancestor
            raise UserError(f"--dataset_name: cannot load {name}: {error}") from error
        for flag, column in (("image_column", image_column), ("caption_column", caption_column)):
            if column not in loaded.column_names:
                raise UserError(f"--{flag}: {name} has no column {column!r}; it has {', '.join(loaded.column_names)}")
        self._images = loaded.select_columns([image_column])
        if isinstance(loaded.features[image_column], datasets.Image):
            self._images = self._images.cast_column(image_column, datasets.Image(decode=False))
        self._column, self._fingerprint = image_column, loaded._fingerprint
        self.names = np.array([f"row {row}" for row in range(len(loaded))], Text)
        self.captions = [_texts(value, f"{name}, row {row}, column {caption_column}")
                         for row, value in enumerate(loaded[caption_column])]
        self._by_path = len(loaded) > 0 and isinstance(self._image(0), str)

    def read(self, row: int) -> bytes:
        value = self._image(row)
        return Path(value).read_bytes() if isinstance(value, str) else value or b""

    def stamp(self, row: int) -> tuple[str, int, int, int]:
        if self._by_path and isinstance(value := self._image(row), str):    # the file can change and the data set not
            return _stamp(Path(value))
        return f"{self._fingerprint} {self._column} {self.names[row]}", 0, 0, 0

    def _image(self, row: int) -> bytes | str | None:
        """The encoded bytes in the data set, or the path of the file that has them."""
        value = self._images[row][self._column]
        if isinstance(value, dict):
            value = value["bytes"] if value.get("bytes") is not None else value["path"]
        return value


def _walk(root: Path) -> tuple[list[str], list[str]]:
    """Sorted relative paths of all images, and of all other files. Hidden ones are passed over."""
    def refuse(error):    # os.walk passes over what it may not read, and says nothing
        raise error

    images, others = [], []
    for folder, subfolders, files in os.walk(root, onerror=refuse, followlinks=True):
        here = os.path.realpath(folder) + os.sep
        subfolders[:] = sorted(name for name in subfolders if not name.startswith(".")    # nor a link back to where it lies in
                               and not here.startswith(os.path.realpath(os.path.join(folder, name)) + os.sep))
        for name in files:
            path = os.path.relpath(os.path.join(folder, name), root)
            if not name.startswith("."):
                (images if name.lower().endswith(EXTENSIONS) else others).append(path)
    return sorted(images), sorted(others)


def _stamp(path: Path) -> tuple[str, int, int, int]:
    """(absolute path, size, mtime, ctime): what git, too, goes by to see that a file is as it was."""
    status = path.stat()
    return str(path.absolute()), status.st_size, status.st_mtime_ns, status.st_ctime_ns


def _metadata_rows(path: Path):
    """(line number, row) of a metadata.jsonl or metadata.csv."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            if path.suffix == ".csv":
                yield from ((number, row) for number, row in enumerate(csv.DictReader(file), 2))
                return
            for number, line in enumerate(file, 1):
                if line.strip():
                    row = json.loads(line)
                    if not isinstance(row, dict):
                        raise UserError(f"{path}, line {number}: not an object in braces")
                    yield number, row
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8: {error}") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{path}, line {number}: not valid JSON: {error}") from None
    except csv.Error as error:
        raise UserError(f"{path} is not valid CSV: {error}") from None


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig").strip()
    except UnicodeDecodeError as error:
        raise UserError(f"the caption file {path} is not UTF-8 (byte {error.start}): save it as UTF-8") from None


def _texts(value, where: str) -> list[str]:
    """A caption, or a list of captions."""
    texts = value if isinstance(value, (list, tuple, np.ndarray)) else [value]
    if not len(texts) or not all(isinstance(text, str) for text in texts):
        raise UserError(f"{where}: the caption is neither text nor a list of texts but {value!r}")
    return list(texts)


def _few(names: list[str], count: int = 5) -> str:
    return ", ".join(names[:count]) + (f" and {len(names) - count} more" if len(names) > count else "")

"""A folder of images, its subfolders with it: what lies there, which caption belongs to which image, and their masks."""

import os
import stat
from array import array
from dataclasses import dataclass, field
from errno import ENOENT
from pathlib import Path

import numpy as np

from library.data.images import EXTENSIONS
from library.data.sources import tables
from library.data.sources.rows import (
    LARGEST,
    NO_CAPTION,
    Caption,
    Text,
    decode,
    few,
    file_name_caption,
    flatten,
    is_text,
    settle,
    split,
)
from library.data.specs import Origin
from library.errors import UserError


class Folder:
    """Images in a folder and its subfolders, in the order of their paths. The interface of all sources: `open_source`.

    separator: between caption and tags of kohya's metadata. Raises `UserError`, naming what is missing or cannot be read.
    """

    window = None

    def __init__(self, origin: Origin, skip_bad: bool, separator: str = ","):
        self.place, self._root, self.notes = origin.path, os.path.abspath(origin.path), []
        found = walk(origin.path, EXTENSIONS, origin.flag)
        if not found.names and not found.faults:
            raise UserError(f"{origin.flag}: {self.place} holds no image ({' '.join(EXTENSIONS)})")
        captions, faults = self._captions(origin, found, separator)
        faults = found.faults + faults + [(name, NO_CAPTION) for name, each in zip(found.names, captions, strict=True)
                                          if each is None]
        reasons = dict(reversed(faults))    # of an image with two faults the first is told
        self.left_out = list(reversed(reasons.items()))
        total = len(found.names) + len(found.faults)
        self.notes += found.notes + settle(self.left_out, total, self.place, skip_bad)
        keep = [row for row, name in enumerate(found.names) if name not in reasons] if reasons else range(len(found.names))
        self.texts, self.text_start = flatten(captions[row] for row in keep)
        self.names = np.array([found.names[row] for row in keep] if reasons else found.names, Text)
        self._status = found.status[keep] if reasons else found.status

    def read(self, row: int) -> bytes:
        with open(f"{self._root}/{self.names[row]}", "rb") as file:
            return file.read()

    def stamp(self, row: int) -> tuple[str, int, int, int]:
        return stamp_file(f"{self._root}/{self.names[row]}")

    def stamps(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(size, mtime_ns, ctime_ns) of all rows, each [N] int64, as they were when the folder was listed; -1 of what is not
        there, as a link that leads nowhere."""
        return tuple(self._status.T.copy())

    def identities(self) -> list[str]:
        """What `stamp` calls each row."""
        return [f"{self._root}/{name}" for name in self.names.tolist()]

    def _captions(self, origin: Origin, found: "Found", separator: str) -> tuple[list[Caption | None], list[tuple[str, str]]]:
        """Of each image, None where there is none; and what else is wrong."""
        kind = origin.captions
        if kind == "filename":
            return [file_name_caption(name) for name in found.names], []
        if kind == "phrase":
            return [list(origin.phrases)] * len(found.names), []
        metadata = [name for name in found.others if name.endswith(tables.METADATA) and os.path.basename(name) in tables.METADATA]
        if metadata and kind == "auto":
            return tables.from_metadata(self._root, self.place, metadata, found.names, origin)
        if kind == "table":
            return tables.from_table(self._root, found.names, origin, self.notes)
        if kind == "metadata":
            return tables.from_kohya(self._root, found.names, origin, separator, self.notes)
        if kind not in ("auto", "textfile"):
            raise UserError(f"{origin.flag}: images in a folder have no caption {kind}: take their text files or a table")
        return self._from_files(origin, found)

    def _from_files(self, origin: Origin, found: "Found") -> tuple[list[Caption | None], list[tuple[str, str]]]:
        extensions = tuple(origin.extensions)
        files = {name for name in found.others if name.endswith(extensions)}
        stems = [name[:name.rindex(".")] for name in found.names]
        beside = [None] * len(stems)
        for extension in reversed(extensions):    # the first of them has the last word
            beside = [stem + extension if stem + extension in files else text for stem, text in zip(stems, beside, strict=True)]
        used = {name for name in beside if name}
        if len(used) < len(files):
            known = set(stems)
            orphans = sorted(name for name in files - used if os.path.splitext(name)[0] not in known)
            if orphans:
                self.notes.append(f"{len(orphans)} caption files in {self.place} belong to no image: {few(orphans)}")
        if origin.captions == "auto" and not used and not origin.phrases:
            self.notes.append("no caption files: the file names are the captions")
            return [file_name_caption(name) for name in found.names], []
        if len(used) + beside.count(None) < len(beside):
            first, twice = set(), []
            for name, text in zip(found.names, beside, strict=True):
                twice += [name] if text in first else []
                first |= {text} if text else set()
            self.notes.append(f"{len(twice)} images in {self.place} share a caption file with another one: {few(twice)}")
        captions: list[Caption | None] = []
        faults = []
        for name, text in zip(found.names, beside, strict=True):
            try:
                captions.append(self._read_caption(text, origin.lines) if text else list(origin.phrases) or None)
            except ValueError as fault:
                captions.append("")
                faults.append((name, str(fault)))
        return captions, faults

    def _read_caption(self, name: str, lines: str) -> Caption:
        path = f"{self._root}/{name}"
        try:
            handle = os.open(path, os.O_RDONLY)    # a fifth of the time of `Path.read_text`
            try:
                data = os.read(handle, 65536)
                while len(data) % 65536 == 0 and len(data) <= LARGEST and (more := os.read(handle, LARGEST)):
                    data += more
            finally:
                os.close(handle)
        except OSError as error:
            raise ValueError(f"whose caption file {path} cannot be read ({error.strerror})") from None
        if len(data) > LARGEST:
            raise ValueError(f"whose caption file {path} is larger than {LARGEST >> 20} MB")
        return split(decode(data, path), lines)


class Masks:
    """Masks of images, row by row. Rows without one raise OSError when they are read. The interface of all sources."""

    window = None

    def __init__(self, folder: str, names: np.ndarray, paths: list[str | None], notes: list[str]):
        self.place, self.names, self.notes, self.left_out = folder, names, notes, []
        self.texts, self.text_start = flatten("" for _ in paths)
        self.missing = np.flatnonzero([path is None for path in paths])
        self._root, self._paths = os.path.abspath(folder), np.array([path or "" for path in paths], Text)

    def read(self, row: int) -> bytes:
        return Path(self._path(row)).read_bytes()

    def stamp(self, row: int) -> tuple[str, int, int, int]:
        return stamp_file(self._path(row))

    def _path(self, row: int) -> str:
        if not self._paths[row]:
            raise FileNotFoundError(ENOENT, f"there is no mask of this name in {self.place}", str(self.names[row]))
        return f"{self._root}/{self._paths[row]}"


def open_masks(folder: str, names: np.ndarray, skip_bad: bool = False, flag: str = "--conditioning_data_dir") -> Masks:
    """The mask of every image in `names` [N]: the file in `folder` of the same relative path, or else of the same path but for
    the extension. `missing` holds the rows that have none, with `skip_bad`; else they are a `UserError` that names them."""
    found = walk(folder, EXTENSIONS, flag)
    settle(found.faults, len(found.names) + len(found.faults), folder, skip_bad, "masks")
    exact, by_stem = set(found.names), {}
    for name in found.names:
        by_stem.setdefault(os.path.splitext(name)[0], []).append(name)
    paths, missing, several = [], [], []
    for name in names.tolist():
        choice = [name] if name in exact else by_stem.get(os.path.splitext(name)[0], [])
        paths.append(choice[0] if len(choice) == 1 else None)
        missing += [] if choice else [name]
        several += [name] if len(choice) > 1 else []
    faults = [(name, f"without a mask of the same name in {folder}") for name in missing]
    faults += [(name, f"with several masks of the same name in {folder}") for name in several]
    settle(faults, len(names), folder, skip_bad)
    return Masks(folder, names, paths, found.notes)


@dataclass
class Found:
    """What a folder holds. names: relative paths of the wanted files, sorted; status: their size, mtime and ctime [N, 3] int64;
    others: sorted paths of all other files; faults: (name, reason) of what cannot be a row."""

    names: list[str] = field(default_factory=list)
    status: np.ndarray | None = None
    others: list[str] = field(default_factory=list)
    faults: list[tuple[str, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def walk(root: str, extensions: tuple[str, ...], flag: str) -> Found:
    """All files in `root` and its subfolders, links followed but not in circles. Hidden ones are passed over."""
    if not os.path.isdir(root):
        raise UserError(f"{flag}: there is no folder {root}")
    found, status, circles = Found(), array("q"), []
    pending = [("", os.path.realpath(root), ())]    # a folder's prefix, where it really is, and where links to it were left
    while pending:
        prefix, here, above = pending.pop()
        try:
            entries = os.scandir(os.path.join(root, prefix))
        except OSError as error:
            found.faults.append((prefix, f"in a folder that cannot be read ({error.strerror})"))
            continue
        with entries:
            for entry in entries:
                name, path = entry.name, prefix + entry.name
                if name.startswith("."):
                    continue
                if not is_text(name):
                    found.faults.append((ascii(path)[1:-1], "whose name is not UTF-8"))
                elif _is(entry.is_dir):
                    if not entry.is_symlink():
                        pending.append((path + "/", f"{here}/{name}", above))
                    elif any(f"{each}/".startswith(f"{os.path.realpath(entry.path)}/") for each in (*above, here)):
                        circles.append(path)
                    else:
                        pending.append((path + "/", os.path.realpath(entry.path), (*above, here)))
                elif name.lower().endswith(extensions):
                    size, mtime, ctime, plain = _status(entry)
                    if plain:
                        found.names.append(path)
                        status.extend((size, mtime, ctime))
                    else:
                        found.faults.append((path, "that are no files but pipes, sockets or devices"))
                elif _is(entry.is_file):
                    found.others.append(path)
    order = sorted(range(len(found.names)), key=found.names.__getitem__)
    found.names = [found.names[row] for row in order]
    found.status = np.array(status, np.int64).reshape(-1, 3)[order]
    found.others.sort()
    found.faults.sort()
    if circles:
        found.notes.append(f"{len(circles)} links in {root} lead back to where they lie and are not followed: "
                           f"{few(sorted(circles))}")
    return found


def stamp_file(path: str) -> tuple[str, int, int, int]:
    """(path, size, mtime, ctime): what git, too, goes by to see that a file is as it was."""
    status = os.stat(path)
    return path, status.st_size, status.st_mtime_ns, status.st_ctime_ns


def _status(entry: os.DirEntry) -> tuple[int, int, int, bool]:
    """Size, mtime, ctime, and whether it can be read as a file. A link to nowhere can: reading it names the reason."""
    try:
        status = entry.stat()
    except OSError:
        return -1, 0, 0, True
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns, stat.S_ISREG(status.st_mode)


def _is(question) -> bool:
    try:
        return question()
    except OSError:    # a link to itself
        return False

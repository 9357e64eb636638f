"""Tars of images, as webdataset, img2dataset and LAION write them. Indexed once, then read in any order.

The index of a tar is a file of its own, which holds as long as the tar's size, mtime and ctime are the same. Processes
share the indexing, tar by tar.
"""

import functools
import hashlib
import io
import json
import os
import zipfile
from errno import EIO, EROFS, ESTALE
from pathlib import Path

import numpy as np
from tqdm import tqdm

from library.data.cache import write_whole
from library.data.images import EXTENSIONS
from library.data.sources.folder import walk
from library.data.sources.rows import Text, flatten, settle
from library.data.sources.tars import Content, read_tar
from library.data.specs import Origin
from library.errors import UserError
from library.training import processes, watch

_VERSION = 1    # of the index
_OPEN = 64      # tars that are kept open
_PACKED = (".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst")


class Shards:
    """Images in the tars of a folder, or in one tar, in the order of tars and members. The interface of all sources:
    `open_source`. A row is named "<tar>/<member>". Raises `UserError`, naming tars and members that cannot be used."""

    window = None

    def __init__(self, origin: Origin, index_dir: Path, skip_bad: bool):
        self.place = origin.path
        if origin.captions in ("table", "metadata"):
            raise UserError(f"{origin.flag}: tars have their captions in .json and .txt members, not in a {origin.captions}")
        tars, self._status, self.left_out, self.notes = _find(origin)
        self._root = os.path.abspath(origin.path if os.path.isdir(origin.path) else os.path.dirname(origin.path))
        self._tars = np.array(tars, Text)
        names, texts, counts, where, images = [np.zeros(0, Text)], [np.zeros(0, Text)], [np.zeros(1, np.int64)], [], []
        loose, shared = _Few(), _Few()
        indexes = _indexes([f"{self._root}/{tar}" for tar in tars], self._status, origin, index_dir)
        for tar, index in zip(tars, indexes, strict=True):
            names.append(np.array([f"{tar}/{name}" for name in index["names"]], Text))
            texts.append(np.array(index["texts"], Text))
            counts.append(index["counts"])
            where.append(index["where"])
            images.append(len(index["names"]))
            if index["end"]:
                self.left_out.append((f"{tar} behind its first {images[-1]} images" if images[-1] else tar, index["end"]))
            self.left_out += [(f"{tar}/{name}", reason) for name, reason in index["faults"]]
            loose.add(tar, *index["loose"])
            shared.add(tar, *index["shared"])
        if loose.count:
            self.notes.append(f"{loose.count} members of tars in {self.place} are not used, as they belong to no image or to a "
                              f"sample that has one: {loose}")
        if shared.count:
            self.notes.append(f"{shared.count} images in {self.place} share a caption with another one: {shared}")
        if not self.left_out and not sum(images):
            raise UserError(f"{origin.flag}: the tars of {self.place} hold no image ({' '.join(EXTENSIONS)})")
        self.notes += settle(self.left_out, len(self.left_out) + sum(images), self.place, skip_bad, "tars and images")
        self.names, self.texts = np.concatenate(names), np.concatenate(texts)
        self.text_start = np.cumsum(np.concatenate(counts))
        self._where = np.concatenate(where or [np.zeros((0, 2), np.int64)])    # [N, 2]: first byte, number of bytes
        self._tar = np.repeat(np.arange(len(tars), dtype=np.int32), images)

    def read(self, row: int) -> bytes:
        tar, (offset, size) = self._tar[row], self._where[row].tolist()
        length, mtime, _ = self._status[tar].tolist()
        handle = _open(f"{self._root}/{self._tars[tar]}", length, mtime)    # kept by name: it stays open until the end of this
        data = os.pread(handle.number, size, offset)
        if len(data) < size:
            raise OSError(EIO, f"{self._tars[tar]} ends within it")
        return data

    def stamp(self, row: int) -> tuple[str, int, int, int]:
        """Of the tar as it was indexed; the place of the member goes into the last number."""
        offset, size = self._where[row].tolist()
        _, mtime, ctime = self._status[self._tar[row]].tolist()
        return self._identity(self.names[row], self._tars[self._tar[row]]), size, mtime, ctime ^ offset

    def stamps(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """`stamp` of all rows, without their identity: three of [N] int64."""
        status = self._status[self._tar]
        return self._where[:, 1].copy(), status[:, 1], status[:, 2] ^ self._where[:, 0]

    def identities(self) -> list[str]:
        """What `stamp` calls each row."""
        tars = self._tars.tolist()
        return [self._identity(name, tars[tar]) for name, tar in zip(self.names.tolist(), self._tar.tolist(), strict=True)]

    def _identity(self, name: str, tar: str) -> str:
        return f"{self._root}/{tar}!{name[len(tar) + 1:]}"


def _find(origin: Origin) -> tuple[list[str], np.ndarray, list[tuple[str, str]], list[str]]:
    """Names of the tars, sorted; their size, mtime and ctime [T, 3]; what cannot be used; notes."""
    if os.path.isfile(origin.path):
        status = os.stat(origin.path)
        return ([os.path.basename(origin.path)], np.array([[status.st_size, status.st_mtime_ns, status.st_ctime_ns]]), [], [])
    found = walk(origin.path, (".tar",), origin.flag)
    packed = [(name, "that are compressed, and so not readable in any order: unpack them to plain .tar")
              for name in found.others if name.lower().endswith(_PACKED)]
    if not found.names and not packed and not found.faults:
        raise UserError(f"{origin.flag}: {origin.path} holds no .tar")
    return found.names, found.status, found.faults + packed, found.notes


def _indexes(paths: list[str], status: np.ndarray, origin: Origin, index_dir: Path):
    """The index of every tar, in turn: remembered, or made now. Each process makes those of its share first.

    Tars that lie on each machine apart are indexed on each, even where their indices lie in one folder.
    """
    watch.now("indexing tars")
    same, where = processes.alike(hashlib.blake2b(json.dumps([paths, status.tolist()]).encode()).digest())
    team = processes.team(index_dir)
    sharers = [rank for rank in team if rank in same]
    settings = [_VERSION, origin.captions, origin.caption_column, origin.fallback_column, origin.extensions, origin.lines,
                origin.phrases, *([] if sharers == team else [where])]
    files = [index_dir / f"tar-{hashlib.blake2b(json.dumps([path, *settings]).encode(), digest_size=16).hexdigest()}.npz"
             for path in paths]
    todo = [row for row, file in enumerate(files) if _unpack(file, status[row], whole=False) is None]
    processes.meet()    # all look before any writes: the shares are of one list
    unwritten: dict[int, bytes] = {}
    mine = processes.share(todo, sharers)
    for row in tqdm(mine, desc="index", unit="tar", disable=not processes.is_main() or not mine):
        data = _pack(_read_tar(paths[row], origin), status[row])
        try:
            index_dir.mkdir(parents=True, exist_ok=True)
            write_whole(files[row], data)
        except OSError as error:
            if not isinstance(error, PermissionError) and error.errno != EROFS:
                raise
            unwritten[row] = data    # a folder shared read-only
    processes.meet()
    for row, (path, file) in enumerate(zip(paths, files, strict=True)):
        index = _unpack(unwritten.pop(row, file), status[row])
        # another process made it where this one cannot see it
        yield index or _unpack(_pack(_read_tar(path, origin), status[row]), status[row])


def _read_tar(path: str, origin: Origin) -> Content:
    try:
        return read_tar(path, origin)
    except OSError as error:
        return Content(end=f"not readable ({error.strerror})")


def _pack(content: Content, status: np.ndarray) -> bytes:
    """An index as a file: strings as one text and the length of each, since .npz knows only fixed lengths."""
    texts, start = flatten(content.captions)
    about = {"end": content.end, "faults": content.faults, "loose": [len(content.loose), content.loose[:5]],
             "shared": [len(content.shared), content.shared[:5]]}
    strings = [json.dumps(about), *content.names, *texts.tolist()]
    file = io.BytesIO()
    np.savez(file, status=status, where=np.array([content.offsets, content.sizes], np.int64).T, counts=np.diff(start),
             lengths=np.array([len(each) for each in strings], np.int64),
             text=np.frombuffer("".join(strings).encode(), np.uint8))
    return file.getvalue()


def _unpack(file: Path | bytes, status: np.ndarray, whole: bool = True) -> dict | None:
    """names, texts, captions a row, (first byte, number of bytes) of a tar, and what `_pack` has about it. None for an index
    that is lost, cut off or of another state of the tar; not `whole`: without reading all of it."""
    try:
        with np.load(io.BytesIO(file) if isinstance(file, bytes) else file, allow_pickle=False) as index:
            if (index["status"] != status).any():
                return None
            if not whole:
                return {}
            text, ends, counts = index["text"].tobytes().decode(), np.cumsum(index["lengths"]).tolist(), index["counts"]
            strings = [text[start:end] for start, end in zip(ends, ends[1:], strict=False)]
            return {"names": strings[:len(counts)], "texts": strings[len(counts):], "counts": counts, "where": index["where"],
                    **json.loads(text[:ends[0]])}
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None


class _Few:
    """How many there are, and the names of the first."""

    def __init__(self):
        self.count, self._first = 0, []

    def add(self, tar: str, count: int, names: list[str]) -> None:
        self.count += count
        self._first += [f"{tar}/{name}" for name in names[:5 - len(self._first)]]

    def __str__(self) -> str:
        return ", ".join(self._first) + (f" and {self.count - 5} more" if self.count > 5 else "")


class _Handle:
    """An open file that closes when nobody reads it any more: also not while it falls out of the last ones used."""

    number = -1

    def __init__(self, path: str):
        self.number = os.open(path, os.O_RDONLY)

    def __del__(self):
        if self.number >= 0:
            os.close(self.number)


@functools.lru_cache(_OPEN)
def _open(path: str, size: int, mtime: int) -> _Handle:
    """Reading by `pread` moves no position, so threads and forked processes may share it."""
    handle = _Handle(path)
    status = os.fstat(handle.number)
    if (status.st_size, status.st_mtime_ns) != (size, mtime):
        raise OSError(ESTALE, f"{path} was changed after it was indexed: start again")
    return handle

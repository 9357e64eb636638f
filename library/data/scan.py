"""Size and content of every image, remembered: the second look at a data set reads no image at all.

The index is one .npy file of fixed records, sorted by the hash of the image's path. A record holds as long as
the file's size, mtime and ctime are the same.
"""

import hashlib
import io
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from tqdm import tqdm

from library.data import images
from library.data.cache import sweep, write_whole
from library.errors import UserError
from library.training import processes

RECORD = np.dtype([("name", "S32"), ("size", "i8"), ("mtime", "i8"), ("ctime", "i8"),
                   ("width", "i4"), ("height", "i4"), ("content", "S32"), ("sound", "?")])
_THREADS = min(8, os.cpu_count() or 1)


def scan(source, index_dir: Path, decode: bool) -> tuple[np.ndarray, dict[int, str]]:
    """Records [N] of all rows of `source`, and why a row is bad (its record is then meaningless).

    decode: also decode every image once, for runs that meet the pixels only while training.
    """
    rows = len(source.names)
    found = np.zeros(rows, RECORD)
    found["width"] = found["height"] = 1    # of a bad image, so that nothing divides by zero
    for row, (name, *status) in enumerate(_map(lambda row: _stamp(source, row), range(rows))):
        found[row]["name"] = _digest(name.encode())
        found[row]["size"], found[row]["mtime"], found[row]["ctime"] = status
    sweep(index_dir)
    path = index_dir / f"{_digest(os.path.abspath(source.place).encode()).decode()}.npy"
    known = _match(found, _load(path))
    todo = np.flatnonzero(~known | (decode & ~found["sound"])).tolist()

    mine, faults = todo[processes.rank()::processes.world()], []
    bar = tqdm(total=len(mine), desc="scan", unit="image", disable=not processes.is_main() or not mine)
    for row, (record, fault) in zip(mine, _map(lambda row: _look(source, row, found[row], decode), mine), strict=True):
        found[row] = record
        faults += [(row, fault)] if fault else []
        bar.update()
    bar.close()
    for share, records in processes.gather([(mine, found[mine])]):
        found[share] = records
    faults = dict(processes.gather(faults))
    good = np.ones(rows, bool)
    good[list(faults)] = False
    if processes.is_main() and todo:
        _save(path, found[good])
    return found, faults


def name_faults(faults: dict[int, str], source, skip: bool, what: str = "cannot be read") -> str | None:
    """Stop on bad images, naming all of them; or, with `skip`, the note that says how many are left out."""
    if not faults:
        return None
    lines = "".join(f"\n  {source.names[row]}: {fault}" for row, fault in sorted(faults.items()))
    if skip:
        return f"{len(faults)} of {len(source.names)} images {what} and are left out:{lines}"
    raise UserError(f"{len(faults)} of {len(source.names)} images in {source.place} {what}:{lines}\n"
                    "Mend or remove them, or leave them out with --skip_bad_images")


def _look(source, row: int, record: np.ndarray, decode: bool) -> tuple[np.ndarray, str | None]:
    record = record.copy()
    try:
        data = source.read(row)
        record["width"], record["height"] = images.read_size(data)
        record["content"] = _digest(data)
        if decode:
            images.verify(data)
        record["sound"] = decode
    except images.BadImage as error:
        return record, str(error)
    except OSError as error:
        return record, error.strerror or str(error)
    return record, None


def _stamp(source, row: int) -> tuple[str, int, int, int]:
    try:
        return source.stamp(row)
    except OSError:    # a dangling link, say: reading it will name the reason
        return str(source.names[row]), -1, 0, 0


def _map(function, rows):
    with ThreadPoolExecutor(_THREADS) as pool:
        # in slices: a million waiting futures would take a gigabyte
        for start in range(0, len(rows), 4096):
            yield from pool.map(function, rows[start:start + 4096])


def _match(found: np.ndarray, index: np.ndarray) -> np.ndarray:
    """Copy what the index knows of unchanged files into `found`; [N] bool, whether it knew."""
    if not len(index):
        return np.zeros(len(found), bool)
    at = np.minimum(np.searchsorted(index["name"], found["name"]), len(index) - 1)
    known = np.ones(len(found), bool)
    for field in ("name", "size", "mtime", "ctime"):
        known &= index[field][at] == found[field]
    for field in ("width", "height", "content", "sound"):
        found[field][known] = index[field][at[known]]
    return known


def _load(path: Path) -> np.ndarray:
    """The index, or an empty one: what is lost or unreadable here is only looked up again."""
    try:
        index = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return np.zeros(0, RECORD)
    return index if index.dtype == RECORD else np.zeros(0, RECORD)


def _save(path: Path, records: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    content = io.BytesIO()    # np.save to a file says nothing of a full disk
    np.save(content, np.sort(records, order="name"), allow_pickle=False)
    write_whole(path, content.getbuffer())


def _digest(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=16).hexdigest().encode()

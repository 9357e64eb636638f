"""Size and content of every image, remembered: the second look at a data set reads no image at all.

The index is one .npy file of fixed records, sorted by the hash of what the image is called. A record holds as long
as the file's size, mtime and ctime are the same.
"""

import hashlib
import io
import os
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import numpy as np
from tqdm import tqdm

from library.data import images
from library.data.cache import sweep, write_whole
from library.errors import UserError
from library.training import agreement, processes, watch

# name, more: the two halves of a 128-bit hash of what the image is called. Numbers sort five times as fast as text
RECORD = np.dtype([("name", "u8"), ("more", "u8"), ("size", "i8"), ("mtime", "i8"), ("ctime", "i8"),
                   ("width", "i4"), ("height", "i4"), ("content", "S32"), ("sound", "?")])
_STATUS = ("size", "mtime", "ctime")
_THREADS = min(8, 2 * (os.cpu_count() or 1))    # they wait for the disk; more would wait for each other
_PIECE = 32    # rows a thread takes at once: handing over one costs as much as looking at a small image


def scan(source, index_dir: Path, decode: bool, only_known: bool = False) -> tuple[np.ndarray, dict[int, str]]:
    """Records [N] of all rows of `source`, and why a row is bad (its record is then meaningless).

    decode: also decode every image once, for runs that meet the pixels only while training.
    only_known: what the index knows of a row by its name is taken as it was, and its file not even looked for.
    With several processes, those that see the same files each look at a share, and return the same. Where every machine has
    a copy of its own, each looks at its own; what is bad in one of them is bad. Interrupted, it keeps what it has seen.
    """
    watch.now(f"scanning {source.place}")
    agreement.check_names(source.names, source.place)
    found = np.zeros(len(source.names), RECORD)
    found["width"] = found["height"] = 1    # of a bad image, so that nothing divides by zero
    sweep(index_dir)
    order = _order(source)
    if not (only_known and order):
        _stamp(source, found, np.arange(len(found)))
    same, where = processes.alike(hashlib.blake2b(b"".join(found[field].tobytes() for field in _STATUS)).digest())
    team = processes.team(index_dir)
    sharers = [rank for rank in team if rank in same]
    # copies of several machines, which have one name and an index in one folder
    place = os.path.abspath(source.place) + ("" if sharers == team else f" of {where}")
    path = index_dir / f"{hashlib.blake2b(place.encode(), digest_size=16).hexdigest()}.npy"
    index = _load(path)
    as_before = bool(order) and index["content"][0] == order    # then no name need be looked up
    if as_before:
        found["name"], found["more"] = (index[field][1:len(found) + 1] for field in ("name", "more"))
    elif order:
        found["name"], found["more"] = _hashes(source.identities())
    known = index[1:len(found) + 1] if as_before else _look_up(index[1:], found)
    done = _recall(found, known, () if only_known else _STATUS) & (found["sound"] | (not decode))
    views = processes.gather([done])
    done = np.logical_and.reduce([views[rank] for rank in same])    # one view: another run may be writing the index
    todo = np.flatnonzero(~done)
    if only_known:
        _stamp(source, found, todo)

    mine, faults = np.array_split(todo, len(same))[same.index(processes.rank())].tolist(), []
    bar = tqdm(total=len(mine), desc="scan", unit="image", disable=not processes.is_main() or not mine)
    try:
        with closing(_map(source, lambda row: _look(source, row, decode), mine)) as looks:
            for row, (width, height, content, fault) in zip(mine, looks, strict=True):
                found["width"][row], found["height"][row], found["content"][row] = width, height, content
                found["sound"][row], done[row] = decode, not fault
                faults += [(row, fault)] if fault else []
                bar.update()
        seen = processes.gather([(mine, found[mine], done[mine])])
        for rows, records, good in (seen[rank] for rank in same):
            found[rows], done[rows] = records, good
    finally:
        bar.close()
        if processes.rank() == sharers[0] and (done[todo].any() or (order and not as_before)):
            _save(path, found, done, index[1:], order)
    return found, dict(processes.gather(faults))


def name_faults(faults: dict[int, str], source, skip: bool, what: str = "cannot be read") -> str | None:
    """Stop on bad images, naming all of them; or, with `skip`, the note that says how many are left out."""
    if not faults:
        return None
    lines = "".join(f"\n  {source.names[row]}: {fault}" for row, fault in sorted(faults.items()))
    if skip:
        return f"{len(faults)} of {len(source.names)} images {what} and are left out:{lines}"
    raise UserError(f"{len(faults)} of {len(source.names)} images in {source.place} {what}:{lines}\n"
                    "Mend or remove them, or leave them out with --skip_bad_images")


def _look(source, row: int, decode: bool) -> tuple[int, int, bytes, str | None]:
    """(width, height, hash of the content, what is wrong)."""
    try:
        data = source.read(row)
        size = images.read_size(data)
        if decode:
            images.verify(data)
        return *size, hashlib.blake2b(data, digest_size=16).hexdigest().encode(), None
    except images.BadImage as error:
        return 1, 1, b"", str(error)
    except OSError as error:
        return 1, 1, b"", error.strerror or str(error)


def _order(source) -> bytes:
    """Hash of the names of a source that knows all its stamps at once, in their order; of another one, nothing."""
    if not hasattr(source, "stamps"):
        return b""
    return hashlib.blake2b("\0".join(source.names.tolist()).encode(), digest_size=16).hexdigest().encode()


def _stamp(source, found: np.ndarray, rows: np.ndarray) -> None:
    """Fill in size and times of `rows`, and the names where the source tells them only with those."""
    if hasattr(source, "stamps"):
        for field, values in zip(_STATUS, source.stamps(), strict=True):
            found[field][rows] = values[rows]
        return

    def look(row):
        try:
            return source.stamp(row)
        except OSError:    # a dangling link, say: reading it will name the reason
            return str(source.names[row]), -1, 0, 0

    names = []
    for row, (name, *status) in zip(rows, _map(source, look, rows.tolist()), strict=True):
        names.append(name)
        for field, value in zip(_STATUS, status, strict=True):
            found[field][row] = value
    found["name"][rows], found["more"][rows] = _hashes(names)


def _hashes(names: list[str]) -> np.ndarray:
    """[2, N] uint64: 128 bits of each name, which may hold bytes that are not UTF-8, as file names do."""
    digests = [hashlib.blake2b(name.encode(errors="surrogateescape"), digest_size=16).digest() for name in names]
    return np.frombuffer(b"".join(digests), "u8").reshape(-1, 2).T


def _map(source, function, rows: list[int]):
    """function(row) of all `rows`, in their order. A source that streams is read by one thread, from front to back."""
    threads = 1 if getattr(source, "window", None) is not None else _THREADS
    pool, waiting = ThreadPoolExecutor(threads), deque()
    try:
        for start in range(0, len(rows), _PIECE):
            waiting.append(pool.submit(lambda piece: [function(row) for row in piece], rows[start:start + _PIECE]))
            if len(waiting) > 2 * threads:    # a million waiting futures would take a gigabyte
                yield from waiting.popleft().result()
        while waiting:
            yield from waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def _look_up(index: np.ndarray, found: np.ndarray) -> np.ndarray:
    """The record of the same name for each of `found` [N]; one of no width where there is none."""
    if not len(index):
        return np.zeros(len(found), RECORD)
    by_name, asked = np.argsort(index["name"]), np.argsort(found["name"])
    at = np.empty(len(found), np.int64)    # of names in their order: a fifth of the time
    at[asked] = np.searchsorted(index["name"][by_name], found["name"][asked])
    known = index[by_name[np.minimum(at, len(index) - 1)]]
    known["width"][(known["name"] != found["name"]) | (known["more"] != found["more"])] = 0
    return known


def _recall(found: np.ndarray, known: np.ndarray, fields: tuple[str, ...]) -> np.ndarray:
    """Copy into `found` [N] what is `known` [N] of it and the same in all `fields`; [N] bool, whether it is."""
    same = known["width"] > 0
    for field in fields:
        same &= known[field] == found[field]
    np.copyto(found, known, where=same)
    return same


def _load(path: Path) -> np.ndarray:
    """The index, or only a heading: what is lost or unreadable here is looked up again."""
    try:
        index = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return np.zeros(1, RECORD)
    return index if index.dtype == RECORD and len(index) else np.zeros(1, RECORD)


def _save(path: Path, found: np.ndarray, done: np.ndarray, index: np.ndarray, order: bytes) -> None:
    """Write `found`, and what the index had beside it: another set of the run may be a part of the same folder."""
    heading, rows = np.zeros(1, RECORD), found.copy()
    heading["content"], rows["width"][~done] = order, 0
    index = index[(index["width"] > 0) & ~np.isin(index["name"], found["name"])]
    content = io.BytesIO()    # np.save to a file says nothing of a full disk
    np.save(content, np.concatenate([heading, rows, index]), allow_pickle=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        write_whole(path, content.getbuffer())
    except PermissionError:    # a cache shared read-only
        return

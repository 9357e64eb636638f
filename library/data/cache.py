"""Tensors kept on disk under the hash of what made them (content, size, cut, encoder, precision).

Few large safetensors shards, each written under a temporary name, synced and renamed: a crash loses at most the
shard being written. Every shard carries a checksum a tensor; one that is new, truncated or altered since it was last
seen whole is checked at the start, and made again when it fails. Reading is by memory map.
"""

import hashlib
import json
import os
import time
import uuid
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from library.training import processes, watch

SHARD_BYTES = 64 * 2**20    # also what a crash can cost, with SHARD_SECONDS
SHARD_SECONDS = 60
KEY = np.dtype("S32")


def make_key(*parts) -> bytes:
    """The name of a tensor: a 128-bit BLAKE2b hash of everything that made it."""
    return hashlib.blake2b(json.dumps([str(part) for part in parts]).encode(), digest_size=16).hexdigest().encode()


class Store:
    """The shards of one folder. `damaged` names those that were thrown away when it was opened. All processes open it."""

    def __init__(self, folder: Path):
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self.team = processes.team(folder)    # processes that share it, and the work
        self.leads = processes.rank() == self.team[0]
        self.damaged: list[str] = []
        self._open: dict[int, object] = {}
        self.refresh()

    def refresh(self) -> None:
        """Look at the folder anew: after this process or another has written to it."""
        self._open.clear()
        sweep(self.folder)
        self._shards = sorted(self.folder.glob("*.safetensors"))
        seen = _read_json(self.folder / "checked.json")
        keys, shard_of, state = [], [], {}
        for number, shard in enumerate(self._shards):
            try:
                status = shard.stat()
                state[shard.name] = [status.st_size, status.st_mtime_ns, status.st_ctime_ns]
                names = _read_shard(shard, check=seen.get(shard.name) != state[shard.name])
            except (SafetensorError, OSError, ValueError, KeyError, TypeError) as fault:
                self.damaged.append(f"{shard.name}: {fault}")
                state.pop(shard.name, None)
                if self.leads and not isinstance(fault, OSError):    # shared storage may fail for a moment
                    _discard(shard)
                continue
            keys += names
            shard_of += [number] * len(names)
        order = np.argsort(np.array(keys, KEY), kind="stable")
        self._keys = np.array(keys, KEY)[order]
        self._shard_of = np.array(shard_of, np.int32)[order]
        if self.leads and state != seen:
            _write_json(self.folder / "checked.json", state)

    def has(self, keys: np.ndarray) -> np.ndarray:
        """[N] bool: which of the `keys` [N] S32 are here."""
        if not len(self._keys):
            return np.zeros(len(keys), bool)
        at = np.minimum(np.searchsorted(self._keys, keys), len(self._keys) - 1)
        return self._keys[at] == keys

    def read(self, key: bytes, field: str) -> torch.Tensor:
        """One tensor, as a view of the file where the platform allows it. Raises KeyError."""
        at = int(self._keys.searchsorted(key))
        if at == len(self._keys) or self._keys[at] != key:
            raise KeyError(f"{key.decode()} is not in {self.folder}")
        number = int(self._shard_of[at])
        if number not in self._open:
            self._open[number] = safe_open(self._shards[number], framework="pt")
        return self._open[number].get_tensor(f"{key.decode()}.{field}")


class Writer:
    """Collects entries and writes them as shards. Use as a context: what is collected is written on leaving."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._clear()

    def _clear(self) -> None:
        self._tensors, self._bytes, self._since = {}, 0, time.monotonic()

    def add(self, key: bytes, **fields: torch.Tensor) -> bool:
        """Collect an entry. True if a shard was written, this entry in it."""
        for field, tensor in fields.items():
            self._tensors[f"{key.decode()}.{field}"] = tensor.contiguous()
            self._bytes += tensor.nbytes
        full = self._bytes >= SHARD_BYTES or time.monotonic() - self._since > SHARD_SECONDS
        if full:
            self.flush()
        return full

    def flush(self) -> None:
        if self._tensors:
            sums = {name: _checksum(tensor) for name, tensor in self._tensors.items()}
            name = f"{processes.rank():04d}-{uuid.uuid4().hex}"
            partial = self.folder / f"{name}.tmp"
            try:
                save_file(self._tensors, partial, metadata={"crc32": json.dumps(sums)})
                share(partial)
                sync(partial)
                os.rename(partial, self.folder / f"{name}.safetensors")
            except SafetensorError as fault:    # its writer reports a full disk so
                raise OSError(*os_error(fault), str(partial)) from fault
            finally:
                partial.unlink(missing_ok=True)
        self._clear()

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, kind, *_) -> None:
        if kind is None or not issubclass(kind, OSError):
            self.flush()


def fill(store: Store, groups: list, load, encode, advance) -> None:
    """Encode this process's share of `groups` into `store`; decoding of the next ones overlaps. All processes call this.

    groups: lists of jobs, each encoded as one batch, the same on every process that shares the store's folder.
    load(group) -> input of encode, in threads; encode(group, loaded) -> {key: {field: tensor}}.
    advance(count) is told how many jobs are done.
    """
    mine = processes.share(groups, store.team)
    threads = max(1, min(8, (os.cpu_count() or 1) - 1))
    with ThreadPoolExecutor(threads) as pool, Writer(store.folder) as writer:
        ahead = [pool.submit(load, group) for group in mine[:threads + 1]]
        for number, group in enumerate(mine):
            loaded = ahead.pop(0).result()
            if number + threads + 1 < len(mine):
                ahead.append(pool.submit(load, mine[number + threads + 1]))
            for key, fields in encode(group, loaded).items():
                writer.add(key, **fields)
            advance(len(group))
    watch.now("waiting until all have encoded their share")
    processes.meet()
    store.refresh()


def write_whole(path: Path, content: bytes) -> None:
    """Write a small file under a temporary name and rename it: it is the old one or the new one, never half of one."""
    partial = path.with_suffix(f".{uuid.uuid4().hex}.tmp")    # process ids are alike on several machines
    try:
        partial.write_bytes(content)
        os.replace(partial, path)
    except OSError as error:    # a full disk is told without a name
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        partial.unlink(missing_ok=True)


def sweep(folder: Path) -> None:
    """Remove what killed runs left half written, safetensors' own temporary files too. A living one needs seconds."""
    for partial in (*folder.glob("*.tmp"), *folder.glob(".tmp*")):
        try:
            if time.time() - partial.stat().st_mtime > 3600:
                _discard(partial)
        except FileNotFoundError:    # another process has renamed it in the meantime
            continue


def share(path: Path) -> None:
    """Give a file the mode that the umask says: safetensors 0.8 makes it private to its owner."""
    mask = os.umask(0)
    os.umask(mask)
    path.chmod(0o666 & ~mask)


def sync(path: Path) -> None:
    """Wait until a file, or a folder's list of names, is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _read_shard(shard: Path, check: bool) -> list[bytes]:
    """Keys in a shard; with `check`, after comparing every checksum. Raises ValueError for an altered one."""
    with safe_open(shard, framework="pt") as file:
        sums = json.loads(file.metadata()["crc32"])
        if check:
            wrong = [name for name in file.keys() if _checksum(file.get_tensor(name)) != sums[name]]
            if wrong:
                raise ValueError(f"{len(wrong)} tensors differ from their checksums")
    return [name.encode() for name in {name.split(".")[0]: None for name in sums}]


def _checksum(tensor: torch.Tensor) -> int:
    """Of type and shape, too: the bytes of a float32 are also those of an int32."""
    kind = zlib.crc32(f"{tensor.dtype} {list(tensor.shape)}".encode())
    return zlib.crc32(tensor.contiguous().reshape(-1).view(torch.uint8).numpy(), kind)


def _discard(path: Path) -> None:
    try:
        path.unlink(missing_ok=True)
    except PermissionError:    # a cache shared read-only: left to its owner
        return


def os_error(fault: SafetensorError) -> tuple[int, str]:
    """(errno, text) out of "...: No space left on device (os error 28)"."""
    text = str(fault)
    number = text.rpartition("os error ")[2].rstrip(") \n")
    return (int(number) if number.isdigit() else 0), text


def _read_json(path: Path) -> dict:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):    # lost or cut off: everything is checked again
        return {}


def _write_json(path: Path, content: dict) -> None:
    try:
        write_whole(path, json.dumps(content).encode())
    except PermissionError:    # a cache shared read-only
        return

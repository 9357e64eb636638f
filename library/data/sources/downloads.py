"""Images by their addresses: a table of http(s) addresses or file paths, fetched once and kept."""

import hashlib
import http.client
import os
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from urllib.parse import quote, unquote, urlsplit

import numpy as np
from tqdm import tqdm

from library.data.cache import write_whole
from library.data.sources.folder import stamp_file
from library.data.sources.rows import NO_CAPTION, Text, flatten, settle
from library.data.sources.tables import named_captions
from library.data.specs import Origin
from library.errors import UserError
from library.training import processes, watch

LARGEST = 200 * 2**20    # bytes of an image
TRIES = 3
PAUSE = 1.0              # seconds before the second try; twice that before the third
TIMEOUT = 30             # seconds without a byte
DEADLINE = 300           # seconds for all of it
_THREADS = 16
_LATER = (408, 425, 429)    # the client errors that another try may mend


class Addresses:
    """Images that a table names by address. The interface of all sources: `open_source`.

    What is fetched lies in `origin.downloads` under a hash of its address, written whole; it is not fetched again.
    Raises `UserError`, naming what cannot be fetched.
    """

    window = None

    def __init__(self, origin: Origin, index_dir: Path, skip_bad: bool):
        self.place, self.notes = origin.path, []
        self._base = os.path.dirname(os.path.abspath(origin.path))
        self._downloads = os.path.abspath(origin.downloads or index_dir / "downloads")
        phrase = origin.captions == "phrase"
        columns = replace(origin, caption_column=origin.name_column) if phrase else origin
        captions, faults = named_captions(Path(origin.path), columns, False, self.notes)
        if not captions:
            raise UserError(f"{origin.flag}: {origin.path} has no row")
        faults += [(name, NO_CAPTION) for name, caption in captions.items() if caption is None]
        wrong = {name for name, _ in faults}
        faults += self._fetch_all([name for name in captions if name not in wrong])
        self.left_out = list(dict(reversed(faults)).items())[::-1]
        wrong = {name for name, _ in faults}
        self.notes += settle(self.left_out, len(captions), self.place, skip_bad)
        rows = [name for name in captions if name not in wrong]
        self.names = np.array(rows, Text)
        self.texts, self.text_start = flatten(list(origin.phrases) if phrase else captions[name] for name in rows)

    def read(self, row: int) -> bytes:
        return Path(self._path(self.names[row])).read_bytes()

    def stamp(self, row: int) -> tuple[str, int, int, int]:
        return stamp_file(self._path(self.names[row]))

    def _path(self, address: str) -> str:
        if is_remote(address):
            return f"{self._downloads}/{hashlib.blake2b(address.encode(), digest_size=16).hexdigest()}"
        path = unquote(urlsplit(address).path) if address.startswith("file://") else address
        return os.path.normpath(os.path.join(self._base, path))

    def _fetch_all(self, addresses: list[str]) -> list[tuple[str, str]]:
        """Fetch what is not here yet, each process its share; (address, reason) of what could not be had."""
        sharers = processes.team(Path(self._downloads))
        watch.now("downloading")
        todo = [each for each in addresses if is_remote(each) and not os.path.exists(self._path(each))]
        processes.meet()    # all look before any writes: the shares are of one list
        faults = processes.gather(self._fetch(processes.share(todo, sharers)))
        failed = {name for name, _ in faults}
        # what another process fetched to where this one cannot see it
        rest = [each for each in todo if each not in failed and not os.path.exists(self._path(each))]
        return faults + processes.gather(self._fetch(rest))

    def _fetch(self, addresses: list[str]) -> list[tuple[str, str]]:
        faults = []
        if addresses:
            os.makedirs(self._downloads, exist_ok=True)
        bar = tqdm(total=len(addresses), desc="download", unit="image", disable=not processes.is_main() or not addresses)
        with ThreadPoolExecutor(_THREADS) as pool:
            for start in range(0, len(addresses), 4096):    # in slices: a million waiting futures would take a gigabyte
                part = addresses[start:start + 4096]
                for address, reason in zip(part, pool.map(lambda each: fetch(each, Path(self._path(each))), part), strict=True):
                    faults += [(address, reason)] if reason else []
                    bar.update()
        bar.close()
        return faults


def is_remote(address: str) -> bool:
    return address.lower().startswith(("http://", "https://"))


def fetch(address: str, path: Path) -> str | None:
    """Write what is at `address` to `path`; or the reason, for `settle`, why it cannot be had. Raises OSError for a full disk."""
    for turn in range(TRIES):
        time.sleep(PAUSE * turn)
        try:
            data = _download(address)
        except urllib.error.HTTPError as error:
            error.close()
            reason = f"{error.code} {error.reason}"
            if 400 <= error.code < 500 and error.code not in _LATER:
                break
        except ValueError as error:    # no address, or too much behind it
            reason = str(error)
            break
        except (OSError, http.client.HTTPException) as error:
            reason = str(getattr(error, "reason", error)) or type(error).__name__
        else:
            write_whole(path, data)
            return None
    return f"that cannot be fetched ({reason})"


def _download(address: str) -> bytes:
    """Raises OSError, HTTPException or ValueError."""
    request = urllib.request.Request(quote(address, safe="%/:=&?~#+!$,;'@()*[]"),
                                     headers={"User-Agent": "Mozilla/5.0 (compatible)"})    # some refuse Python's own
    parts, size, start = [], 0, time.monotonic()
    with urllib.request.urlopen(request, timeout=TIMEOUT) as answer:
        while part := answer.read(2**16):
            parts.append(part)
            size += len(part)
            if size > LARGEST:
                raise ValueError(f"larger than {LARGEST >> 20} MB")
            if time.monotonic() - start > DEADLINE:
                raise TimeoutError(f"not whole after {DEADLINE} seconds")
        promised = answer.headers.get("Content-Length", "")
        if promised.isdigit() and int(promised) != size:
            raise OSError(f"broke off after {size} of {promised} bytes")
    return b"".join(parts)

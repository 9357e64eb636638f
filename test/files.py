"""Image files for the tests of the data, and a change that only the file system's own clock betrays."""

import io
import os
import time
from pathlib import Path

from tiny import picture


def png(number: int, size=(24, 16)) -> bytes:
    data = io.BytesIO()
    picture(*size, number).save(data, "PNG")
    return data.getvalue()


def replace_quietly(path: Path, data: bytes) -> None:
    """Other bytes, of the same number, under the same time of change."""
    status = path.stat()
    time.sleep(0.02)    # the clock of a file system ticks every few milliseconds
    path.write_bytes(data.ljust(status.st_size, b"\0")[:status.st_size])
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (status.st_size, status.st_mtime_ns)

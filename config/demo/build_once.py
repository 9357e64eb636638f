"""A folder is made whole or not at all, and made again only when what it was made from has changed."""

import hashlib
import shutil
from pathlib import Path

MARK = ".made_from"  # hidden, so that no image scan takes it for a caption


def build_once(out, sources, build, options=""):
    """Call build(folder) unless `out` was made from the same `sources` (files) and `options` (text); return whether it was.

    A folder without our mark is somebody else's, and is never touched.
    """
    out = Path(out)
    mark = hashlib.sha256(b"".join(Path(source).read_bytes() for source in sources) + options.encode()).hexdigest()
    if out.exists() and not (out / MARK).is_file():
        raise SystemExit(f"{out} exists and was not made by this script: name another folder, or remove it")
    if out.exists() and (out / MARK).read_text() == mark:
        return False
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    build(partial)
    (partial / MARK).write_text(mark)
    if out.exists():
        shutil.rmtree(out)
    partial.rename(out)
    return True

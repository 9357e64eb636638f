"""A diffusers folder written part by part: an older one in its place is whole until the new part is."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from library.data.cache import os_error, share, sync


def write_folder(target: Path, writers: dict[str, Callable[[Path], object]], index: dict) -> None:
    """Write `target`, a folder for each part and model_index.json last.

    writers: {name of the part: what writes it into the folder it is given}. Each part is written beside and renamed, so that
    a part is never half there. Raises OSError when the disk is full.
    """
    target.mkdir(parents=True, exist_ok=True)
    staging = target / ".saving.tmp"
    shutil.rmtree(staging, ignore_errors=True)
    try:
        for part, write in writers.items():
            write(staging / part)
        for path in sorted(staging.rglob("*")):
            if path.is_file():
                share(path)
            sync(path)
        for part in sorted(staging.iterdir()):
            _replace_folder(part, target / part.name)
        (staging / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")
        os.replace(staging / "model_index.json", target / "model_index.json")
    except Exception as error:
        if type(error).__name__ == "SafetensorError":    # its writer reports a full disk so
            raise OSError(*os_error(error), str(target)) from error
        raise
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _replace_folder(new: Path, target: Path) -> None:
    old = new.with_name(f"{new.name}.old")
    if target.exists():
        os.rename(target, old)
    os.rename(new, target)
    shutil.rmtree(old, ignore_errors=True)

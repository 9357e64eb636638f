"""Mistakes a user can mend, and how a script ends on them: one sentence, exit status 2, no traceback."""

import contextlib
import errno
import os
import sys

_NO_SPACE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
ended_on = ""    # the message that ended this process, for the others of its run
_NO_ACCESS = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.EIO}


class UserError(Exception):
    """Something the user can mend. The message says what is wrong, which file or flag, and what to do."""


@contextlib.contextmanager
def exit_on_user_error(program: str):
    """Print a `UserError` (or what the disk refuses) as one message and leave with status 2; with 130 on Ctrl-C."""
    global ended_on
    try:
        yield
    except UserError as error:
        message = str(error)
    except OSError as error:
        if error.errno in _NO_SPACE:
            message = disk_full(error)
        elif error.errno in _NO_ACCESS and error.filename:
            message = f"{error.filename}: {error.strerror}. Give this user the right to it, or name another place"
        else:
            raise
    except KeyboardInterrupt:    # before the first step: what is cached so far is kept
        ended_on = "interrupted"
        _close_bars()
        print(f"{program}: interrupted", file=sys.stderr, flush=True)
        sys.exit(130)
    else:
        return
    ended_on = message
    _close_bars()
    print(f"{program}: error: {message}", file=sys.stderr, flush=True)
    sys.exit(2)


def explain_imports(program: str) -> None:
    """Have a PyTorch that cannot load what belongs to a device end in one sentence, too: it fails in `import torch`."""
    def hook(kind, error, traceback):
        if not (issubclass(kind, RuntimeError) and "backend extension" in str(error)):
            return sys.__excepthook__(kind, error, traceback)
        what = f"PyTorch: {str(error).partition('. ')[0]} ({error.__cause__})"
        print(f"{program}: error: {what}. If it is torch_npu: `source set_env.sh` of CANN first, install the version that "
              "belongs to this torch, or `pip uninstall torch-npu`", file=sys.stderr, flush=True)
        os._exit(2)    # Python's own status would be 1; nothing has begun that could be left half done

    sys.excepthook = hook


def _close_bars() -> None:
    """End the line of a progress bar: the message has its own."""
    tqdm = sys.modules.get("tqdm")
    for bar in list(getattr(tqdm.tqdm, "_instances", ())) if tqdm else ():
        bar.close()


def disk_full(error: OSError) -> str:
    """The sentence for a failed write: what could not be written, and that nothing older was touched."""
    where = f" while writing {error.filename}" if error.filename else ""
    return f"no space left on the disk{where} ({error.strerror}). Free some space and run the same command again."

"""Mistakes a user can mend, and how a script ends on them: one sentence, exit status 2, no traceback."""

import contextlib
import errno
import sys

_NO_SPACE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


class UserError(Exception):
    """Something the user can mend. The message says what is wrong, which file or flag, and what to do."""


@contextlib.contextmanager
def exit_on_user_error(program: str):
    """Print a `UserError` (or a full disk) as one message and leave with status 2; with 130 on Ctrl-C."""
    try:
        yield
    except UserError as error:
        message = str(error)
    except OSError as error:
        if error.errno not in _NO_SPACE:
            raise
        message = disk_full(error)
    except KeyboardInterrupt:    # before the first step: what is cached so far is kept
        print(f"{program}: interrupted", file=sys.stderr, flush=True)
        sys.exit(130)
    else:
        return
    print(f"{program}: error: {message}", file=sys.stderr, flush=True)
    sys.exit(2)


def disk_full(error: OSError) -> str:
    """The sentence for a failed write: what could not be written, and that nothing older was touched."""
    where = f" while writing {error.filename}" if error.filename else ""
    return f"no space left on the disk{where} ({error.strerror}). Free some space and run the same command again."

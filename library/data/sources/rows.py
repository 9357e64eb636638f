"""What all sources share: captions in columns, how a caption file is read, and the rule for what cannot be a row."""

import posixpath
from collections.abc import Iterable
from itertools import islice

import numpy as np

from library.errors import UserError

Text = np.dtypes.StringDType()
LARGEST = 64 * 2**20    # bytes of a caption: a larger file is something else
_SLICE = 65536          # rows that are Python objects at one time
Caption = str | list[str]
NO_CAPTION = "without a caption"


def flatten(captions: Iterable[Caption]) -> tuple[np.ndarray, np.ndarray]:
    """The captions of N rows -> (all texts [M] StringDType, where those of each row start [N + 1] int64)."""
    parts, counts, captions = [np.zeros(0, Text)], [np.zeros(1, np.int64)], iter(captions)
    while several := list(islice(captions, _SLICE)):
        counts.append(np.array([1 if isinstance(each, str) else len(each) for each in several]))
        parts.append(np.array([text for each in several for text in ((each,) if isinstance(each, str) else each)], Text))
    return np.concatenate(parts), np.cumsum(np.concatenate(counts))


def settle(faults: list[tuple[str, str]], total: int, place: str, skip_bad: bool, what: str = "images") -> list[str]:
    """Stop on what cannot be a row; or, with `skip_bad`, the notes that say how many are left out and why.

    faults: (name, reason), the reason as it follows on the name: "without a caption". total: how many were looked at.
    Raises `UserError` with all of them, the first hundred of a reason by name.
    """
    by_reason: dict[str, list[str]] = {}
    for name, reason in faults:
        by_reason.setdefault(reason, []).append(name)
    if faults and not skip_bad:
        lines = "".join(f"\n  {reason}: {few(names, 100)}" for reason, names in by_reason.items())
        raise UserError(f"{len(faults)} of {total} {what} in {place} cannot be used:{lines}\n"
                        "Mend or remove them, or leave them out with --skip_bad_images")
    return [f"{len(names)} {what} {reason} are left out: {few(names)}" for reason, names in by_reason.items()]


def decode(data: bytes, name: str) -> str:
    """The text of a caption file: UTF-8, or UTF-16 with a byte order mark; line ends as line feeds.

    Raises ValueError, the reason for `settle`.
    """
    wide = data[:2] in (b"\xff\xfe", b"\xfe\xff") and data[:4] != b"\xff\xfe\0\0"    # those four begin UTF-32
    try:
        text = data.decode("utf-16" if wide else "utf-8-sig")
    except UnicodeDecodeError as error:
        kind = "UTF-16, as its first bytes say" if wide else "UTF-8"
        raise ValueError(f"whose caption file {name} is not {kind} (byte {error.start}): save it as UTF-8") from None
    return text.replace("\r\n", "\n").replace("\r", "\n") if "\r" in text else text


def split(text: str, lines: str) -> Caption:
    """The caption, or captions, in the text of a file. lines: as in `Origin`."""
    if lines == "whole":
        return text.strip()
    each = [line.strip() for line in text.strip("\n").split("\n")]
    return each[0] if lines == "first" else [line for line in each if line] or ""


def as_caption(value, where: str) -> Caption | None:
    """A value of a table as a caption; None for what is empty there. Raises ValueError, the reason for `settle`."""
    if value is None or value != value:    # NaN is pandas' word for nothing
        return None
    texts = list(value) if isinstance(value, (list, tuple, np.ndarray)) else [value]
    if not texts or not all(isinstance(text, str) for text in texts):
        raise ValueError(f"whose caption is neither text nor a list of texts but {str(value)[:80]!r} ({where})")
    if not all(is_text(text) for text in texts):
        raise ValueError(f"whose caption holds half a surrogate pair, which no text has ({where})")
    return texts[0] if len(texts) == 1 else texts


def is_text(text: str) -> bool:
    """Whether UTF-8 can write it: file names and JSON may hold what it cannot."""
    try:
        return text.isascii() or text.encode() is not None
    except UnicodeEncodeError:
        return False


def file_name_caption(name: str) -> str:
    """`b/a_red_cat.png` -> "a red cat"."""
    return posixpath.splitext(posixpath.basename(name))[0].replace("_", " ")


def few(names: list[str], count: int = 5) -> str:
    return ", ".join(names[:count]) + (f" and {len(names) - count} more" if len(names) > count else "")

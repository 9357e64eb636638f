"""One tar of samples, read once from front to back: where its images are, what their captions are, what is wrong.

Members belong to one sample as in webdataset: same folder, same file name up to its first dot. What a name in a tar says
is never opened, written or followed; it is only a name.
"""

import json
import os
import tarfile
from dataclasses import dataclass, field

from library.data.images import EXTENSIONS
from library.data.sources.rows import LARGEST, NO_CAPTION, Caption, as_caption, decode, file_name_caption, is_text, split
from library.data.specs import Origin

_BLOCK = 512
_PACKED = {"gzip": (0, b"\x1f\x8b\x08"), "bzip2": (4, b"1AY&SY"), "xz": (0, b"\xfd7zXZ\0"), "zstd": (0, b"\x28\xb5\x2f\xfd")}


@dataclass
class Content:
    """Rows of a tar, in the order of its images: name, first byte, number of bytes, caption.

    end: what ends the tar before its end, if anything. faults: (name, reason) of members that are no rows.
    loose: members that belong to no image, or to a sample that has one. shared: images that share their caption with another.
    """

    names: list[str] = field(default_factory=list)
    offsets: list[int] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    captions: list[Caption] = field(default_factory=list)
    end: str = ""
    faults: list[tuple[str, str]] = field(default_factory=list)
    loose: list[str] = field(default_factory=list)
    shared: list[str] = field(default_factory=list)


def read_tar(path: str, origin: Origin) -> Content:
    """What is in a tar. One that is cut off is read up to there. Raises OSError if it cannot be opened."""
    content = Content()
    with open(path, "rb") as file:
        head = file.read(16)
        for kind, (at, mark) in _PACKED.items():
            if head[at:at + len(mark)] == mark:
                content.end = f"packed with {kind}, and so not readable in any order: unpack them to plain .tar"
                return content
        file.seek(0)
        members = _list(file, content)
        _group(file.fileno(), members, origin, content)
    return content


def _list(file, content: Content) -> dict[str, tuple[int, int]]:
    """(first byte, number of bytes) of every file by its name. Fills `end` and `faults`."""
    members, twice, last = {}, set(), ""
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            while (member := tar.next()) is not None:
                tar.members = []    # it would keep all of them
                name = last = member.name.removeprefix("./")
                reason = _unsafe(member, name)
                if reason:
                    content.faults.append((name if is_text(name) else ascii(name)[1:-1], reason))
                elif member.type in tarfile.REGULAR_TYPES and not (name.startswith(".") or "/." in name):    # hidden
                    if name in members:
                        twice.add(name)
                    members[name] = member.offset_data, member.size
        tail = os.pread(file.fileno(), 2**20, tar.offset)    # a tar ends with blocks of zeros
        if len(tail) < _BLOCK or any(tail):
            content.end = (f"damaged at byte {tar.offset}, or followed by another tar" if len(tail) >= _BLOCK else
                           f"cut off at byte {os.fstat(file.fileno()).st_size}")
    except (tarfile.TarError, ValueError, OverflowError, EOFError) as fault:
        content.end = f"cut off or damaged ({fault})"
    content.faults += [(name, "that are in the tar twice") for name in sorted(twice)]
    dropped = _key(last) if content.end else None    # more of the last sample may have been to come
    return {name: where for name, where in members.items() if name not in twice and _key(name) != dropped}


def _unsafe(member: tarfile.TarInfo, name: str) -> str | None:
    """Why a member is not to be touched."""
    if name.startswith("/") or ".." in name and ".." in name.split("/"):
        return "whose name in the tar leads out of its folder"
    if member.type in (tarfile.SYMTYPE, tarfile.LNKTYPE):
        return "that are links in a tar: they are not followed"
    if member.type not in (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.DIRTYPE) and (not member.isreg() or member.issparse()):
        return "that are no plain files in the tar"
    return None if is_text(name) else "whose name is not UTF-8"


def _key(name: str) -> str:
    """What the members of a sample have in common. By hand: there are millions of them."""
    dot = name.find(".", name.rfind("/") + 1)
    return name[:dot] if dot >= 0 else name


def _stem(name: str) -> str:
    dot = name.rfind(".")
    return name[:dot] if dot > name.rfind("/") else name


def _images(names) -> list[str]:
    return [name for name in names if name.lower().endswith(EXTENSIONS)]


def _group(handle: int, members: dict[str, tuple[int, int]], origin: Origin, content: Content) -> None:
    """Make rows of the samples. A sample's image is key.jpg; key.more.jpg is one if it has a caption of its own, or no other is
    there (a file name with a dot)."""
    groups: dict[str, list[str]] = {}
    for name in members:
        groups.setdefault(_key(name), []).append(name)
    for key, group in groups.items():
        rows = found = _images(group)
        if len(found) > 1:
            plain = any(_stem(name) == key for name in found)
            rows = [name for name in found if not plain or _stem(name) == key or _captions_of(_stem(name), members, origin)]
            content.shared += [name for row, name in enumerate(rows) if _stem(name) in map(_stem, rows[:row])]
        if len(rows) < len(found) or not rows:
            content.loose += [name for name in found if name not in rows] or group
        for name in rows:
            try:
                caption = _caption(handle, name, key, members, origin)
            except ValueError as fault:
                content.faults.append((name, str(fault)))
                continue
            if caption is None:
                content.faults.append((name, NO_CAPTION))
                continue
            content.names.append(name)
            content.offsets.append(members[name][0])
            content.sizes.append(members[name][1])
            content.captions.append(caption)


def _captions_of(stem: str, files, origin: Origin) -> bool:
    return any(stem + extension in files for extension in (".json", *origin.extensions))


def _caption(handle: int, name: str, key: str, files: dict[str, tuple[int, int]], origin: Origin) -> Caption | None:
    """The caption of an image: from .json or from a text file, under its own name before the sample's."""
    if origin.captions == "filename":
        return file_name_caption(name)
    if origin.captions == "phrase":
        return list(origin.phrases)
    stems = dict.fromkeys((_stem(name), key))
    if origin.captions in ("auto", "column"):
        for stem in stems:
            if stem + ".json" in files:
                caption = _from_json(_read(handle, stem + ".json", files), stem + ".json", origin)
                if caption is not None:
                    return caption
    for extension in origin.extensions:
        for stem in stems:
            if stem + extension in files:
                return split(decode(_read(handle, stem + extension, files), stem + extension), origin.lines)
    return list(origin.phrases) or None


def _from_json(data: bytes, name: str, origin: Origin) -> Caption | None:
    """`origin.caption_column` of a .json, else the fallback; where none was chosen, img2dataset's, too. Raises ValueError."""
    try:
        values = json.loads(data)
    except (ValueError, RecursionError):
        raise ValueError(f"whose {name} is not valid JSON") from None
    if not isinstance(values, dict):
        raise ValueError(f"whose {name} is not an object in braces")
    empty = None
    usual = "caption" if origin.caption_column == Origin.caption_column else None
    for column in (origin.caption_column, origin.fallback_column, usual):
        caption = as_caption(values.get(column), f"{name}, {column}")
        if caption:
            return caption
        empty = caption if empty is None else empty
    return empty    # "" if it is written down so


def _read(handle: int, name: str, files: dict[str, tuple[int, int]]) -> bytes:
    offset, size = files[name]
    if size > LARGEST:
        raise ValueError(f"whose caption {name} is larger than {LARGEST >> 20} MB")
    return os.pread(handle, size, offset)

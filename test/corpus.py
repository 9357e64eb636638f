"""A corpus of bad and of unusual input: files that a data set of the world may hold, and what is to come of each.

    python test/corpus.py FOLDER

FOLDER/images: images, each with its caption. FOLDER/captions: captions of every encoding. FOLDER/tars: shards.
FOLDER/tables: a parquet file without captions. Everything is made here, with the standard library, NumPy and Pillow.
"""

import io
import json
import os
import struct
import sys
import tarfile
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

D50 = np.array([0.9642, 1.0, 0.8249])
# columns: XYZ of red, green and blue, adapted to D50, as the profiles of these names state them
SRGB = np.array([[0.43607, 0.38515, 0.14307], [0.22249, 0.71687, 0.06061], [0.01392, 0.09708, 0.71410]])
P3 = np.array([[0.51512, 0.29198, 0.15710], [0.24120, 0.69225, 0.06657], [-0.00105, 0.04189, 0.78407]])
ADOBE = np.array([[0.60974, 0.20528, 0.14919], [0.31111, 0.62567, 0.06322], [0.01947, 0.06087, 0.74457]])
INKS = np.array([[(100 - 10 * (c + m + y)) * (1 - k), 40 * (m - c) * (1 - k), 40 * (y - (c + m) / 2) * (1 - k)]
                 for c in (0, 1) for m in (0, 1) for y in (0, 1) for k in (0, 1)])    # Lab of no ink and full ink of each
TURNED = {1: None, 2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
          5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_90, 7: Image.Transpose.TRANSVERSE,
          8: Image.Transpose.ROTATE_270}    # what a camera that notes orientation N did to the scene
WIDE, HIGH = 48, 32


@dataclass(frozen=True)
class Case:
    """What is to come of a file.

    pixels: [H, W, 3] float as it is to be seen, within `tolerance` on average; or fault: a pattern in the reason for which it
    is named. caption: the text of an image. rows: names of the images of a tar. note: a pattern in what is said in passing.
    """

    pixels: np.ndarray | None = None
    tolerance: float = 0.01
    fault: str | None = None
    caption: str | None = None
    rows: tuple[str, ...] = ()
    note: str | None = None


def scene(number: int, width: int = WIDE, height: int = HIGH) -> Image.Image:
    """Smooth colours that differ from scene to scene and from corner to corner."""
    small = np.random.default_rng(number).integers(0, 256, (4, 4, 3), np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


def encode(image: Image.Image, kind: str, **options) -> bytes:
    data = io.BytesIO()
    image.save(data, kind, **options)
    return data.getvalue()


def orientation(number: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = number
    return exif


def deep_png(values: np.ndarray) -> bytes:
    """A PNG of 16 bits from [H, W] grey or [H, W, 3] RGB uint16."""
    def chunk(name, content):
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))
    header = struct.pack(">IIBBBBB", values.shape[1], len(values), 16, 2 if values.ndim == 3 else 0, 0, 0, 0)
    lines = b"".join(b"\0" + line.astype(">u2").tobytes() for line in values)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(lines)) + chunk(b"IEND", b"")


# colour profiles, as ICC.1:2001-04 lays them out

def gamma(number: float) -> bytes:
    return b"curv" + struct.pack(">IIH", 0, 1, round(number * 256))


def srgb_curve() -> bytes:
    return b"curv" + struct.pack(">II", 0, 1024) + np.round(to_linear(np.linspace(0, 1, 1024)) * 65535).astype(">u2").tobytes()


def profile(space: bytes, tags: dict[bytes, bytes], pcs: bytes = b"XYZ ", kind: bytes = b"mntr") -> bytes:
    """space: b"RGB ", b"GRAY", b"CMYK". tags beside description, copyright and white."""
    text = b"made for a test\0"
    tags = {b"desc": b"desc" + struct.pack(">II", 0, len(text)) + text + bytes(78), b"cprt": b"text\0\0\0\0" + text,
            b"wtpt": xyz(D50), **tags}
    table, body, at = b"", b"", 128 + 4 + 12 * len(tags)
    for name, content in tags.items():
        content += bytes(-len(content) % 4)
        table += name + struct.pack(">II", at + len(body), len(content))
        body += content
    header = (struct.pack(">I4sI4s4s4s6H4s", at + len(body), b"", 0x02400000, kind, space, pcs, 2026, 1, 1, 0, 0, 0, b"acsp")
              + bytes(28) + xyz(D50)[8:])
    return header.ljust(128, b"\0") + struct.pack(">I", len(tags)) + table + body


def xyz(values) -> bytes:
    return b"XYZ \0\0\0\0" + struct.pack(">3i", *(round(value * 65536) for value in values))


def rgb_profile(primaries: np.ndarray, curve: bytes) -> bytes:
    return profile(b"RGB ", {name: xyz(column) for name, column in zip((b"rXYZ", b"gXYZ", b"bXYZ"), primaries.T, strict=True)}
                   | {name: curve for name in (b"rTRC", b"gTRC", b"bTRC")})


def cmyk_profile() -> bytes:
    """What `INKS` say, and straight lines between them."""
    lab = np.round(INKS * [2.55, 1, 1] + [0, 128, 128]).astype(np.uint8)
    straight = bytes(range(256))
    unit = struct.pack(">9i", *(65536 * (row == column) for row in range(3) for column in range(3)))
    return profile(b"CMYK", {b"A2B0": b"mft1\0\0\0\0" + bytes([4, 3, 2, 0]) + unit + 4 * straight + lab.tobytes() + 3 * straight},
                   b"Lab ", b"prtr")


def to_linear(encoded: np.ndarray) -> np.ndarray:
    """sRGB's curve, IEC 61966-2-1, from 0 ... 1 to light."""
    return np.where(encoded <= 0.04045, encoded / 12.92, ((encoded + 0.055) / 1.055) ** 2.4)


def to_srgb(light: np.ndarray) -> np.ndarray:
    """XYZ [..., 3] under D50 -> sRGB as 0 ... 255, what lies outside cut off."""
    linear = np.clip(light @ np.linalg.inv(SRGB).T, 0, 1)
    return 255 * np.where(linear <= 0.0031308, linear * 12.92, 1.055 * linear ** (1 / 2.4) - 0.055)


def from_lab(lab: np.ndarray) -> np.ndarray:
    """CIE Lab [..., 3] -> XYZ under D50."""
    y = (lab[..., 0] + 16) / 116
    each = np.stack([y + lab[..., 1] / 500, y, y - lab[..., 2] / 200], -1)
    return D50 * np.where(each > 6 / 29, each ** 3, 3 * (6 / 29) ** 2 * (each - 4 / 29))


def ink_picture() -> tuple[Image.Image, np.ndarray]:
    """A CMYK image of squares of full inks, and how `cmyk_profile` shows it."""
    which = np.kron(np.arange(16).reshape(4, 4), np.ones((8, 12), int))
    inks = np.stack([which >> 3 & 1, which >> 2 & 1, which >> 1 & 1, which & 1], -1)
    return Image.frombytes("CMYK", (48, 32), (255 * inks).astype(np.uint8).tobytes()), to_srgb(from_lab(INKS[which]))


# the files

def images() -> dict[str, tuple[bytes, Case]]:
    """Every kind of image file: name -> (content, what is to come of it)."""
    noise = Image.fromarray(np.random.default_rng(2).integers(0, 256, (120, 160, 3), np.uint8))
    made: dict[str, tuple[bytes, Case]] = {"empty.jpg": (b"", Case(fault="the file is empty"))}
    whole = {"jpg": encode(noise, "JPEG"), "progressive.jpg": encode(noise, "JPEG", progressive=True),
             "png": encode(noise, "PNG"), "webp": encode(noise, "WEBP")}
    for kind, data in whole.items():
        for tenth in range(1, 10):
            made[f"{tenth} tenths.{kind}"] = data[:len(data) * tenth // 10], Case(fault="truncated|cut short|known format")

    def add(name, image, kind, pixels, tolerance=0.01, **options):
        made[name] = encode(image, kind, **options), Case(np.asarray(pixels, float), tolerance)

    page = b"<!DOCTYPE html><html><title>404</title><body>There is no such image</body></html>"
    made["page.jpg"] = page, Case(fault="not an image in a known format")
    made["words.webp"] = b"a photo of a cat\n", Case(fault="not an image in a known format")
    add("png named.jpg", scene(1), "PNG", scene(1))
    add("jpeg named.png", scene(1), "JPEG", scene(1), 4)
    add("webp named.gif", scene(1), "WEBP", scene(1), 4)
    add("dot.png", Image.new("RGB", (1, 1), (9, 99, 199)), "PNG", [[[9, 99, 199]]])
    add("line.png", scene(2, 30000, 10), "PNG", scene(2, 30000, 10))
    add("line.jpg", scene(2, 30000, 10), "JPEG", scene(2, 30000, 10), 4, quality=95, subsampling=0)
    add("cmyk.jpg", scene(3).convert("CMYK"), "JPEG", scene(3), 4, quality=95)
    ramp = np.linspace(0, 65535, WIDE * HIGH).reshape(HIGH, WIDE).astype(np.uint16)
    made["deep grey.png"] = deep_png(ramp), Case(np.repeat(ramp[..., None] / 257, 3, 2), 0.5)
    deep = np.random.default_rng(3).integers(0, 65536, (HIGH, WIDE, 3)).astype(np.uint16)
    made["deep.png"] = deep_png(deep), Case(deep / 257, 1)
    palette = Image.fromarray((np.asarray(ramp) >> 15).astype(np.uint8), "P")
    palette.putpalette([200, 30, 40, 10, 20, 30])
    opacity = np.array([128, 255])[ramp >> 15][..., None] / 255
    colours = np.array([[200, 30, 40], [10, 20, 30]])[ramp >> 15]
    add("palette with alpha.png", palette, "PNG", opacity * colours + (1 - opacity) * 255, 1, transparency=bytes([128, 255]))
    frames = [scene(number).quantize(64) for number in (4, 5, 6)]
    add("moving.gif", frames[0], "GIF", frames[0].convert("RGB"), save_all=True, append_images=frames[1:])
    frames = [scene(number) for number in (4, 5, 6)]
    add("moving.webp", frames[0], "WEBP", frames[0], save_all=True, append_images=frames[1:], lossless=True)
    for number, turn in TURNED.items():
        stored = scene(7) if turn is None else scene(7).transpose(turn)
        add(f"turned {number}.jpg", stored, "JPEG", scene(7), 2, exif=orientation(number), quality=95, subsampling=0)
    values = np.asarray(scene(8), float) / 255
    add("profile P3.jpg", scene(8), "JPEG", to_srgb(to_linear(values) @ P3.T), 4, quality=95, subsampling=0,
        icc_profile=rgb_profile(P3, srgb_curve()))
    add("profile Adobe.png", scene(8), "PNG", to_srgb(values ** (563 / 256) @ ADOBE.T), 1,
        icc_profile=rgb_profile(ADOBE, gamma(563 / 256)))
    add("profile sRGB.png", scene(8), "PNG", scene(8), icc_profile=rgb_profile(SRGB, srgb_curve()))
    add("profile broken.png", scene(8), "PNG", scene(8), icc_profile=rgb_profile(P3, srgb_curve())[:300])
    add("profile no profile.jpg", scene(8), "JPEG", scene(8), 4, icc_profile=b"none of it")
    inks, seen = ink_picture()
    add("profile inks.tif", inks, "TIFF", seen, 2, icc_profile=cmyk_profile())
    for name in ("a name with spaces .png", "snow \N{SNOWFLAKE} cat \N{CAT FACE}.png", "two\nlines.png", "ä" * 125 + "x.png"):
        add(name, scene(9), "PNG", scene(9))
    for name in ("twice.jpg", "twice.png"):
        add(name, scene(10), "PNG", scene(10))
    huge = deep_png(np.zeros((1, 1), np.uint16)).replace(struct.pack(">II", 1, 1), struct.pack(">II", 20000, 10000), 1)
    made["too large.png"] = repair(huge), Case(fault="more than [0-9]+ pixels")
    return made


def repair(png: bytes) -> bytes:
    """With the checksum of an altered header."""
    return png[:29] + struct.pack(">I", zlib.crc32(png[12:29])) + png[33:]


def captions() -> dict[str, tuple[bytes, Case]]:
    """Text files: stem of the image -> (content, what is to come of it)."""
    text, long = "une fête, étoilée", "a photo of a cat, " * 60_000
    made = {"plain": text.encode(), "marked": text.encode("utf-8-sig"), "wide": text.encode("utf-16"),
            "wide, other end": b"\xfe\xff" + text.encode("utf-16-be"), "lines": f"\r\n{text}\r\n".encode()}
    cases = {stem: (data, Case(caption=text)) for stem, data in made.items()}
    cases["long"] = long.encode(), Case(caption=long.strip())
    cases["empty"] = b"", Case(caption="")
    cases["latin"] = text.encode("latin-1"), Case(fault="latin.txt is not UTF-8 .byte 5.: save it as UTF-8")
    cases["half a pair"] = text.encode("utf-16")[:-1], Case(fault="half a pair.txt is not UTF-16")
    return cases


def tars() -> dict[str, tuple[bytes, Case]]:
    """Shards: name -> (content, what is to come of it)."""
    def sample(number, **files):
        return {f"{number:05d}.png": encode(scene(number, 24, 16), "PNG")} | files

    def pack(members) -> bytes:
        data = io.BytesIO()
        with tarfile.open(fileobj=data, mode="w") as tar:
            for name, content in members.items():
                about = tarfile.TarInfo(name)
                about.size = len(content)
                tar.addfile(about, io.BytesIO(content))
        return data.getvalue()

    good = {}
    for number in range(3):
        good |= sample(number) | {f"{number:05d}.json": json.dumps({"caption": f"number {number}"}).encode()}
    rows = tuple(f"{number:05d}.png" for number in range(3))
    whole = pack(good)
    outside = {"../../outside.png": good["00000.png"], "../../outside.txt": b"none", "/etc/absolute.png": good["00001.png"]}
    bad = dict(good) | {"00003.png": good["00000.png"][:60], "00003.txt": b"cut short"}
    return {
        "whole.tar": (whole, Case(rows=rows)),
        "in the middle.tar": (whole[:whole.index(b"00002.png") + 700], Case(rows=rows[:2], fault="cut off|damaged")),
        # more of the second sample may have been to come
        "in a header.tar": (whole[:whole.index(b"00002.png") + 100], Case(rows=rows[:1], fault="cut off|damaged")),
        "outside.tar": (pack(good | outside), Case(rows=rows, fault="leads out of its folder")),
        "no caption.tar": (pack(good | sample(3)), Case(rows=rows, fault="without a caption")),
        "a bad image.tar": (pack(bad), Case(rows=(*rows, "00003.png"), fault="00003.png")),
        "no tar.tar": (b"<html>404</html>" * 100, Case(fault="cut off|damaged|no tar")),
        "empty.tar": (b"", Case(fault="cut off|damaged|empty")),
        "no image.tar": (pack({"00000.txt": b"a caption"}), Case(note="belong to no image|hold no image")),
    }


def make(folder: Path) -> dict[str, Case]:
    """Write the corpus into `folder` -> what is to come of each file, by its path in there."""
    cases: dict[str, Case] = {}
    for part in ("images", "captions", "tars", "tables"):
        (folder / part).mkdir(parents=True)
    for name, (data, case) in images().items():
        (folder / "images" / name).write_bytes(data)
        (folder / "images" / name).with_suffix(".txt").write_text(f"a picture called {Path(name).stem}", encoding="utf-8")
        cases[f"images/{name}"] = case
    for stem, (data, case) in captions().items():
        scene(11, 24, 16).save(folder / "captions" / f"{stem}.png")
        (folder / "captions" / f"{stem}.txt").write_bytes(data)
        cases[f"captions/{stem}.png"] = case
    for name, (data, case) in tars().items():
        (folder / "tars" / name).write_bytes(data)
        cases[f"tars/{name}"] = case
    return cases | odd_entries(folder / "images") | table(folder / "tables")


def odd_entries(folder: Path) -> dict[str, Case]:
    """Links, pipes and forbidden files among the images."""
    (folder / "gone.jpg").symlink_to("nowhere.jpg")
    (folder / "itself.jpg").symlink_to("itself.jpg")
    (folder / "round").symlink_to(".", target_is_directory=True)
    os.mkfifo(folder / "pipe.jpg")
    cases = {"images/gone.jpg": Case(fault="No such file"), "images/itself.jpg": Case(fault="Too many levels of symbolic links"),
             "images/round": Case(note="lead back"), "images/pipe.jpg": Case(fault="pipe")}
    (folder / "locked.png").write_bytes(encode(scene(12), "PNG"))
    (folder / "locked.png").chmod(0)
    open_to_us = os.access(folder / "locked.png", os.R_OK)    # to root
    cases["images/locked.png"] = Case(np.asarray(scene(12), float)) if open_to_us else Case(fault="Permission denied")
    for name in ("gone", "itself", "pipe", "locked"):
        (folder / f"{name}.txt").write_text(f"a picture called {name}")
    return cases


def table(folder: Path) -> dict[str, Case]:
    """A parquet file with images and no captions."""
    import pyarrow as pa
    import pyarrow.parquet as pq
    rows = [{"bytes": encode(scene(number), "PNG"), "path": None} for number in range(3)]
    pq.write_table(pa.table({"image": rows, "title": ["a", "b", "c"]}), folder / "no column.parquet")
    return {"tables/no column.parquet": Case(fault="has no column 'text'.*image, title")}


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    for path, case in make(Path(sys.argv[1])).items():
        print(f"{path!r}: {case.fault or case.note or (f'rows {case.rows}' if case.rows else 'as it should be')}")

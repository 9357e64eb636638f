"""Reading image files rightly: size from the header, pixels as sRGB, opacity, masks. Pillow does the decoding."""

import io
import struct
import warnings
from functools import lru_cache

import numpy as np
from PIL import Image, ImageCms, ImageOps, UnidentifiedImageError

VERSION = 2    # to be raised when the same file gives other pixels than before: it belongs into the key of what they become
EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".avif", ".tif", ".tiff")
MODES = {"nearest": Image.Resampling.NEAREST, "bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC,
         "box": Image.Resampling.BOX, "hamming": Image.Resampling.HAMMING, "lanczos": Image.Resampling.LANCZOS}
MOST_PIXELS = 2 * Image.MAX_IMAGE_PIXELS    # 179 million: Pillow refuses to decode more, for fear of a file made to fill memory
_ORIENTATION = 0x0112    # EXIF tag; 5 to 8 are turned by a quarter
_AT_THE_END = (b"eXIf", b"Raw profile type", b"XML:com.adobe.xmp")    # what may turn a PNG after its pixels
_FAULTS = (OSError, ValueError, SyntaxError, EOFError, RuntimeError, struct.error, Image.DecompressionBombError)
_SEGMENT = struct.Struct(">HH")    # of a JPEG: marker, length
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)    # of half as many: they are decoded


class BadImage(Exception):
    """An image that cannot be decoded; the message says why."""


def read_size(data: bytes) -> tuple[int, int]:
    """(width, height) as shown, after EXIF rotation, from the header alone. Raises `BadImage`."""
    if size := _size_of_plain_jpeg(data):
        return size
    try:
        with Image.open(io.BytesIO(data)) as image:
            width, height = image.size
            turned = _orientation(image, data) in (5, 6, 7, 8)
    except _FAULTS as fault:
        raise BadImage(_reason(fault, data)) from None
    return (height, width) if turned else (width, height)


def read_pixels(data: bytes, resized: tuple[int, int], mode: str) -> Image.Image:
    """Decode, turn as EXIF says, make sRGB and resize to `resized` = (width, height). Raises `BadImage`.

    A JPEG at least twice as large as needed is decoded at 1/2, 1/4 or 1/8 (the DCT does that nearly for free)
    and resized from there, its true size kept as fractions of a pixel.
    """
    def flat(image):
        profile = image.info.get("icc_profile")
        kind = "CMYK" if image.mode == "CMYK" else "L" if _is_grey(image) else "RGB"
        to_srgb = _to_srgb(profile, kind) if profile else None
        rgb = image if to_srgb and kind == "CMYK" else to_rgb(image)
        return (rgb.getchannel("R") if to_srgb and kind == "L" else rgb), to_srgb

    return _read(data, resized, MODES[mode], flat)


def read_alpha(data: bytes, resized: tuple[int, int]) -> np.ndarray:
    """Opacity [H, W] uint8 of an image, turned and resized as its pixels are; 255 where it is opaque. Raises `BadImage`."""
    def opacity(image):
        if image.mode.startswith("I") and "transparency" in image.info:    # one shade of 16-bit grey
            return Image.fromarray(np.where(np.asarray(image) == image.info["transparency"], 0, 255).astype(np.uint8)), None
        return image.convert("RGBA").getchannel("A") if image.has_transparency_data else Image.new("L", image.size, 255), None

    return np.asarray(_read(data, resized, MODES["box"], opacity))


def read_mask(data: bytes, resized: tuple[int, int]) -> np.ndarray:
    """A mask [H, W] uint8: the first channel of an image of colours, or its grey, whatever its opacity. Raises `BadImage`."""
    def first(image):
        if image.mode == "P":    # its transparent colours, too, have a first channel
            image = image.convert("RGBA" if "transparency" in image.info else "RGB")
        return (image if image.mode in ("RGB", "RGBA", "L", "LA") else to_rgb(image)).getchannel(0), None

    return np.asarray(_read(data, resized, MODES["box"], first))


def verify(data: bytes) -> None:
    """Decode the whole image, as cheaply as its format allows. Raises `BadImage`."""
    read_pixels(data, (8, 8), "nearest")


def to_rgb(image: Image.Image) -> Image.Image:
    """Any Pillow image -> RGB: 16-bit grey is scaled, transparency is laid on white."""
    if image.mode.startswith("I;16") or image.mode in ("I", "F"):
        grey = np.asarray(image).astype(np.float64)
        sixteen = image.mode.startswith("I;16") or (image.mode == "I" and grey.max(initial=0) > 255)
        scale = 257.0 if sixteen else 1.0    # 65535 -> 255
        grey[grey == image.info.get("transparency", -1)] = 255 * scale
        return Image.fromarray(np.clip(grey / scale + 0.5, 0, 255).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        clear = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", clear.size, "white"), clear).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def _read(data: bytes, resized: tuple[int, int], resampling: int, take) -> Image.Image:
    """Decode, `take`(image) -> (image of 8-bit channels, transform of its colours or None), resize, transform, turn."""
    if resized[0] * resized[1] > MOST_PIXELS:
        raise BadImage(f"so thin that it would have to be resized to {resized[0]}x{resized[1]}")
    try:
        with Image.open(io.BytesIO(data)) as image:
            orientation = _orientation(image, data)
            wanted = resized[::-1] if orientation in (5, 6, 7, 8) else resized
            box = None
            if image.format == "JPEG" and image.width > wanted[0] and image.height > wanted[1]:
                drafted = image.draft(None, wanted)
                box = drafted[1] if drafted else None
            image.load()
            taken, to_srgb = take(image)
            taken = taken.resize(wanted, resampling, box=box) if box or taken.size != wanted else taken
            taken = ImageCms.applyTransform(taken, to_srgb) if to_srgb else taken
            taken.info.pop("exif", None)
            return _turn(taken, orientation)
    except _FAULTS as fault:
        raise BadImage(_reason(fault, data)) from None


def _size_of_plain_jpeg(data: bytes) -> tuple[int, int] | None:
    """(width, height) of a JPEG with nothing but the usual segments, none of which can turn it; None: ask Pillow.

    A small image is read in less time than Pillow needs to open it. Segments as ITU-T T.81, annex B.
    """
    if data[:3] != b"\xff\xd8\xff":
        return None
    at, size = 2, None
    try:
        while True:
            marker, length = _SEGMENT.unpack_from(data, at)
            if marker in (0xFFC0, 0xFFC2):    # frame, baseline or progressive
                bits, height, width, channels = struct.unpack_from(">BHHB", data, at + 4)
                if bits != 8 or channels not in (1, 3) or length != 8 + 3 * channels:
                    return None
                size = width, height
            elif marker == 0xFFDB:    # quantisation tables of 8 bits
                if length not in (67, 132) or data[at + 4] > 15 or (length == 132 and data[at + 69] > 15):
                    return None
            elif marker == 0xFFDA:    # scan
                whole = size and at + 2 + length <= len(data)
                return size if whole and 0 < size[0] * size[1] <= MOST_PIXELS else None
            elif marker not in (0xFFC4, 0xFFDD, 0xFFFE) and not (marker == 0xFFE0 and length >= 16):
                return None    # neither Huffman tables, restart interval, comment nor JFIF
            at += 2 + length
    except (struct.error, IndexError):    # cut short
        return None


def _is_grey(image: Image.Image) -> bool:
    return image.mode in ("1", "L", "LA", "La", "I", "F") or image.mode.startswith("I;16")


@lru_cache(maxsize=64)
def _to_srgb(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """What turns pixels of `mode` under an ICC `profile` into sRGB.

    None when it would not change what is seen, nothing moving by more than 2 of 255; and for a profile that is
    broken, or is one of other channels than the image has: viewers, too, show such an image without it.
    """
    try:
        source, target = ImageCms.ImageCmsProfile(io.BytesIO(profile)), ImageCms.createProfile("sRGB")
        transform = ImageCms.buildTransform(source, target, mode, "RGB", ImageCms.getDefaultIntent(source))
        if mode == "CMYK":
            return transform
        tones = np.arange(0, 256, 15, np.uint8)
        cube = np.stack(np.meshgrid(tones, tones, tones), -1).reshape(-1, len(tones), 3) if mode == "RGB" else tones[None]
        seen = np.asarray(ImageCms.applyTransform(Image.fromarray(cube), transform)).astype(int)
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError):
        return None
    return transform if np.abs(seen - cube.reshape(*seen.shape[:2], -1)).max() > 2 else None


def _orientation(image: Image.Image, data: bytes) -> int:
    """EXIF orientation that is still to be applied to an opened image."""
    if image.format == "TIFF":    # turned by Pillow
        return 1
    if image.format == "PNG":    # Pillow decodes all of it to look behind the pixels: only if there is something
        behind = data[data.rfind(b"IDAT"):]
        if not any(mark in behind for mark in _AT_THE_END):
            return Image.Image.getexif(image).get(_ORIENTATION, 1)
    return image.getexif().get(_ORIENTATION, 1)


def _turn(image: Image.Image, orientation: int) -> Image.Image:
    """`ImageOps.exif_transpose` for an orientation that was read before the image was resized."""
    if orientation not in range(2, 9):
        return image
    exif = Image.Exif()
    exif[_ORIENTATION] = orientation
    image.info["exif"] = exif.tobytes()
    return ImageOps.exif_transpose(image)


def _reason(fault: Exception, data: bytes) -> str:
    if not data:
        return "the file is empty"
    if isinstance(fault, Image.DecompressionBombError):
        return f"more than {MOST_PIXELS} pixels, which is too many to be decoded safely"
    if isinstance(fault, UnidentifiedImageError):
        return "not an image in a known format"
    if str(fault) == "could not create decoder object":    # of Pillow's WebP
        return "the WebP file is cut short or damaged"
    return str(fault) or type(fault).__name__

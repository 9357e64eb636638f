"""Reading image files rightly: size from the header, pixels as RGB. Pillow does the decoding."""

import io
import struct

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".avif", ".tif", ".tiff")
MODES = {"nearest": Image.Resampling.NEAREST, "bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC,
         "box": Image.Resampling.BOX, "hamming": Image.Resampling.HAMMING, "lanczos": Image.Resampling.LANCZOS}
_ORIENTATION = 0x0112    # EXIF tag; 5 to 8 are turned by a quarter
_AT_THE_END = (b"eXIf", b"Raw profile type", b"XML:com.adobe.xmp")    # what may turn a PNG after its pixels
_FAULTS = (OSError, ValueError, SyntaxError, EOFError, RuntimeError, struct.error, Image.DecompressionBombError)


class BadImage(Exception):
    """An image that cannot be decoded; the message says why."""


def read_size(data: bytes) -> tuple[int, int]:
    """(width, height) as shown, after EXIF rotation, from the header alone. Raises `BadImage`."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            width, height = image.size
            turned = _orientation(image, data) in (5, 6, 7, 8)
    except _FAULTS as fault:
        raise BadImage(_reason(fault, data)) from None
    return (height, width) if turned else (width, height)


def read_pixels(data: bytes, resized: tuple[int, int], mode: str) -> Image.Image:
    """Decode, turn as EXIF says, make RGB and resize to `resized` = (width, height). Raises `BadImage`.

    A JPEG at least twice as large as needed is decoded at 1/2, 1/4 or 1/8 (the DCT does that nearly for free)
    and resized from there, its true size kept as fractions of a pixel.
    """
    try:
        with Image.open(io.BytesIO(data)) as image:
            orientation = _orientation(image, data)
            wanted = resized[::-1] if orientation in (5, 6, 7, 8) else resized
            box = None
            if image.format == "JPEG" and image.width > wanted[0] and image.height > wanted[1]:
                drafted = image.draft(None, wanted)
                box = drafted[1] if drafted else None
            image.load()
            rgb = to_rgb(image)
            rgb = rgb.resize(wanted, MODES[mode], box=box) if box or rgb.size != wanted else rgb
            rgb.info.pop("exif", None)
            return _turn(rgb, orientation)
    except _FAULTS as fault:
        raise BadImage(_reason(fault, data)) from None


def verify(data: bytes) -> None:
    """Decode the whole image, as cheaply as its format allows. Raises `BadImage`."""
    read_pixels(data, (8, 8), "nearest")


def to_rgb(image: Image.Image) -> Image.Image:
    """Any Pillow image -> RGB: 16-bit grey is scaled, transparency is laid on white."""
    if image.mode.startswith("I;16") or image.mode in ("I", "F"):
        grey = np.asarray(image).astype(np.float64)
        sixteen = image.mode.startswith("I;16") or (image.mode == "I" and grey.max(initial=0) > 255)
        scale = 257.0 if sixteen else 1.0    # 65535 -> 255
        return Image.fromarray(np.clip(grey / scale + 0.5, 0, 255).astype(np.uint8)).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        clear = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", clear.size, "white"), clear).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


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
    if isinstance(fault, UnidentifiedImageError):
        return "not an image in a known format"
    return str(fault) or type(fault).__name__

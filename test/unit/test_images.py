"""Every kind of image file: its size from the header, its pixels as they are shown, or a clear word on what is wrong."""

import io
import struct
import zlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageOps, features
from tiny import picture

from library.data import images
from library.data.images import BadImage, read_pixels, read_size

WIDE, HIGH, AVIF = 48, 32, features.check("avif")
TURNED_BACK = {1: None, 2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
               5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_90, 7: Image.Transpose.TRANSVERSE,
               8: Image.Transpose.ROTATE_270}    # what a camera that notes orientation N did to the scene


def encode(image: Image.Image, kind: str, **options) -> bytes:
    data = io.BytesIO()
    image.save(data, kind, **options)
    return data.getvalue()


def chunk(name: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def png(rows: np.ndarray, depth: int, colour: int, width: int, before: bytes = b"", after: bytes = b"") -> bytes:
    """A PNG of [H, bytes] rows, for the kinds that Pillow cannot write. before, after: chunks around the pixels."""
    header = struct.pack(">IIBBBBB", width, len(rows), depth, colour, 0, 0, 0)
    pixels = zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows))
    return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + before + chunk(b"IDAT", pixels) + after + chunk(b"IEND", b""))


def orientation(number: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = number
    return exif


def pixels_of(data: bytes, size=None, mode: str = "lanczos") -> np.ndarray:
    """[H, W, 3] as float, in the image's own size unless `size` is given."""
    image = read_pixels(data, size or read_size(data), mode)
    assert image.mode == "RGB"
    return np.asarray(image).astype(float)


def difference(one, other) -> float:
    one, other = np.asarray(one, float), np.asarray(other, float)
    assert one.shape == other.shape
    return float(np.abs(one - other).mean())


# turned as the camera says

@pytest.mark.parametrize("number", range(1, 9))
@pytest.mark.parametrize("kind", [kind for kind in ("JPEG", "PNG", "WEBP", "TIFF", "AVIF") if kind != "AVIF" or AVIF])
def test_exif_orientation(kind, number):
    scene = picture(WIDE, HIGH, 1)
    stored = scene.transpose(TURNED_BACK[number]) if number > 1 else scene
    options = {"JPEG": {"quality": 98, "subsampling": 0}, "WEBP": {"lossless": True}, "AVIF": {"quality": 98}}
    data = encode(stored, kind, exif=orientation(number), **options.get(kind, {}))
    assert read_size(data) == (WIDE, HIGH)
    assert difference(pixels_of(data), scene) < (2 if kind in ("JPEG", "AVIF") else 1e-9)
    smaller = scene.resize((24, 20), Image.Resampling.LANCZOS)    # and resizing is that of the upright image
    assert difference(pixels_of(data, (24, 20)), smaller) < 2


@pytest.mark.parametrize("place", ["before", "after"])
def test_orientation_of_a_png_lies_before_or_behind_its_pixels(place):
    exif = chunk(b"eXIf", orientation(6).tobytes().removeprefix(b"Exif\0\0"))
    rows = np.random.default_rng(0).integers(0, 256, (HIGH, WIDE * 3), np.uint8)
    data = png(rows, 8, 2, WIDE, **{place: exif})
    assert read_size(data) == (HIGH, WIDE)
    upright = Image.fromarray(rows.reshape(HIGH, WIDE, 3)).transpose(Image.Transpose.ROTATE_270)
    assert difference(pixels_of(data), upright) == 0


@pytest.mark.parametrize("number", [0, 9, 1000])
def test_an_orientation_that_does_not_exist_turns_nothing(number):
    scene = picture(WIDE, HIGH, 1)
    assert difference(pixels_of(encode(scene, "PNG", exif=orientation(number))), scene) == 0


def test_orientation_is_applied_once():
    image = read_pixels(encode(picture(WIDE, HIGH, 0), "JPEG", exif=orientation(6)), (HIGH, WIDE), "lanczos")
    assert ImageOps.exif_transpose(image).size == image.size == (HIGH, WIDE)


# every kind of pixel

RAMP = np.linspace(0, 255, WIDE * HIGH).astype(np.uint8).reshape(HIGH, WIDE)


def test_grey():
    assert difference(pixels_of(encode(Image.fromarray(RAMP), "PNG")), RAMP[..., None].repeat(3, 2)) == 0


def test_one_bit():
    bits = RAMP > 127
    assert difference(pixels_of(encode(Image.fromarray(bits), "PNG")), 255 * bits[..., None].repeat(3, 2)) == 0


@pytest.mark.parametrize("top", [65535, 4096, 255, 3])    # a dark picture is dark: its depth is the file's, not its values'
@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_sixteen_bit_grey(kind, top):
    deep = np.linspace(0, top, WIDE * HIGH).astype(np.uint16).reshape(HIGH, WIDE)
    found = pixels_of(encode(Image.fromarray(deep), kind))
    assert abs(found.mean() - deep.mean() / 257) < 0.51
    assert np.abs(found - deep[..., None] / 257).max() < 0.51


def test_sixteen_bit_colour():
    deep = np.random.default_rng(0).integers(0, 65536, (HIGH, WIDE, 3))
    data = png(deep.astype(">u2").reshape(HIGH, -1).view(np.uint8), 16, 2, WIDE)
    assert np.abs(pixels_of(data) - deep / 257).max() <= 1


def test_colour_palette():
    scene = picture(WIDE, HIGH, 2).quantize(200)
    assert difference(pixels_of(encode(scene, "PNG")), scene.convert("RGB")) == 0


def test_clear_colours_of_a_palette_are_white():
    scene = Image.fromarray(RAMP // 128, "P")
    scene.putpalette([200, 30, 40, 10, 20, 30])
    expected = np.where((RAMP // 128 == 0)[..., None], 255, [10, 20, 30])
    assert difference(pixels_of(encode(scene, "PNG", transparency=0)), expected) == 0
    half = pixels_of(encode(scene, "PNG", transparency=bytes([128, 255])))    # tRNS with a degree for each colour
    assert np.abs(half[0, 0] - [227, 142, 147]).max() <= 1 and half[-1, -1].tolist() == [10, 20, 30]


def test_a_clear_shade_of_grey_is_white():
    rows = np.where(RAMP < 128, 17, 90).astype(np.uint8)
    expected = np.where(RAMP < 128, 255, 90)[..., None].repeat(3, 2)
    assert difference(pixels_of(png(rows, 8, 0, WIDE, before=chunk(b"tRNS", struct.pack(">H", 17)))), expected) == 0


@pytest.mark.parametrize("kind, mode", [("PNG", "RGBA"), ("PNG", "LA"), ("WEBP", "RGBA"), ("TIFF", "RGBA")])
def test_transparency_is_laid_on_white(kind, mode):
    scene = picture(WIDE, HIGH, 3).convert(mode)
    scene.putalpha(Image.fromarray(RAMP))
    options = {"lossless": True, "exact": True} if kind == "WEBP" else {}
    found = pixels_of(encode(scene, kind, **options))
    opacity = RAMP[..., None] / 255
    expected = opacity * np.asarray(scene.convert("RGB")) + (1 - opacity) * 255
    assert np.abs(found - expected).max() <= 1
    assert found[0, 0].tolist() == [255, 255, 255]


def test_cmyk_jpeg():
    scene = picture(WIDE, HIGH, 4)
    assert difference(pixels_of(encode(scene.convert("CMYK"), "JPEG", quality=95)), scene) < 4


@pytest.mark.parametrize("kind, worst", [("GIF", 0), ("TIFF", 0), ("BMP", 0), ("WEBP", 4), ("JPEG", 4)] + [("AVIF", 4)] * AVIF)
def test_kinds_of_file(kind, worst):
    scene = picture(WIDE, HIGH, 5)
    scene = scene.quantize(64) if kind == "GIF" else scene
    data = encode(scene, kind)
    assert read_size(data) == (WIDE, HIGH)
    assert difference(pixels_of(data), scene.convert("RGB")) <= worst


def test_the_first_picture_of_an_animation():
    frames = [picture(WIDE, HIGH, number).quantize(64) for number in (6, 7)]
    data = encode(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert difference(pixels_of(data), frames[0].convert("RGB")) == 0


@pytest.mark.parametrize("mode", images.MODES)
def test_resizing_is_pillows(mode):
    scene = picture(WIDE, HIGH, 8)
    expected = scene.resize((20, 12), getattr(Image.Resampling, mode.upper()))
    assert difference(pixels_of(encode(scene, "PNG"), (20, 12), mode), expected) == 0


# a large JPEG is decoded small

@pytest.mark.parametrize("turned", [1, 6])
@pytest.mark.parametrize("size, target", [
    ((1001, 1503), (333, 500)), ((1001, 1503), (500, 751)), ((1503, 1001), (94, 63)), ((1000, 700), (499, 350)),
    ((999, 999), (130, 124)), ((640, 480), (639, 479)), ((300, 200), (450, 300))])
def test_a_jpeg_decoded_small_is_the_whole_one_resized(size, target, turned):
    noise = Image.fromarray(np.random.default_rng(1).integers(0, 256, (target[1] // 3, target[0] // 3, 3), np.uint8))
    data = encode(noise.resize(size, Image.Resampling.BICUBIC), "JPEG", quality=95, subsampling=0, exif=orientation(turned))
    whole = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    target = target if turned == 1 else target[::-1]
    found = pixels_of(data, target)
    assert read_size(data) == whole.size
    assert difference(found, whole.resize(target, Image.Resampling.LANCZOS)) < 1.5

    def moved(x, y):    # the whole image, sampled a fraction of a pixel further right or down
        box = (x * whole.width / target[0], y * whole.height / target[1], whole.width, whole.height)
        box = (*box[:2], whole.width + min(box[0], 0), whole.height + min(box[1], 0))
        return difference(found, whole.resize(target, Image.Resampling.LANCZOS, box=[max(side, 0) for side in box]))

    here = moved(0, 0)
    assert all(here < moved(*by) for by in [(0.25, 0), (-0.25, 0), (0, 0.25), (0, -0.25)])


# what cannot be read

def test_sizes_come_from_the_header_alone():
    for kind in ("JPEG", "PNG", "GIF", "BMP"):
        data = encode(picture(640, 480, 9).quantize(64) if kind == "GIF" else picture(640, 480, 9), kind)
        cut = data[:len(data) // 2]
        assert read_size(cut) == (640, 480)
        with pytest.raises(BadImage):
            read_pixels(cut, (64, 48), "lanczos")


NOISE = Image.fromarray(np.random.default_rng(2).integers(0, 256, (300, 400, 3), np.uint8))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "GIF", "BMP"])
def test_truncated(kind):
    data = encode(NOISE.quantize(64) if kind == "GIF" else NOISE, kind)
    for look in (lambda cut: read_pixels(cut, (64, 48), "lanczos"), images.verify):
        with pytest.raises(BadImage) as fault:
            look(data[:len(data) * 3 // 4])
        assert len(str(fault.value)) > 5
    images.verify(data)


@pytest.mark.parametrize("data, reason", [
    (b"", "the file is empty"), (b"\x89PNG", "not an image in a known format"), (b"a photo of a cat\n", "not an image in a"),
    (bytes(1000), "not an image in a"), (np.random.default_rng(3).bytes(1000), "not an image in a"),
    (b"<html>404</html>", "not an image in a"), (b"\xff\xd8\xff", "not an image in a")])
def test_no_image_at_all(data, reason):
    for look in (read_size, images.verify):
        with pytest.raises(BadImage, match=reason):
            look(data)


def test_the_reason_of_a_truncated_file_says_so():
    with pytest.raises(BadImage, match="truncated"):
        images.verify(encode(NOISE, "JPEG")[:-2000])


SMALL = {kind: encode(picture(20, 14, 1).quantize(16) if kind == "GIF" else picture(20, 14, 1), kind,
                      **({} if kind in ("GIF", "BMP") else {"exif": orientation(6)}))
         for kind in ("JPEG", "PNG", "WEBP", "TIFF", "GIF", "BMP", *(["AVIF"] if AVIF else []))}


def read_or_refuse(data: bytes) -> None:
    for look in (read_size, lambda data: read_pixels(data, (9, 9), "lanczos"), images.verify):
        try:
            look(data)
        except BadImage as fault:
            assert str(fault)


@pytest.mark.filterwarnings("ignore")    # Pillow's, of broken metadata
@pytest.mark.parametrize("kind", SMALL)
def test_a_file_with_one_wrong_byte_is_read_or_is_a_bad_image(kind):
    for place in range(min(450, len(SMALL[kind]))):
        read_or_refuse(SMALL[kind][:place] + b"\0" + SMALL[kind][place + 1:])


@pytest.mark.filterwarnings("ignore")
@given(st.sampled_from(sorted(SMALL)), st.lists(st.tuples(st.integers(0, 400), st.integers(0, 255)), max_size=5),
       st.integers(0, 400))
def test_a_damaged_file_is_read_or_is_a_bad_image(kind, changes, lost):
    data = bytearray(SMALL[kind])
    for place, value in changes:
        data[place % len(data)] = value
    read_or_refuse(bytes(data[:max(0, len(data) - lost // 4)]))

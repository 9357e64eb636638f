"""Every kind of image file: its size from the header, its pixels as they are shown, or a clear word on what is wrong."""

import io
import itertools
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import corpus
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageCms, ImageOps, features
from tiny import picture

from library.data import images
from library.data.images import BadImage, read_alpha, read_mask, read_pixels, read_size

REPOSITORY = Path(__file__).resolve().parents[2]
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


# the size of a plain JPEG is read without Pillow, and is Pillow's

def pillow_size(data: bytes) -> tuple[int, int]:
    with Image.open(io.BytesIO(data)) as image:
        return image.size[::-1] if image.getexif().get(0x0112) in (5, 6, 7, 8) else image.size


PLAIN = {"baseline": {}, "progressive": {"progressive": True}, "optimised": {"optimize": True, "quality": 95, "subsampling": 0},
         "comment": {"comment": b"of no use"}, "dense": {"dpi": (300, 300)}, "restarts": {"restart_marker_rows": 1}}
NOT_PLAIN = {"exif": {"exif": orientation(6)}, "profile": {"icc_profile": b"some"}, "xmp": {"xmp": b"<x/>"}}
JPEGS = {name: encode(picture(40, 28, 3), "JPEG", **options) for name, options in (PLAIN | NOT_PLAIN).items()}
JPEGS |= {"grey": encode(picture(40, 28, 3).convert("L"), "JPEG"), "cmyk": encode(picture(40, 28, 3).convert("CMYK"), "JPEG")}


@pytest.mark.parametrize("name", JPEGS)
def test_a_plain_jpeg_needs_no_pillow(name, monkeypatch):
    assert read_size(JPEGS[name]) == pillow_size(JPEGS[name])
    monkeypatch.setattr(images.Image, "open", lambda *_: pytest.fail("asked Pillow"))
    if name in PLAIN or name == "grey":
        assert read_size(JPEGS[name]) == (40, 28)
    else:
        with pytest.raises(pytest.fail.Exception):
            read_size(JPEGS[name])


def plain_or_pillow(data: bytes) -> None:
    """What is read without Pillow is what Pillow reads."""
    if size := images._size_of_plain_jpeg(data):
        assert pillow_size(data) == size


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", JPEGS)
def test_plain_or_pillow_with_one_wrong_byte(name):
    head = JPEGS[name].index(b"\xff\xda") + 16
    for place, value in itertools.product(range(head), (0, 1, 7, 64, 0xC0, 0xC4, 0xDA, 0xE1, 0xFF)):
        plain_or_pillow(JPEGS[name][:place] + bytes([value]) + JPEGS[name][place + 1:])
    for length in range(head):
        plain_or_pillow(JPEGS[name][:length])


FRAME = b"\x08\0\x09\0\x07\1\1\x11\0"    # 8 bits, 9 lines, 7 columns, one channel
SEGMENTS = [(0xE0, b"JFIF\0\1\1\0\0\1\0\1\0\0"), (0xE0, b"ab"), (0xE0, b"JFIF\0"), (0xFE, b"abc"),
            (0xE1, orientation(6).tobytes()), (0xE1, b"Exif\0\0MM\0*\0\0\0\x08"), (0xDD, bytes(2)),
            (0xDB, bytes(65)), (0xDB, b"\x10" + bytes(64)), (0xDB, bytes(30)), (0xDB, bytes(130)),
            (0xDB, bytes(65) + b"\x10" + bytes(64)), (0xC0, FRAME), (0xC2, FRAME.replace(b"\x09", b"\0")),
            (0xC1, FRAME), (0xC0, b"\x0c" + FRAME[1:]), (0xC0, FRAME[:-1]), (0xC3, FRAME),
            (0xC2, FRAME[:5] + b"\2" + 2 * FRAME[6:]), (0xC0, FRAME[:5] + b"\3" + 3 * FRAME[6:]),
            (0xEE, b"Adobe\0\x64\0\0\0\0\1"), (0xEE, b"Adobe"), (0xED, b"ab"), (0xDA, b"\1\1\0\0\x3f\0")]
PIECES = [bytes([0xFF, marker]) + struct.pack(">H", len(content) + 2) + content for marker, content in SEGMENTS]


PIECES += [b"\xff\xd8", b"\xff", b"\0", b""]
FRAMED = [b"\xff\xd8", b"", PIECES[SEGMENTS.index((0xC0, FRAME))], b"", PIECES[len(SEGMENTS) - 1] + bytes(20)]


@pytest.mark.filterwarnings("ignore")
def test_plain_or_pillow_with_any_segment_before_and_behind_the_frame():
    for FRAMED[1], FRAMED[3] in itertools.product(PIECES, PIECES):
        plain_or_pillow(b"".join(FRAMED))


@pytest.mark.filterwarnings("ignore")
@given(*[st.lists(st.sampled_from(PIECES), max_size=3).map(b"".join)] * 2,
       st.lists(st.tuples(st.integers(0, 200), st.integers(0, 255)), max_size=2))
def test_plain_or_pillow_of_any_segments(before, behind, changes):
    data = bytearray(b"".join([FRAMED[0], before, FRAMED[2], behind, FRAMED[4]]))
    for place, value in changes:
        data[place % len(data)] = value
    plain_or_pillow(bytes(data))


# colour profiles

SCENE = corpus.scene(1, WIDE, HIGH)
LIGHT = np.asarray(SCENE, float) / 255
P3, ADOBE = corpus.rgb_profile(corpus.P3, corpus.srgb_curve()), corpus.rgb_profile(corpus.ADOBE, corpus.gamma(563 / 256))
SEEN = {P3: corpus.to_srgb(corpus.to_linear(LIGHT) @ corpus.P3.T), ADOBE: corpus.to_srgb(LIGHT ** (563 / 256) @ corpus.ADOBE.T)}
GREY = corpus.profile(b"GRAY", {b"kTRC": corpus.gamma(1)})


@pytest.mark.parametrize("profile", [P3, ADOBE], ids=["P3", "Adobe"])
@pytest.mark.parametrize("kind, worst", [("PNG", 1), ("TIFF", 1), ("WEBP", 4), ("JPEG", 4)] + [("AVIF", 4)] * AVIF)
def test_wide_colours_become_srgb(kind, worst, profile):
    options = {"JPEG": {"quality": 98, "subsampling": 0}, "WEBP": {"lossless": True}, "AVIF": {"quality": 98}}.get(kind, {})
    found = pixels_of(encode(SCENE, kind, icc_profile=profile, **options))
    assert difference(found, SEEN[profile]) < worst and difference(SCENE, SEEN[profile]) > 5


def test_colours_of_a_turned_clear_and_resized_image():
    clear = SCENE.transpose(TURNED_BACK[6]).convert("RGBA")
    data = encode(clear, "PNG", exif=orientation(6), icc_profile=P3)
    assert difference(pixels_of(data, (24, 16), "box"), SEEN[P3].reshape(16, 2, 24, 2, 3).mean((1, 3))) < 1
    clear.putalpha(0)
    assert (pixels_of(encode(clear, "PNG", icc_profile=P3)) == 255).all()


@pytest.mark.parametrize("mode, expected", [("L", 0.5), ("LA", 0.5), ("I;16", 0.5)])
def test_grey_has_profiles_too(mode, expected):
    grey = Image.new(mode, (WIDE, HIGH), {"L": 128, "LA": (128, 255), "I;16": 128 * 257}[mode])
    light = np.full(3, 128 / 255) * np.array([0.9642, 1, 0.8249])
    seen = corpus.to_srgb(light)
    assert difference(pixels_of(encode(grey, "PNG", icc_profile=GREY)), np.broadcast_to(seen, (HIGH, WIDE, 3))) < 1.5
    assert abs(seen.mean() - 188) < 1    # linear light of a half


@pytest.mark.parametrize("kind", ["TIFF", "JPEG"])
def test_inks_are_seen_as_their_profile_says(kind):
    inks, seen = corpus.ink_picture()
    options = {"quality": 100, "subsampling": 0} if kind == "JPEG" else {}
    with_profile = pixels_of(encode(inks, kind, icc_profile=corpus.cmyk_profile(), **options))
    assert difference(with_profile, seen) < 3 < difference(pixels_of(encode(inks, kind, **options)), seen)


@pytest.mark.parametrize("profile", [
    ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes(), corpus.rgb_profile(corpus.SRGB, corpus.srgb_curve()),
    b"", b"none", P3[:300], P3[:128] + bytes(len(P3) - 128), bytes(1000), GREY, corpus.cmyk_profile()])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_profiles_that_change_nothing(profile, mode):
    """sRGB under any name, bit by bit; broken ones; those of other channels than the image has."""
    if (mode, profile) == ("L", GREY):
        profile = P3
    scene = SCENE.convert(mode)
    assert images._to_srgb(profile, mode) is None    # and takes no time
    assert difference(pixels_of(encode(scene, "PNG", icc_profile=profile)), scene.convert("RGB")) == 0


@pytest.mark.filterwarnings("ignore")
@given(st.sampled_from([P3, GREY, corpus.cmyk_profile()]), st.sampled_from(["RGB", "L", "CMYK"]),
       st.lists(st.tuples(st.integers(0, 600), st.integers(0, 255)), min_size=1, max_size=8), st.integers(0, 300))
def test_no_damaged_profile_stops_a_run(profile, mode, changes, lost):
    data = bytearray(profile)
    for place, value in changes:
        data[place % len(data)] = value
    image = Image.new(mode, (5, 4))
    found = read_pixels(encode(image, "TIFF", icc_profile=bytes(data[:len(data) - lost])), (3, 2), "box")
    assert found.mode == "RGB" and found.size == (3, 2)


# opacity and masks

STEPS = np.kron(np.array([[0, 64, 128], [255, 10, 200]], np.uint8), np.ones((16, 16), np.uint8))    # [32, 48]


@pytest.mark.parametrize("number", range(1, 9))
@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF"])
def test_opacity_is_turned_and_resized_as_the_pixels_are(kind, number):
    scene = corpus.scene(2, WIDE, HIGH)
    scene.putalpha(Image.fromarray(STEPS))
    stored = scene.transpose(TURNED_BACK[number]) if number > 1 else scene
    data = encode(stored, kind, exif=orientation(number), **({"lossless": True, "exact": True} if kind == "WEBP" else {}))
    found = read_alpha(data, (WIDE, HIGH))
    assert found.dtype == np.uint8 and np.array_equal(found, STEPS)
    assert np.array_equal(read_alpha(data, (3, 2)), STEPS[::16, ::16])
    assert np.array_equal(read_alpha(data, (2 * WIDE, 2 * HIGH)), STEPS.repeat(2, 0).repeat(2, 1))


def test_opacity_of_other_kinds():
    grey = Image.fromarray(RAMP).convert("LA")
    grey.putalpha(Image.fromarray(STEPS))
    assert np.array_equal(read_alpha(encode(grey, "PNG"), (WIDE, HIGH)), STEPS)
    palette = Image.fromarray(RAMP // 128, "P")
    palette.putpalette([200, 30, 40, 10, 20, 30])
    assert np.array_equal(read_alpha(encode(palette, "PNG", transparency=bytes([77, 255])), (WIDE, HIGH)),
                          np.where(RAMP < 128, 77, 255))
    assert np.array_equal(read_alpha(encode(palette, "GIF", transparency=1), (WIDE, HIGH)), np.where(RAMP < 128, 255, 0))
    deep = np.where(RAMP < 128, 1000, 2000).astype(">u2")
    data = png(deep.view(np.uint8), 16, 0, WIDE, before=chunk(b"tRNS", struct.pack(">H", 1000)))
    assert np.array_equal(read_alpha(data, (WIDE, HIGH)), np.where(RAMP < 128, 0, 255))
    assert np.abs(pixels_of(data)[..., 0] - np.where(RAMP < 128, 255, 2000 / 257)).max() < 0.51


@pytest.mark.parametrize("mode, kind", [("RGB", "PNG"), ("L", "PNG"), ("1", "PNG"), ("I;16", "PNG"), ("RGB", "JPEG"),
                                        ("CMYK", "JPEG"), ("P", "GIF"), ("RGB", "WEBP"), ("F", "TIFF")])
def test_what_has_no_opacity_is_opaque(mode, kind):
    found = read_alpha(encode(Image.new(mode, (WIDE, HIGH)), kind, exif=orientation(6)) if kind != "GIF" else
                       encode(Image.new(mode, (HIGH, WIDE)), kind), (20, 30))
    assert found.shape == (30, 20) and (found == 255).all()


@pytest.mark.parametrize("number", [1, 6])
@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "LA", "P", "1", "I;16", "clear P"])
def test_a_mask_is_the_first_channel(mode, number):
    """Whatever the others hold, clear or not, and without regard to a profile."""
    red, expected = Image.fromarray(STEPS), STEPS
    other, clear = Image.new("L", red.size, 99), Image.new("L", red.size, 0)
    options = {}
    if mode == "1":
        image, expected = red.point(lambda value: 255 * (value > 99)).convert("1"), 255 * (STEPS > 99)
    elif mode == "I;16":
        image = Image.fromarray(STEPS.astype(np.uint16) * 257)
    elif mode.endswith("P"):
        image = Image.fromarray(STEPS, "P")
        image.putpalette([value for level in range(256) for value in (level, 255 - level, 7)])
        options = {"transparency": bytes(256)} if mode == "clear P" else {}
    else:
        image = Image.merge(mode, {"L": [red], "RGB": [red, other, other], "RGBA": [red, other, other, clear],
                                   "LA": [red, clear]}[mode])
        options = {"icc_profile": P3 if mode.startswith("RGB") else GREY}
    image = image.transpose(TURNED_BACK[number]) if number > 1 else image
    data = encode(image, "PNG", exif=orientation(number), **options)
    assert read_size(data) == (WIDE, HIGH)
    found = read_mask(data, (WIDE, HIGH))
    assert found.dtype == np.uint8 and np.array_equal(found, expected)
    assert np.array_equal(read_mask(data, (3, 2)), expected[::16, ::16])


def test_a_mask_is_resized_by_areas():
    fine = np.random.default_rng(0).integers(0, 256, (HIGH, WIDE), np.uint8)
    found = read_mask(encode(Image.fromarray(fine), "PNG"), (WIDE // 4, HIGH // 4))
    assert np.abs(found - fine.reshape(HIGH // 4, 4, WIDE // 4, 4).mean((1, 3))).max() <= 1


# what cannot be read

@pytest.mark.parametrize("look", [read_size, lambda data: read_pixels(data, (8, 8), "box"), lambda data: read_mask(data, (8, 8)),
                                  lambda data: read_alpha(data, (8, 8)), images.verify])
def test_a_header_that_would_fill_the_memory(look):
    data = corpus.repair(SMALL_PNG.replace(struct.pack(">II", 4, 3), struct.pack(">II", 20000, 10000), 1))
    with pytest.raises(BadImage, match="more than 178956970 pixels"):
        look(data)
    jpeg = bytearray(JPEGS["baseline"])
    place = jpeg.index(b"\xff\xc0") + 5
    jpeg[place:place + 4] = struct.pack(">HH", 20000, 10000)
    with pytest.raises(BadImage, match="more than 178956970 pixels"):
        look(bytes(jpeg))


SMALL_PNG = encode(Image.new("RGB", (4, 3)), "PNG")


def test_a_large_image_is_no_warning(tmp_path):
    data = SMALL_PNG.replace(struct.pack(">II", 4, 3), struct.pack(">II", 12000, 10000), 1)
    (tmp_path / "a.png").write_bytes(corpus.repair(data))
    look = "import sys, pathlib; from library.data import images; print(images.read_size(pathlib.Path(sys.argv[1]).read_bytes()))"
    done = subprocess.run([sys.executable, "-W", "error", "-c", look, tmp_path / "a.png"], cwd=REPOSITORY, text=True,
                          capture_output=True)
    assert (done.stdout, done.stderr) == ("(12000, 10000)\n", "")


def test_thin_images_and_dots():
    for kind in ("PNG", "JPEG"):
        data = encode(corpus.scene(3, 30000, 10), kind)
        assert read_size(data) == (30000, 10)
        assert read_pixels(data, (6000, 64), "lanczos").size == (6000, 64)
        with pytest.raises(BadImage, match="so thin .* 3072000x1024"):
            read_pixels(data, (3072000, 1024), "lanczos")
        dot = encode(Image.new("RGB", (1, 1), (10, 20, 30)), kind)
        assert read_size(dot) == (1, 1) and difference(pixels_of(dot, (64, 64)), np.full((64, 64, 3), [10, 20, 30])) < 3


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
    for look in (read_size, lambda data: read_pixels(data, (9, 9), "lanczos"), lambda data: read_mask(data, (9, 9)),
                 lambda data: read_alpha(data, (9, 9)), images.verify):
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

"""Buckets, resizing and cropping, against scalar re-implementations written from kohya's and torchvision's rules."""

import hashlib
import io
import math

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

from library.data import geometry, prepare
from library.data.dataset import Data
from library.data.specs import Buckets, Fixed, Origin, Spec
from library.data.table import Text, build, flatten
from library.errors import UserError

SIDE = st.integers(1, 6000)
RECORD = np.dtype([("content", "S32"), ("width", "i4"), ("height", "i4")])
SDXL = geometry.make_buckets((1024, 1024), 512, 2048, 64)


def columns(sizes) -> tuple[np.ndarray, np.ndarray]:
    widths, heights = np.array(sizes, np.int64).reshape(-1, 2).T
    return widths, heights


def table_of(sizes, resolution=(64, 64), bucket=None, no_upscale=False, center_crop=False, random_crop=False, random_flip=False):
    size = Fixed(resolution, "center" if center_crop else "random") if bucket is None else Buckets(
        resolution, *bucket, no_upscale, "random" if random_crop else "center")
    contents = [hashlib.md5(str(number).encode()).hexdigest().encode() for number in range(len(sizes))]
    records = np.array([(content, *size) for content, size in zip(contents, sizes, strict=True)], RECORD)
    captions, start = flatten([["a"]] * len(sizes))
    names = np.array([f"{number}.png" for number in range(len(sizes))], Text)
    return build(Spec("set", Origin("folder", "x"), size, flip=random_flip), records, names, captions, start)[0]


# kohya, image by image

def kohya_buckets(resolution, shortest, longest, step):
    shortest, longest = shortest - shortest % step, longest + -longest % step
    area = resolution[0] * resolution[1]
    side = int(math.sqrt(area) / step) * step
    found = {(side, side)}
    width = shortest
    while width <= longest:
        height = min(longest, area // width // step * step)
        if height >= shortest:
            found |= {(width, height), (height, width)}
        width += step
    return sorted(found)


def kohya_choice(width, height, buckets):
    if (width, height) in buckets:
        return buckets.index((width, height))
    best, nearest = 0, math.inf
    for number, (bucket_w, bucket_h) in enumerate(buckets):
        distance = abs(bucket_w / bucket_h - width / height)
        if distance < nearest:
            best, nearest = number, distance
    return best


def kohya_resize(width, height, bucket):
    if width / height > bucket[0] / bucket[1]:
        scale = bucket[1] / height
    else:
        scale = bucket[0] / width
    return int(width * scale + 0.5), int(height * scale + 0.5)


def kohya_no_upscale(width, height, area, step):
    """(bucket, resized), or None where kohya divides by zero or makes a bucket without pixels."""
    def rounded(length):
        return int(length + 0.5) // step * step

    resized, ratio = (width, height), width / height
    if width * height > area:
        exact_w = math.sqrt(area * ratio)
        by_w, by_h = rounded(exact_w), rounded(area / exact_w)
        by_w_h, by_h_w = rounded(by_w / ratio), rounded(by_h * ratio)
        if not by_w_h or not by_h:
            return None
        if abs(by_w / by_w_h - ratio) < abs(by_h_w / by_h - ratio):
            resized = by_w, int(by_w / ratio + 0.5)
        else:
            resized = int(by_h * ratio + 0.5), by_h
    bucket = resized[0] - resized[0] % step, resized[1] - resized[1] % step
    return (bucket, resized) if min(bucket) else None


@pytest.mark.parametrize("resolution, shortest, longest, count", [
    (1024, 512, 2048, 33), (1024, 256, 2048, 41), (1024, 256, 1024, 25), (512, 256, 1024, 17)])
def test_bucket_sets_have_kohyas_size(resolution, shortest, longest, count):
    buckets = geometry.make_buckets((resolution, resolution), shortest, longest, 64)
    assert len(buckets) == len(set(buckets)) == count


def test_ends_of_the_sdxl_set():
    assert SDXL[0] == (512, 1856) and SDXL[-1] == (2048, 512) and (1024, 1024) in SDXL and (832, 1216) in SDXL


@given(st.tuples(st.integers(8, 256), st.integers(8, 256)), st.integers(1, 1024), st.integers(64, 4096),
       st.sampled_from([8, 16, 32, 64, 128]))
def test_bucket_sets_are_kohyas(eighths, shortest, longest, step):
    resolution = eighths[0] * 8, eighths[1] * 8
    outside = min(resolution) < shortest // step * step or max(resolution) > -(-longest // step) * step
    if outside:
        with pytest.raises(ValueError, match="--min_bucket_reso"):
            geometry.make_buckets(resolution, shortest, longest, step)
        return
    # kohya divides by zero for less than a step; ours begins at one step, and has no bucket of nothing
    kohyas = kohya_buckets(resolution, max(shortest, step), longest, step)
    expected = [bucket for bucket in kohyas if min(bucket)]
    if not expected:
        with pytest.raises(ValueError, match="--bucket_reso_steps"):
            geometry.make_buckets(resolution, shortest, longest, step)
        return
    buckets = geometry.make_buckets(resolution, shortest, longest, step)
    assert buckets == expected
    assert all(w * h <= resolution[0] * resolution[1] and w % step == h % step == 0 for w, h in buckets)


def test_bounds_that_exclude_the_resolution_name_the_flags():
    with pytest.raises(UserError, match="--resolution 1024,2048 .*--min_bucket_reso 256 to --max_bucket_reso 1024"):
        table_of([(800, 800)], resolution=(1024, 2048), bucket=(256, 1024, 64))


@given(st.lists(st.tuples(SIDE, SIDE), min_size=1, max_size=20))
def test_choice_of_bucket_is_kohyas(sizes):
    sizes = sizes + SDXL[::5]
    chosen = geometry.choose_buckets(*columns(sizes), SDXL)
    assert chosen.tolist() == [kohya_choice(*size, SDXL) for size in sizes]


def test_the_exact_size_goes_before_an_equal_shape_and_of_equals_the_first_is_taken():
    buckets = [(512, 1024), (1024, 2048), (1024, 1024), (2048, 1024)]
    sizes = [(1024, 2048), (256, 512), (10, 20), (3, 2)]    # 3:2 is as far from 1:1 as from 2:1
    assert geometry.choose_buckets(*columns(sizes), buckets).tolist() == [1, 0, 0, 2]


def test_more_rows_than_are_compared_at_once():
    draw = np.random.default_rng(0)
    widths, heights = draw.integers(1, 4000, (2, geometry._CHUNK + 1000))
    chosen = geometry.choose_buckets(widths, heights, SDXL)
    for row in (0, geometry._CHUNK - 1, geometry._CHUNK, len(widths) - 1):
        assert chosen[row] == kohya_choice(widths[row], heights[row], SDXL)


@given(st.lists(st.tuples(SIDE, SIDE), min_size=1, max_size=20))
def test_resize_rounds_as_kohya_and_covers_the_bucket(sizes):
    table = table_of(sizes, resolution=(1024, 1024), bucket=(512, 2048, 64))
    for row, size in enumerate(sizes):
        bucket = table.buckets[table.bucket_of[row]]
        resized = tuple(table.resized[row].tolist())
        assert resized[0] >= bucket[0] and resized[1] >= bucket[1]
        assert resized[0] == bucket[0] or resized[1] == bucket[1]
        assert resized == kohya_resize(*size, bucket)


@settings(max_examples=300)
@given(SIDE, SIDE, st.sampled_from([512, 768, 1024]), st.sampled_from([8, 32, 64]))
@example(2496, 1536, 1024, 64)    # both roundings keep the shape equally well: kohya takes the height's
@example(3968, 4096, 1024, 64)
@example(5, 7, 1024, 64)
@example(63, 5000, 512, 64)
def test_no_upscale_is_kohyas_and_never_enlarges(width, height, resolution, step):
    area = resolution ** 2
    bucket_w, bucket_h, resized_w, resized_h = (int(a[0]) for a in geometry.without_upscaling(*columns([(width, height)]),
                                                                                              area, step))
    assert bucket_w >= step and bucket_h >= step and bucket_w % step == bucket_h % step == 0
    assert resized_w >= bucket_w and resized_h >= bucket_h
    if width >= step and height >= step:
        assert resized_w <= width and resized_h <= height
    expected = kohya_no_upscale(width, height, area, step)
    if expected:
        assert ((bucket_w, bucket_h), (resized_w, resized_h)) == expected


def test_no_upscale_makes_a_bucket_for_images_smaller_than_a_step():
    table = table_of([(30, 20), (30, 500), (64, 64)], resolution=(512, 512), bucket=(256, 1024, 64), no_upscale=True)
    shapes = [table.buckets[number] for number in table.bucket_of]
    assert shapes == [(64, 64), (64, 448), (64, 64)]
    assert (table.resized >= np.array(shapes)).all()
    assert table.resized[2].tolist() == [64, 64]


# fixed size: diffusers, which is torchvision

@given(SIDE, SIDE, st.integers(1, 256))
def test_fixed_size_is_torchvisions_resize(width, height, eighths):
    side = eighths * 8
    resized_w, resized_h = (int(a[0]) for a in geometry.fixed(*columns([(width, height)]), (side, side)))
    short, long = min(width, height), max(width, height)
    expected_long = int(side * long / short)    # torchvision's _compute_resized_output_size
    assert (resized_w, resized_h) == ((side, expected_long) if width <= height else (expected_long, side))


@given(SIDE, SIDE, st.integers(1, 256), st.integers(1, 256))
def test_fixed_size_of_any_shape_just_covers(width, height, wide, high):
    target = wide * 8, high * 8
    resized_w, resized_h = (int(a[0]) for a in geometry.fixed(*columns([(width, height)]), target))
    assert resized_w >= target[0] and resized_h >= target[1]
    assert resized_w == target[0] or resized_h == target[1]
    scale = max(target[0] / width, target[1] / height)
    assert abs(resized_w - width * scale) < 1 + 1e-6 and abs(resized_h - height * scale) < 1 + 1e-6


@pytest.mark.parametrize("trim, diffusers, kohya", [(0, 0, 0), (1, 0, 0), (2, 1, 1), (3, 2, 1), (4, 2, 2), (5, 2, 2), (7, 4, 3)])
def test_the_middle_is_rounded_as_each_trainer_does(trim, diffusers, kohya):
    assert geometry.middle(trim, half_even=True) == diffusers
    assert geometry.middle(trim, half_even=False) == kohya


def test_middle_of_a_fixed_size_is_diffusers_and_of_a_bucket_kohyas():
    fixed = table_of([(1027, 1024)], resolution=(1024, 1024), center_crop=True)
    bucket = table_of([(1027, 1024)], resolution=(1024, 1024), bucket=(1024, 1024, 64))
    assert fixed.cut(0, 0)[:3] == (2, 0, False) and bucket.cut(0, 0)[:3] == (1, 0, False)


# the cut that is made is the cut that conditions

class Ruler:
    """A picture whose red is its column and whose green is its row."""

    def __init__(self, width: int, height: int):
        pixels = np.zeros((height, width, 3), np.uint8)
        pixels[..., 0], pixels[..., 1] = np.arange(width), np.arange(height)[:, None]
        self.image = Image.fromarray(pixels)

    def read(self, row: int) -> bytes:
        data = io.BytesIO()
        self.image.save(data, "PNG")
        return data.getvalue()


@pytest.mark.parametrize("size", [(200, 64), (64, 200), (64, 64)])
@pytest.mark.parametrize("random_crop, random_flip", [(False, False), (True, False), (False, True), (True, True)])
def test_pixels_are_cut_where_the_time_ids_say(size, random_crop, random_flip):
    table = table_of([size], resolution=(64, 64), center_crop=not random_crop, random_flip=random_flip)
    seen, flips = set(), set()
    for number in range(40):
        left, top, flip, _ = table.cut(0, number)
        pixels = prepare.load_pixels(Data([Ruler(*size)], [None], table), 0, number, "lanczos")
        assert pixels.shape == (64, 64, 3)
        column = size[0] - 1 - left if flip else left    # the crop is taken after flipping, as diffusers does
        assert pixels[0, 0].tolist() == [column, top, 0]
        assert pixels[-1, -1].tolist() == [column - 63 if flip else column + 63, top + 63, 0]
        assert table.time_ids(0, number) == (size[1], size[0], top, left, 64, 64)
        seen.add((left, top))
        flips.add(flip)
    assert flips == ({False, True} if random_flip else {False})
    if random_crop and max(size) > 64:
        assert len(seen) > 20
    else:
        assert seen == {((size[0] - 64) // 2, (size[1] - 64) // 2)}


def test_every_place_of_a_random_crop_is_equally_likely():
    table = table_of([(68, 64)] * 3000, resolution=(64, 64))
    counts = np.bincount([table.cut(row, 0)[0] for row in range(3000)], minlength=5)
    assert len(counts) == 5 and (np.abs(counts - 600) < 120).all()    # five standard deviations


def test_visits_take_turns_and_half_of_the_images_start_mirrored():
    table = table_of([(64, 64)] * 1000, resolution=(64, 64), random_flip=True)
    flips = np.array([[table.cut(row, number)[2] for number in range(4)] for row in range(1000)])
    assert abs(flips[:, 0].sum() - 500) < 80 and (flips[:, 1:] != flips[:, :-1]).all()


def test_variants_counts_the_different_cuts():
    sizes, options = [(128, 64), (64, 64)], {"resolution": (64, 64)}
    for random_flip, center_crop, most, expected in [
            (False, True, 4, [1, 1]), (True, True, 4, [2, 2]), (True, True, 1, [1, 1]), (False, False, 4, [4, 1]),
            (True, False, 4, [4, 2]), (False, False, None, [None, 1]), (True, False, None, [None, 2])]:
        table = table_of(sizes, random_flip=random_flip, center_crop=center_crop, **options)
        assert [table.variants(row, most) for row in range(2)] == expected


@pytest.mark.parametrize("no_upscale", [False, True])
def test_ten_thousand_sizes_have_kohyas_bucket_and_resize(no_upscale):
    sizes = np.exp(np.random.default_rng(1).uniform(np.log(64), np.log(8000), (10_000, 2))).astype(int)
    table = table_of(sizes.tolist(), resolution=(1024, 1024), bucket=(512, 2048, 64), no_upscale=no_upscale)
    compared = 0
    for row, (width, height) in enumerate(sizes.tolist()):
        bucket = SDXL[kohya_choice(width, height, SDXL)]
        expected = kohya_no_upscale(width, height, 1024 ** 2, 64) if no_upscale else (bucket, kohya_resize(width, height, bucket))
        if expected:    # else kohya divides by zero
            assert (table.buckets[table.bucket_of[row]], tuple(table.resized[row].tolist())) == expected, (width, height)
            compared += 1
    assert compared > 9_900

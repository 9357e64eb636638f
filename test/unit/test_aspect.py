"""SimpleTuner's sizes against a scalar statement of the rules, one image at a time, written from its documentation."""

import hashlib
import itertools
import math
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from library.data.aspect import REASONS, fit
from library.data.specs import Aspect

SIDE = st.integers(1, 8000)
ASPECTS = ("square", "preserve", "closest", "random")
CHOICES = ((1.0, 1.0), (0.5, 2.0), (2.0, 1.0), (1.23, 0.5))
SIZES = {"pixel": (640, 300, 1500, 900), "area": (0.7, 0.2, 2.0, 1.5), "pixel_area": (832, 448, 1500, 1200)}


def contents_of(count: int, seed: int = 0) -> np.ndarray:
    digests = [hashlib.blake2b(f"{seed} {number}".encode(), digest_size=16).hexdigest() for number in range(count)]
    return np.array([digest.encode() for digest in digests], "S32")


def columns(size: Aspect, sizes, contents=None):
    widths, heights = np.array(sizes, np.int32).reshape(-1, 2).T
    return fit(size, widths, heights, contents_of(len(widths)) if contents is None else contents)


# the rules, image by image

def multiple(length, step: int) -> int:
    """The nearest multiple of the alignment; Python rounds a tie to even."""
    return max(round(length / step) * step, step)


def area_of(size: Aspect, value) -> Fraction:
    """A size in its unit -> pixels of area."""
    exact = Fraction(str(value))
    return exact * exact if size.unit == "pixel_area" else exact * 10**6


def target_of(size: Aspect, ratio: float) -> tuple[int, int]:
    if size.unit == "pixel":
        shorter, longer = multiple(size.resolution, size.alignment), None
        if ratio >= 1:
            longer = multiple(size.resolution * ratio, size.alignment)
            return longer, shorter
        longer = multiple(size.resolution / ratio, size.alignment)
        return shorter, longer
    edge = multiple(math.sqrt(area_of(size, size.resolution)), size.alignment)
    return multiple(edge * math.sqrt(ratio), size.alignment), multiple(edge / math.sqrt(ratio), size.alignment)


def draw_of(content: bytes) -> float:
    return int(content[16:29], 16) / 16**13


def rules(size: Aspect, width: int, height: int, content: bytes):
    """(target, resized without a bound on how it is rounded, reason): None for what an excluded image does not have."""
    ratio = round(width / height, size.rounding)
    too_small = min(width, height) < size.minimum if size.unit == "pixel" else width * height < area_of(size, size.minimum)
    if too_small:
        return None, None, "smaller than minimum_image_size"
    if size.min_ratio is not None and ratio < size.min_ratio:
        return None, None, "its aspect ratio is below minimum_aspect_ratio"
    if size.max_ratio is not None and ratio > size.max_ratio:
        return None, None, "its aspect ratio is above maximum_aspect_ratio"
    if ratio == 0 or round(height / width, size.rounding) == 0:
        return None, None, "so long and thin that its aspect ratio rounds to nothing"

    if not size.crop or size.aspect == "preserve":
        target = target_of(size, ratio)
    elif size.aspect == "square":
        target = target_of(size, 1.0)
    else:
        allowed = []
        for choice, weight in size.choices:
            across, down = target_of(size, choice)
            limit = None if size.max_upscale is None else 1 + Fraction(str(size.max_upscale))
            if limit is None or (across <= width * limit and down <= height * limit):
                allowed.append((choice, weight))
        if not allowed:
            return None, None, "every shape of crop_aspect_buckets enlarges it by more than max_upscale_threshold"
        if size.aspect == "closest":
            chosen = min((choice for choice, _ in allowed), key=lambda choice: abs(choice - ratio))
        else:
            left = draw_of(content) * sum(weight for _, weight in allowed)
            while left >= allowed[0][1]:
                left -= allowed.pop(0)[1]
            chosen = allowed[0][0]
        target = target_of(size, chosen)

    scale = 1.0    # a crop is taken from the image as it is ...
    if size.crop and size.maximum is not None:    # ... unless that is too large ...
        if size.unit == "pixel" and min(width, height) > size.maximum:
            scale = size.downsample / min(width, height)
        elif size.unit != "pixel" and width * height > area_of(size, size.maximum):
            scale = math.sqrt(area_of(size, size.downsample) / (width * height))
    exact = width * scale, height * scale
    just = max(target[0] / width, target[1] / height)
    if not size.crop or round(exact[0]) < target[0] or round(exact[1]) < target[1]:    # ... or too small for the cut
        exact = width * just, height * just
    return target, exact, ""


def variations():
    """Every unit, crop, crop aspect, bound on size, bound on shape, and bound on enlarging."""
    for unit, (resolution, minimum, maximum, downsample) in SIZES.items():
        for crop, aspect, bounded, shaped, upscale, alignment in itertools.product(
                (False, True), ASPECTS, (False, True), (False, True), (None, 0.2), (64, 8)):
            if upscale is None or (crop and aspect in ("closest", "random")):
                yield Aspect(resolution, unit, crop, aspect, choices=CHOICES, minimum=minimum if shaped else 0,
                             maximum=maximum if bounded else None, downsample=downsample if bounded else None,
                             max_upscale=upscale, min_ratio=0.4 if shaped else None, max_ratio=2.5 if shaped else None,
                             alignment=alignment)


VARIATIONS = list(variations())
EACH = -(-10_000 // len(VARIATIONS))


@pytest.mark.parametrize("unit", SIZES)
@pytest.mark.parametrize("crop", [False, True])
@pytest.mark.parametrize("aspect", ASPECTS)
def test_ten_thousand_random_sizes_follow_the_rules(unit, crop, aspect):
    tried = Counter()
    for number, size in enumerate(VARIATIONS):
        if (size.unit, size.crop, size.aspect) != (unit, crop, aspect):
            continue
        draw = np.random.default_rng(number)
        sizes = np.exp(draw.uniform(math.log(40), math.log(6000), (EACH, 2))).astype(int)
        contents = contents_of(EACH, number)
        target_w, target_h, resized_w, resized_h, reasons = columns(size, sizes, contents)
        for row, (width, height) in enumerate(sizes.tolist()):
            target, exact, reason = rules(size, width, height, contents[row])
            assert REASONS[reasons[row]] == reason, (size, width, height)
            tried[reason] += 1
            if reason:
                continue
            assert (target_w[row], target_h[row]) == target, (size, width, height)
            assert resized_w[row] >= target[0] and resized_h[row] >= target[1], (size, width, height)
            assert abs(resized_w[row] - exact[0]) <= 1 and abs(resized_h[row] - exact[1]) <= 1, (size, width, height)
    assert tried[""] > 100 and tried["smaller than minimum_image_size"]
    if crop and aspect in ("closest", "random"):
        assert tried[REASONS[5]]


def test_what_the_documentation_says_of_sizes():
    """Its own examples: 1024 pixel edges, 1024 pixel_area, a minimum in each, a threshold of enlarging."""
    pixel = Aspect(1024, "pixel", minimum=1024)
    assert [REASONS[code] for code in columns(pixel, [(768, 1024), (1280, 768), (1760, 1024), (1024, 1024)])[4]] == [
        "smaller than minimum_image_size"] * 2 + [""] * 2
    area = Aspect(1024, "pixel_area", minimum=1024)
    assert list(columns(area, [(1280, 960), (1000, 1000)])[4]) == [0, 1]
    assert [tuple(int(column[row]) for column in columns(Aspect(1024), [(1216, 832), (832, 1216)])[:2]) for row in (0, 1)] == [
        (1216, 832), (832, 1216)]
    large = Aspect(1024, crop=True, maximum=1536, downsample=1280)
    *_, width, height, _ = columns(large, [(4000, 3000), (1536, 1536), (1600, 1200)])
    assert abs(int(width[0]) * int(height[0]) / 1280**2 - 1) < 2e-3 and abs(width[0] / height[0] - 4 / 3) < 2e-3
    assert (width[1], height[1], width[2], height[2]) == (1536, 1536, 1600, 1200)    # not larger than the maximum
    *_, width, height, _ = columns(Aspect(1024, crop=True), [(4096, 4096)])
    assert (width[0], height[0]) == (4096, 4096)    # cut out of the image as it is
    choose = Aspect(1024, "pixel", True, "random", choices=((1.0, 1), (0.5, 1), (2.0, 1)), max_upscale=0.2)
    assert REASONS[columns(choose, [(256, 256)])[4][0]] == REASONS[5]


def test_limits_are_exact():
    """On the limit is within it, also where the decimal number has no exact form in binary."""
    enlarged = Aspect(1856, "pixel", True, "closest", choices=((1.0, 1),), max_upscale=0.16)
    assert [int(code) for code in columns(enlarged, [(1600, 1600), (1599, 1599)])[4]] == [0, 5]    # 1600 x 1.16 = 1856
    for least, image in ((1.009, (1009, 1000)), (0.07, (350, 200))):    # 1.009 x 1e6 is below, 0.07 x 1e6 above
        found = columns(Aspect(1.0, "area", minimum=least), [image, (image[0] - 1, image[1])])
        assert [int(code) for code in found[4]] == [0, 1]
    for unit, maximum, image in (("pixel", 1000, (1000, 3000)), ("area", 1.009, (1009, 1000))):
        size = Aspect(0.25 if unit == "area" else 500, unit, True, maximum=maximum, downsample=maximum / 2)
        assert [int(side[0]) for side in columns(size, [image])[2:4]] == list(image)
        assert columns(size, [(image[0] + 1, image[1])])[2][0] < image[0]


@given(st.lists(st.tuples(SIDE, SIDE), min_size=1, max_size=20), st.sampled_from(VARIATIONS))
def test_cover_and_alignment(sizes, size):
    target_w, target_h, resized_w, resized_h, reasons = columns(size, sizes)
    assert (resized_w >= target_w).all() and (resized_h >= target_h).all()
    assert not (target_w % size.alignment).any() and not (target_h % size.alignment).any() and (target_w > 0).all()
    kept = reasons == 0
    if not size.crop:    # the shape is kept, and one side fits exactly
        assert ((resized_w == target_w) | (resized_h == target_h))[kept].all()


@given(st.lists(st.tuples(SIDE, SIDE), min_size=1, max_size=30), st.sampled_from(VARIATIONS), st.randoms(use_true_random=False))
def test_each_image_is_judged_by_itself(sizes, size, random):
    order = list(range(len(sizes)))
    random.shuffle(order)
    contents = contents_of(len(sizes))
    whole = columns(size, sizes, contents)
    shuffled = columns(size, [sizes[row] for row in order], contents[order])
    assert all((one[order] == other).all() for one, other in zip(whole, shuffled, strict=True))
    alone = columns(size, sizes[:1], contents[:1])
    assert all(one[0] == other[0] for one, other in zip(whole, alone, strict=True))


@pytest.mark.parametrize("size", VARIATIONS[::7], ids=lambda size: f"{size.unit} {size.crop} {size.aspect}")
def test_extreme_images(size):
    sizes = [(1, 1), (30000, 10), (10, 30000), (1, 30000), (30000, 30000), (199, 1), (1, 199)]
    with np.errstate(all="raise"):
        found = columns(size, sizes)
    assert all((column > 0).all() and (column < 2**30).all() for column in found[:4])
    assert found[4][1] and found[4][2] and found[4][3]    # nothing can be made of these


@given(st.integers(20, 4000), st.tuples(SIDE, SIDE))
def test_an_edge_and_its_area_are_the_same(edge, image):
    found = [columns(Aspect(value, unit, True, "preserve", minimum=value, maximum=value, downsample=value), [image])
             for value, unit in ((edge, "pixel_area"), (edge * edge / 1e6, "area"))]
    assert [column[0] for column in found[0]] == [column[0] for column in found[1]]


def test_random_shapes_are_drawn_by_weight_and_by_the_file_alone():
    size = Aspect(1024, crop=True, aspect="random", choices=((1.0, 1.0), (0.5, 2.0), (2.0, 5.0)))
    contents = contents_of(8000)
    target_w, target_h, *_ = columns(size, [(2000, 2000)] * 8000, contents)
    shapes = Counter(zip(target_w.tolist(), target_h.tolist(), strict=True))
    assert [round(shapes[target_of(size, choice)] / 1000) for choice, _ in size.choices] == [1, 2, 5]
    again = columns(size, [(999, 3000)] * 8000, contents)    # of another size: the file still has its shape
    assert (again[0] == target_w).all()


def test_closest_takes_the_first_of_equals_and_the_nearest_that_is_allowed():
    size = Aspect(1024, "pixel", True, "closest", choices=((1.5, 1), (0.5, 1), (1.0, 1)), max_upscale=0)
    assert columns(size, [(1600, 1600)])[0][0] == 1024    # 1.0, exactly
    assert [int(column[0]) for column in columns(size, [(1250, 1000)])[:2]] == [64, 64]    # none without enlarging
    assert columns(size, [(2000, 1600)])[0][0] == 1536    # 1.25: 1.5 and 1.0 are as near, and 1.5 stands first
    assert columns(size, [(1500, 1200)])[0][0] == 1024    # ... but 1536 would enlarge this one


@settings(max_examples=300)
@given(SIDE, SIDE, st.integers(1, 3))
def test_ratios_are_rounded_as_python_rounds(width, height, digits):
    size = Aspect(1.0, "area", min_ratio=round(width / height, digits) or None, max_ratio=round(width / height, digits) or None,
                  rounding=digits)
    reason = REASONS[columns(size, [(width, height)])[4][0]]
    assert reason in ("", REASONS[4])    # neither below nor above itself

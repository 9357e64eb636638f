"""The table of a run: every cut lies in its image, and what SDXL is told of it is the cut; sets are joined and cut down."""

import hashlib
import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from library.data.captions import Rules
from library.data.scan import RECORD
from library.data.specs import Aspect, Buckets, Fixed, Origin, Spec
from library.data.table import Text, build, flatten, join, subset

PLACE = Origin("folder", "x")
CHOICES = ((1.0, 1.0), (0.5, 2.0), (1.5, 1.0))


def table_of(spec: Spec, sizes, texts=None, batch_size: int = 1):
    records = np.zeros(len(sizes), RECORD)
    records["width"], records["height"] = np.array(sizes).T
    records["content"] = [hashlib.md5(f"{spec.id} {number}".encode()).hexdigest().encode() for number in range(len(sizes))]
    names = np.array([f"{spec.id}/{number}.png" for number in range(len(sizes))], Text)
    return build(spec, records, names, *flatten(texts or [[f"{spec.id} {number}"] for number in range(len(sizes))]), batch_size)


def every_rule():
    for (unit, resolution), (crop, aspect), style in itertools.product(
            (("pixel", 512), ("area", 0.5), ("pixel_area", 700)),
            ((True, "square"), (True, "preserve"), (True, "closest"), (True, "random"), (False, "square")),
            ("center", "random", "corner")):
        yield Aspect(resolution, unit, crop, aspect, style, CHOICES if aspect in ("closest", "random") else ())
    yield from (Fixed((512, 384), style) for style in ("center", "random"))
    yield from (Buckets((512, 512), 256, 1024, 64, no_upscale, style) for no_upscale in (False, True)
                for style in ("center", "random"))


@pytest.mark.parametrize("size", list(every_rule()), ids=lambda size: " ".join(map(str, vars(size).values()))[:50])
def test_no_cut_leaves_its_image_and_the_conditioning_is_the_cut(size):
    draw = np.random.default_rng(0)
    sizes = np.exp(draw.uniform(np.log(40), np.log(6000), (220, 2))).astype(int)    # 50 rules: 11,000 sizes
    table, left_out = table_of(Spec("set", PLACE, size, flip=True), sizes)
    style = size.style if not isinstance(size, Aspect) or size.crop else "center"
    for row in set(range(len(sizes))) - left_out.keys():
        (width, height), bucket = table.resized[row].tolist(), table.buckets[table.bucket_of[row]]
        for number in range(3):
            left, top, flip, colour = table.cut(row, number)
            assert 0 <= left <= width - bucket[0] and 0 <= top <= height - bucket[1] and colour is None
            assert table.time_ids(row, number) == (*sizes[row][::-1], top, left, bucket[1], bucket[0])
            if style == "corner":
                assert (left, top) == (0, 0)
            elif style == "center":    # within half a pixel of the middle
                assert abs(2 * left - (width - bucket[0])) <= 1 and abs(2 * top - (height - bucket[1])) <= 1
        assert {table.cut(row, number).flip for number in range(2)} == {False, True}
    spare = (table.resized - np.array(table.buckets)[table.bucket_of]).max(axis=1)
    if style == "random":
        wide = [row for row in np.flatnonzero(spare > 100) if row not in left_out]
        assert len(wide) > 5 or not getattr(size, "crop", True)
        assert all(len({table.cut(row, number)[:2] for number in range(6)}) > 3 for row in wide)


SETS = st.lists(st.tuples(st.lists(st.sampled_from([(64, 64), (128, 64), (64, 128)]), min_size=1, max_size=5),
                          st.sampled_from([None, 2, 3])), min_size=1, max_size=4)


@given(SETS, st.randoms(use_true_random=False))
def test_joined_sets_keep_every_row_and_share_buckets(sets, random):
    rules = [Rules(), Rules(prefix="a"), Rules(shuffle=True), Rules(empty=0.5)]
    parts = [table_of(Spec(str(number), PLACE, Buckets((64, 64), 32, 128, 32), rules[number], batch_size=batch), sizes,
                      [[f"{number} {row} {text}" for text in range(row % 3)] for row in range(len(sizes))], 4)[0]
             for number, (sizes, batch) in enumerate(sets)]
    whole = join(parts)
    kinds = set(zip(whole.buckets, whole.batch_sizes, strict=True))
    assert len(whole) == sum(map(len, parts)) and len(kinds) == len(whole.buckets)
    row = 0
    for number, part in enumerate(parts):
        for own in range(len(part)):
            assert whole.texts(row) == part.texts(own) and whole.spec(row) is part.spec(0) and whole.set_of[row] == number
            bucket = whole.bucket_of[row]
            assert whole.buckets[bucket] == part.buckets[part.bucket_of[own]]
            assert whole.batch_sizes[bucket] == (sets[number][1] or 4)
            assert whole.cut(row, 1) == part.cut(own, 1) and whole.time_ids(row, 1) == part.time_ids(own, 1)
            row += 1
    chosen = sorted(random.sample(range(len(whole)), random.randint(1, len(whole))))
    some = whole.select(np.array(chosen))
    assert [some.texts(place) for place in range(len(some))] == [whole.texts(row) for row in chosen]
    assert some.name.tolist() == whole.name[chosen].tolist() and some.set_of.tolist() == whole.set_of[chosen].tolist()


@given(st.integers(1, 50), st.integers(0, 2**64 - 1), st.data())
def test_a_subset_is_in_order_and_its_key_decides(count, key, data):
    wanted = data.draw(st.integers(1, count))
    chosen = subset(count, wanted, key)
    assert len(set(chosen.tolist())) == wanted and chosen.tolist() == sorted(chosen) and chosen.tolist() == subset(
        count, wanted, key).tolist()
    assert len({tuple(subset(50, 5, other)) for other in range(20)}) > 15

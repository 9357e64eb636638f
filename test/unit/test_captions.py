"""Which text an image is shown with: which caption, in which order of tags, or none."""

from collections import Counter

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from library.data import captions, prepare
from library.data.table import Text, build, flatten

TAG = st.text("abc xyzé", max_size=4).map(str.strip)
TAGS = st.lists(TAG, min_size=1, max_size=6)
CAPTION = TAGS.map(", ".join)


def tags_of(caption: str) -> list[str]:
    return [tag.strip() for tag in caption.split(",")]


def pick(texts, visit, row=0, variants=4, seed=0, empty=0.0, shuffle=False, keep=0):
    return captions.pick(texts, seed, row, visit, variants, empty=empty, shuffle=shuffle, keep=keep)


@given(CAPTION, st.integers(0, 7), st.integers(0, 20))
def test_shuffling_keeps_every_tag_and_the_first_ones_in_place(caption, keep, number):
    shown, tags = tags_of(captions.variant(caption, number, True, keep)), tags_of(caption)
    assert sorted(shown) == sorted(tags)
    assert shown[:keep] == tags[:keep]


def test_tags_are_written_as_kohya_writes_them():
    assert captions.variant("b ,a,  c c", 0, True, 3) == "b, a, c c"


@given(CAPTION, st.integers(0, 20), st.integers(0, 3))
def test_without_shuffling_a_caption_stays_as_it_is(caption, number, keep):
    assert captions.variant(caption, number, False, keep) == caption


def test_a_sentence_without_commas_stays_as_it_is():
    assert captions.variant("  a cat and a dog ", 3, True, 0) == "  a cat and a dog "


def test_all_orders_are_equally_likely():
    orders = Counter(captions.variant("a, b, c", number, True, 0) for number in range(6000))
    assert len(orders) == 6 and all(abs(count - 1000) < 150 for count in orders.values())    # five standard deviations


def test_two_captions_are_not_shuffled_alike():
    orders = [[tags_of(captions.variant(f"{word}, 1, 2, 3, 4, 5", number, True, 1))[1:] for number in range(5)]
              for word in ("cat", "dog")]
    assert orders[0] != orders[1]


@given(st.lists(CAPTION, min_size=1, max_size=3), st.integers(1, 5), st.booleans(), st.integers(0, 3), st.integers(0, 40),
       st.integers(0, 2**31), st.sampled_from([0.0, 0.5]))
def test_whatever_is_picked_was_cached(texts, variants, shuffle, keep, visit, seed, empty):
    shown = pick(texts, visit, 3, variants, seed, empty, shuffle, keep)
    assert shown in captions.possible(texts, variants, shuffle=shuffle, keep=keep) | {""}


@given(CAPTION, st.integers(1, 4))
def test_nothing_is_cached_that_is_never_picked(caption, variants):
    picked = {pick([caption], visit, variants=variants, shuffle=True) for visit in range(variants)}
    assert captions.possible([caption], variants, shuffle=True, keep=0) == picked


def test_visits_take_the_orders_in_turn():
    caption = "a, b, c, d, e, f"
    shown = [pick([caption], visit, variants=3, shuffle=True) for visit in range(9)]
    assert shown[:3] == shown[3:6] == shown[6:] and len(set(shown)) == 3


def test_without_a_cache_each_visit_has_an_order_of_its_own():
    shown = {pick(["a, b, c, d, e, f, g, h"], visit, variants=None, shuffle=True) for visit in range(50)}
    assert len(shown) == 50


def test_every_caption_of_a_list_is_shown_equally_often():
    counts = Counter(pick(["a", "b", "c"], visit, row) for row in range(60) for visit in range(50))
    assert set(counts) == {"a", "b", "c"} and all(abs(count - 1000) < 130 for count in counts.values())


def test_the_empty_prompt_comes_as_often_as_asked_and_anew_at_each_visit():
    dropped = np.array([[pick(["a"], visit, row, empty=0.3) == "" for visit in range(50)] for row in range(60)])
    assert abs(dropped.mean() - 0.3) < 5 * (0.3 * 0.7 / 3000) ** 0.5
    assert 0 < dropped.sum(axis=0).min() and dropped.sum(axis=0).max() < 60    # not one draw for all images
    assert 0 < dropped.sum(axis=1).min() and dropped.sum(axis=1).max() < 50    # and not one for all visits


def test_never_and_always_empty():
    assert {pick(["a"], visit) for visit in range(500)} == {"a"}
    assert {pick(["a"], visit, empty=1.0) for visit in range(500)} == {""}


def test_an_image_without_captions_has_the_empty_prompt():
    assert pick([], 0) == ""


def test_dropping_does_not_change_which_caption_is_shown():
    texts = ["a", "b", "c"]
    always = [pick(texts, visit) for visit in range(200)]
    sometimes = [pick(texts, visit, empty=0.5) for visit in range(200)]
    assert all(shown in ("", caption) for shown, caption in zip(sometimes, always, strict=True))
    assert len({caption for caption, shown in zip(always, sometimes, strict=True) if shown == ""}) == 3


@given(st.integers(0, 2**31), st.integers(0, 9), st.integers(0, 9))
def test_a_pick_is_a_function_of_seed_image_and_visit(seed, row, visit):
    texts = ["a, b, c", "d, e, f", "g"]
    one = pick(texts, visit, row, 4, seed, 0.3, True)
    pick(texts, visit + 1, row, 4, seed, 0.3, True)
    assert pick(texts, visit, row, 4, seed, 0.3, True) == one


def test_seeds_rows_and_visits_draw_for_themselves():
    def drawn(seed, row, first=0):
        return [pick(list("abcdef"), visit, row, seed=seed) for visit in range(first, first + 30)]
    assert len({tuple(drawn(*key)) for key in [(0, 0), (1, 0), (0, 1), (0, 0, 30)]}) == 4


@given(st.lists(st.lists(CAPTION, min_size=1, max_size=3), min_size=1, max_size=4), st.integers(1, 3), st.booleans())
def test_all_prompts_of_a_table(texts, most, shuffle):
    flat, start = flatten(texts)
    records = np.ones(len(texts), [("content", "S32"), ("width", "i4"), ("height", "i4")])
    table = build(records, np.array([str(row) for row in range(len(texts))], Text), flat, start, resolution=(64, 64))
    assert [table.texts(row) for row in range(len(texts))] == texts
    prompts = prepare.all_prompts(table, most, shuffle, keep=1)
    expected = set.union(*(captions.possible(several, most, shuffle=shuffle, keep=1) for several in texts))
    assert set(prompts) == expected | {""}

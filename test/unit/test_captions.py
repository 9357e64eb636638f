"""Which text an image is shown with: which caption, which of {a|b}, in which order of tags, or none."""

import re
from collections import Counter
from dataclasses import replace
from itertools import combinations, permutations, product
from math import floor

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from library.data import captions, prepare
from library.data.captions import Rules
from library.data.specs import Fixed, Origin, Spec
from library.data.table import Text, build, flatten

TAG = st.text("abc xyzé", max_size=4).map(str.strip)
TAGS = st.lists(TAG, min_size=1, max_size=6)
CAPTION = TAGS.map(", ".join)
PLAIN, SHUFFLE = Rules(), Rules(shuffle=True)
SMALL_RULES = st.builds(
    Rules, shuffle=st.booleans(), keep=st.integers(0, 3), separator=st.sampled_from([",", ";", ", ", " "]),
    secondary=st.sampled_from([None, "+"]), keep_separator=st.sampled_from(["", "|||"]), wildcard=st.booleans(),
    prefix=st.sampled_from(["", "photo", "{x|y}"]), suffix=st.sampled_from(["", "end"]),
    tag_dropout=st.sampled_from([0.0, 0.5, 1.0]), warmup_min=st.integers(0, 3), warmup_steps=st.sampled_from([0.0, 100.0]),
    orders=st.sampled_from([None, 1, 3]), original=st.booleans(),
    empty=st.sampled_from([0.0, 0.5, 1.0]), empty_every=st.integers(0, 2))


def tags_of(caption: str) -> list[str]:
    return [tag.strip() for tag in caption.split(",")]


def pick(texts, visit, row=0, variants=4, seed=0, rules=PLAIN, **more):
    return captions.pick(texts, rules, seed, row, visit, variants, **more)


# order of tags

@given(CAPTION, st.integers(0, 7), st.integers(0, 20))
def test_shuffling_keeps_every_tag_and_the_first_ones_in_place(caption, keep, number):
    shown, tags = tags_of(captions.variant(caption, number, Rules(shuffle=True, keep=keep))), tags_of(caption)
    assert sorted(shown) == sorted(tags)
    assert shown[:keep] == tags[:keep]


def test_orders_are_those_of_earlier_versions():
    """Their embeddings are in users' caches."""
    caption, rules = "1girl, solo, red hat, smile, outdoors", Rules(shuffle=True, keep=1)
    assert [captions.variant(caption, number, rules) for number in range(3)] == [
        "1girl, solo, red hat, outdoors, smile", "1girl, red hat, solo, smile, outdoors", "1girl, outdoors, solo, red hat, smile"]
    assert [captions.pick(["a, b, c, d", "x, y, z"], Rules(shuffle=True, empty=0.3), 5, 7, visit, 4) for visit in range(6)] == [
        "", "c, a, b, d", "x, y, z", "d, a, c, b", "z, y, x", ""]


def test_tags_are_written_as_kohya_writes_them():
    assert captions.variant("b ,a,  c c", 0, Rules(shuffle=True, keep=3)) == "b, a, c c"


@given(CAPTION, st.integers(0, 20), st.integers(0, 3))
def test_without_rules_a_caption_stays_as_it_is(caption, number, keep):
    assert captions.variant(caption, number, Rules(keep=keep)) == caption


def test_a_sentence_without_commas_stays_as_it_is():
    assert captions.variant("  a cat and a dog ", 3, SHUFFLE) == "  a cat and a dog "


def test_all_orders_are_equally_likely():
    orders = Counter(captions.variant("a, b, c", number, SHUFFLE) for number in range(6000))
    assert len(orders) == 6 and all(abs(count - 1000) < 150 for count in orders.values())    # five standard deviations


def test_two_captions_are_not_shuffled_alike():
    orders = [[tags_of(captions.variant(f"{word}, 1, 2, 3, 4, 5", number, replace(SHUFFLE, keep=1)))[1:] for number in range(5)]
              for word in ("cat", "dog")]
    assert orders[0] != orders[1]


def test_the_seed_of_the_orders_changes_them_and_that_of_the_run_does_not():
    def orders(seed, run=0):
        return [captions.pick(["a, b, c, d, e, f"], replace(SHUFFLE, seed=seed), run, 0, visit, 4) for visit in range(4)]
    assert orders(0) != orders(1) and orders(1) == orders(1, run=7)


@pytest.mark.parametrize("separator, caption, expected", [
    (",", "b ,a", "b, a"), (";", "b;a;c, d", "b; a; c, d"), (", ", "b, a", "b, a"), (" ", "b a", "b a"), ("。", "b。a", "b。 a"),
    (". ", "b. a", "b. a")])
def test_tags_are_joined_by_the_separator_that_was_given(separator, caption, expected):
    assert captions.variant(caption, 0, Rules(shuffle=True, keep=9, separator=separator)) == expected


def test_a_separator_for_kept_tags_fixes_what_is_before_it_and_behind_a_second_one():
    rules = Rules(shuffle=True, keep=9, keep_separator="|||")
    shown = {captions.variant("a, b ||| c, d,, e ||| f, g", number, rules) for number in range(60)}
    assert shown == {", ".join(["a", "b", *order, "f", "g"]) for order in permutations("cde")}
    shown = {captions.variant("a, b ||| c, d", number, rules) for number in range(20)}
    assert shown == {"a, b, c, d", "a, b, d, c"}
    assert captions.variant("a, b, c", 4, rules) == "a, b, c"    # a caption without it has its first tags kept


def test_the_separator_for_kept_tags_is_never_shown():
    assert captions.variant("a ||| b, c", 0, Rules(keep_separator="|||")) == "a, b, c"


def test_the_secondary_separator_joins_tags_that_move_together():
    shown = {captions.variant("a;;b, c, d", number, Rules(shuffle=True, secondary=";;")) for number in range(60)}
    assert shown == {", ".join(order).replace("a;b", "a,b") for order in permutations(["a;b", "c", "d"])}


# orders that are counted (SimpleTuner's)

def test_visits_take_the_counted_orders_in_turn_and_the_original_first():
    caption, rules = "a, b, c, d, e", Rules(shuffle=True, orders=2, original=True)
    shown = [pick([caption], visit, variants=None, rules=rules) for visit in range(9)]
    assert shown[0] == caption and shown[:3] == shown[3:6] == shown[6:] and len(set(shown)) == 3
    assert captions.possible([caption], rules, 8) == set(shown)
    assert captions.possible([caption], rules, 2) == set(shown[:2])
    assert [captions.count(rules, most) for most in (None, 8, 3, 2)] == [3, 3, 3, 2]
    assert captions.count(replace(rules, original=False), None) == 2


def test_the_original_is_as_it_was_written():
    assert captions.variant(" a ,b,, c", 0, Rules(shuffle=True, orders=2, original=True)) == " a ,b,, c"


@pytest.mark.parametrize("separator", [".", ". "])
def test_sentences_end_in_a_full_stop_in_any_order(separator):
    rules = Rules(shuffle=True, separator=separator, orders=99)
    shown = {captions.variant("A cat. It sits. It waits.", number, rules) for number in range(60)}
    assert shown == {". ".join(order) + "." for order in permutations(["A cat", "It sits", "It waits"])}
    assert captions.variant("A cat sits.", 5, rules) == "A cat sits."


# wildcards

LITERAL = st.text("ab ,", max_size=3)
WAY = st.one_of(LITERAL, LITERAL.map(lambda text: ("x{{" + text + "}}", "x{" + text + "}")))    # as written, as meant
PIECE = st.one_of(LITERAL, st.sampled_from(["{{", "}}"]),
                  st.lists(WAY, min_size=1, max_size=3).filter(lambda ways: ways != [""]))


@given(st.lists(PIECE, max_size=4))
def test_wildcards_choose_one_way_each_and_double_braces_are_braces(pieces):
    """Written and meant are built side by side: the text, and every reading of it."""
    text, readings = "", [""]
    for piece in pieces:
        if isinstance(piece, list):
            ways = [(way, way) if isinstance(way, str) else way for way in piece]
            text += "{" + "|".join(written for written, _ in ways) + "}"
            readings = [start + meant for start, (_, meant) in product(readings, ways)]
        else:
            text += piece
            readings = [start + {"{{": "{", "}}": "}"}.get(piece, piece) for start in readings]
    shown = {captions.variant(text, number, Rules(wildcard=True)) for number in range(40)}
    assert shown <= set(readings)


@pytest.mark.parametrize("text, ways", [
    ("a {red|blue|} cat", {"a red cat", "a blue cat", "a  cat"}), ("{a|b}{c|d}", {"ac", "ad", "bc", "bd"}), ("{x}", {"x"}),
    ("{{a|b}}", {"{a|b}"}), ("{{{a|b}}}", {"{a}", "{b}"}), ("{a {{x}}|b}", {"a {x}", "b"}), ("a { b", {"a { b"}),
    ("a } b", {"a } b"}), ("{}", {"{}"}), ("a|b", {"a|b"})])
def test_all_ways_of_a_wildcard_are_shown_and_no_other(text, ways):
    assert {captions.variant(text, number, Rules(wildcard=True)) for number in range(80)} == ways
    assert captions.variant(text, 3, PLAIN) == text
    assert captions.possible([text], Rules(wildcard=True), 80) == ways


def test_ways_are_equally_likely():
    counts = Counter(captions.variant("{a|b|c}", number, Rules(wildcard=True)) for number in range(3000))
    assert len(counts) == 3 and all(abs(count - 1000) < 130 for count in counts.values())


def test_wildcards_in_prefix_and_suffix_are_chosen_also_where_the_caption_is_dropped():
    rules = Rules(wildcard=True, prefix="{a|b}", suffix="{c|d}", empty=0.5)
    shown = {pick(["x"], visit, rules=rules, variants=40) for visit in range(400)}
    assert shown == {f"{one} {middle}{two}" for one, middle, two in product("ab", ("", "x "), "cd")}


# prefix, suffix, dropout

def test_prefix_and_suffix_stand_around_every_caption_and_stay_when_it_is_dropped():
    rules = Rules(prefix="photo of", suffix="in snow")
    assert pick(["a cat"], 0, rules=rules) == "photo of a cat in snow"
    assert pick(["a cat"], 0, rules=replace(rules, empty=1.0)) == "photo of in snow" == pick([], 0, rules=rules)
    assert pick(["a cat"], 0, rules=replace(rules, empty_every=1, suffix="")) == "photo of"
    assert captions.possible(["a cat"], replace(rules, empty=0.1), 4) == {"photo of a cat in snow", "photo of in snow"}


@given(CAPTION, st.integers(0, 3), st.integers(0, 9))
def test_prefix_and_suffix_do_not_move_and_do_not_count_as_tags(caption, keep, number):
    rules = Rules(shuffle=True, keep=keep)
    inner = captions.variant(caption, number, rules)
    expected = " ".join(part for part in ("one, two", inner, "three, four") if part)
    assert captions.variant(caption, number, replace(rules, prefix="one, two", suffix="three, four")) == expected


def test_every_nth_epoch_has_no_captions_counted_from_the_first():
    dropped = [pick(["a"], 0, rules=Rules(empty_every=3), epoch=epoch) == "" for epoch in range(7)]
    assert dropped == [False, False, True, False, False, True, False]
    assert not any(pick(["a"], 0, epoch=epoch) == "" for epoch in range(7))


@pytest.mark.parametrize("rate", [0.3, 1.0])
def test_tags_that_may_move_are_dropped_as_often_as_asked(rate):
    rules = Rules(tag_dropout=rate, keep=2)
    tags = [f"t{number}" for number in range(12)]
    counts = Counter(tag for number in range(2000) for tag in tags_of(captions.variant(", ".join(tags), number, rules)))
    assert counts["t0"] == counts["t1"] == 2000
    assert all(abs(counts[tag] - 2000 * (1 - rate)) < 105 for tag in tags[2:])
    shown = [tags_of(captions.variant(", ".join(tags), number, rules)) for number in range(50)]
    assert all(sorted(each, key=tags.index) == each for each in shown)    # the order stays


def test_a_caption_may_lose_all_its_tags_and_then_nothing_is_shown():
    assert captions.variant("a cat", 0, Rules(tag_dropout=1.0)) == ""
    assert captions.variant("a, b", 0, Rules(tag_dropout=1.0, prefix="photo")) == "photo"


@given(st.integers(1, 9), st.integers(0, 5), st.integers(0, 3), st.floats(0, 1), st.integers(0, 5))
def test_the_warm_up_shows_the_first_tags_first_and_shuffles_them(count, least, keep, shown, number):
    tags = [f"t{each}" for each in range(count)]
    rules = Rules(shuffle=True, keep=keep, warmup_min=least, warmup_steps=10)
    n = max(0, count - keep)
    expected = min(n, floor(shown * (n - least)) + least)    # min: fewer tags than `least` are all shown
    got = [tag for tag in tags_of(captions.variant(", ".join(tags), number, rules, shown)) if tag]
    if count > 1:    # one tag is no list
        assert got[:keep] == tags[:keep] and sorted(got) == sorted(tags[:keep] + tags[keep:][:expected])
    assert captions.endless(rules) and not captions.endless(replace(rules, warmup_steps=0))


# the whole pipeline, stated anew by enumeration

def every_prompt(caption: str, rules: Rules, shown: float) -> set[str]:
    """All prompts that the rules allow for a caption, whatever is drawn. Braces hold one letter a way and no separator."""
    def readings(text: str) -> set[str]:
        found = re.search(r"\{(\w)\|(\w)\}", text) if rules.wildcard else None
        return {text} if not found else set().union(*(readings(text.replace(found[0], way, 1)) for way in found.groups()))

    def arranged(text: str) -> set[str]:
        parts = text.split(rules.keep_separator, 2) if rules.keep_separator else [text]
        lists = [[tag.strip() for tag in part.split(rules.separator)] for part in parts]
        if len(parts) == 1:
            if not (rules.tag_dropout or ((rules.shuffle or rules.warmup_steps) and rules.separator in text)):
                return {text}
            tags = lists[0] if rules.orders is None else [tag for tag in lists[0] if tag]
            first, moving, last = tags[:rules.keep], tags[rules.keep:], []
        else:
            first, moving, last = ([tag for tag in part if tag] for part in [*lists, []][:3])
        if rules.warmup_steps:
            moving = moving[:floor(shown * (len(moving) - rules.warmup_min)) + rules.warmup_min]
        sizes = {0.0: [len(moving)], 0.5: range(len(moving) + 1), 1.0: [0]}[rules.tag_dropout]
        some = [kept for size in sizes for kept in combinations(moving, size)]
        if rules.shuffle:
            some = [order for kept in some for order in permutations(kept)]
        joint = rules.separator.rstrip(" ") + " "
        as_written = rules.original and not (rules.tag_dropout or rules.warmup_steps or len(parts) > 1)
        return {joint.join([*first, *kept, *last]) for kept in some} | ({text} if as_written else set())

    prompts = {" ".join(part for part in (before, middle, after) if part) for before in readings(rules.prefix)
               for text in readings(caption) for middle in arranged(text) for after in readings(rules.suffix)}
    return {prompt.replace(rules.secondary, rules.separator) if rules.secondary else prompt for prompt in prompts}


PARTS = st.sampled_from(["a", "b", " c", "d+e", "{f|g}", "|||", ""])


@given(st.lists(PARTS, min_size=1, max_size=4), SMALL_RULES, st.sampled_from([0.0, 0.4, 1.0]), st.sampled_from([0.0, 0.5]))
def test_every_variant_is_one_that_the_rules_allow(parts, rules, shown, dropped):
    rules = replace(rules, tag_dropout=min(rules.tag_dropout, dropped))
    caption = rules.separator.join(parts)
    if rules.orders is not None and caption.rstrip().endswith(rules.separator.strip() or "\0"):
        caption += "z"    # a last separator has its own test
    allowed = every_prompt(caption, rules, shown)
    for number in range(6):
        assert captions.variant(caption, number, rules, shown) in allowed


@pytest.mark.parametrize("rules", [
    Rules(shuffle=True), Rules(shuffle=True, keep=1, wildcard=True), Rules(tag_dropout=0.5), Rules(tag_dropout=0.5, shuffle=True),
    Rules(shuffle=True, warmup_steps=9), Rules(shuffle=True, keep_separator="b"), Rules(shuffle=True, separator=";"),
    Rules(shuffle=True, orders=9999, original=True), Rules(prefix="{x|y}", wildcard=True, secondary="b", shuffle=True)])
def test_every_prompt_that_the_rules_allow_comes_up(rules):
    caption = rules.separator.join(["a", "{f|g}", " b", "c"])
    shown = {captions.variant(caption, number, rules, 0.6) for number in range(2000)}
    assert shown == every_prompt(caption, rules, 0.6)


# what is cached is what is shown

@given(st.lists(CAPTION, max_size=2), st.integers(1, 3), SMALL_RULES, st.integers(0, 2**31))
def test_what_is_listed_is_what_is_picked(texts, variants, rules, seed):
    picked = {pick(texts, visit, visit // 60, variants, seed, rules, epoch=visit // 6) for visit in range(300)}
    assert picked == captions.possible(texts, rules, variants)


@given(st.lists(st.lists(CAPTION, min_size=1, max_size=3), min_size=1, max_size=4), st.integers(1, 3), st.booleans())
def test_all_prompts_of_a_table(texts, most, shuffle):
    flat, start = flatten(texts)
    records = np.ones(len(texts), [("content", "S32"), ("width", "i4"), ("height", "i4")])
    rules = Rules(shuffle=shuffle, keep=1)
    spec = Spec("set", Origin("folder", "images"), Fixed((64, 64)), rules)
    table, _ = build(spec, records, np.array([str(row) for row in range(len(texts))], Text), flat, start)
    assert [table.texts(row) for row in range(len(texts))] == texts
    expected = set.union(*(captions.possible(several, rules, most) for several in texts))
    assert set(prepare.all_prompts(table, [most])) == expected | {""}


@given(CAPTION, SMALL_RULES, st.integers(0, 9))
def test_a_caption_that_does_not_vary_has_one_variant(caption, rules, number):
    if not captions.varies(rules):
        assert captions.variant(caption, number, rules) == captions.variant(caption, 0, rules)
        assert captions.count(rules, 4) == captions.count(rules, None) == 1


def test_visits_take_the_orders_in_turn():
    caption = "a, b, c, d, e, f"
    shown = [pick([caption], visit, variants=3, rules=SHUFFLE) for visit in range(9)]
    assert shown[:3] == shown[3:6] == shown[6:] and len(set(shown)) == 3


def test_without_a_cache_each_visit_has_an_order_of_its_own():
    shown = {pick(["a, b, c, d, e, f, g, h"], visit, variants=None, rules=SHUFFLE) for visit in range(50)}
    assert len(shown) == 50


# which caption, and when none

def test_every_caption_of_a_list_is_shown_equally_often():
    counts = Counter(pick(["a", "b", "c"], visit, row) for row in range(60) for visit in range(50))
    assert set(counts) == {"a", "b", "c"} and all(abs(count - 1000) < 130 for count in counts.values())


def test_the_empty_prompt_comes_as_often_as_asked_and_anew_at_each_visit():
    dropped = np.array([[pick(["a"], visit, row, rules=Rules(empty=0.3)) == "" for visit in range(50)] for row in range(60)])
    assert abs(dropped.mean() - 0.3) < 5 * (0.3 * 0.7 / 3000) ** 0.5
    assert 0 < dropped.sum(axis=0).min() and dropped.sum(axis=0).max() < 60    # not one draw for all images
    assert 0 < dropped.sum(axis=1).min() and dropped.sum(axis=1).max() < 50    # and not one for all visits


def test_never_and_always_empty():
    assert {pick(["a"], visit) for visit in range(500)} == {"a"}
    assert {pick(["a"], visit, rules=Rules(empty=1.0)) for visit in range(500)} == {""}


def test_an_image_without_captions_has_the_empty_prompt():
    assert pick([], 0) == ""


def test_dropping_does_not_change_which_caption_is_shown():
    texts = ["a", "b", "c"]
    always = [pick(texts, visit) for visit in range(200)]
    sometimes = [pick(texts, visit, rules=Rules(empty=0.5)) for visit in range(200)]
    assert all(shown in ("", caption) for shown, caption in zip(sometimes, always, strict=True))
    assert len({caption for caption, shown in zip(always, sometimes, strict=True) if shown == ""}) == 3


@given(st.integers(0, 2**31), st.integers(0, 9), st.integers(0, 9), SMALL_RULES)
def test_a_pick_is_a_function_of_seed_image_and_visit(seed, row, visit, rules):
    texts = ["a, b, c", "d, {e|f}, f", "g"]
    one = pick(texts, visit, row, 4, seed, rules)
    pick(texts, visit + 1, row, 4, seed, rules)
    assert pick(texts, visit, row, 4, seed, rules) == one


def test_seeds_rows_and_visits_draw_for_themselves():
    def drawn(seed, row, first=0):
        return [pick(list("abcdef"), visit, row, seed=seed) for visit in range(first, first + 30)]
    assert len({tuple(drawn(*key)) for key in [(0, 0), (1, 0), (0, 1), (0, 0, 30)]}) == 4


# rules that make no sense

@pytest.mark.parametrize("rules, word", [
    (Rules(separator=""), "caption_separator"), (Rules(secondary="a,b"), "secondary_separator"),
    (Rules(empty=1.5), "caption_dropout_rate"), (Rules(tag_dropout=-0.1), "caption_tag_dropout_rate"),
    (Rules(empty=float("nan")), "caption_dropout_rate"), (Rules(empty_every=-1), "caption_dropout_every_n_epochs"),
    (Rules(keep=-1), "keep_tokens"), (Rules(warmup_min=-2), "token_warmup_min"),
    (Rules(warmup_steps=-1), "token_warmup_step"), (Rules(orders=0), "count of tag orders")])
def test_rules_that_make_no_sense_are_named(rules, word):
    assert len(captions.faults(rules)) == 1 and word in captions.faults(rules)[0]


@given(SMALL_RULES)
def test_rules_that_make_sense_have_no_faults(rules):
    assert captions.faults(rules) == []

"""Slight changes of colour: how often, how much, and in which direction."""

import colorsys

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from library.data import colour


def test_a_third_of_the_cuts_change_and_half_of_those_in_hue():
    drawn = [colour.draw(content, number) for content in range(1000) for number in range(3)]
    kinds = [each[0] for each in drawn if each]
    assert abs(len(kinds) / len(drawn) - 0.33) < 0.03 and abs(kinds.count("hue") / len(kinds) - 0.5) < 0.06
    hues, bends = ([amount for kind, amount in filter(None, drawn) if kind == name] for name in ("hue", "gamma"))
    assert -16 <= min(hues) < -14 and 14 < max(hues) <= 16
    assert 0.95 <= min(bends) < 0.955 and 1.045 < max(bends) <= 1.05
    assert drawn == [colour.draw(content, number) for content in range(1000) for number in range(3)]


@given(st.tuples(*[st.integers(0, 255)] * 3), st.floats(-16, 16))
def test_hues_turn_and_light_stays(rgb, degrees):
    pixels = np.full((2, 3, 3), rgb, np.uint8)
    changed = colour.change(pixels, "hue", degrees)
    assert changed.shape == pixels.shape and changed.dtype == np.uint8
    hue, saturation, value = colorsys.rgb_to_hsv(*(np.array(rgb) / 255))
    wanted = np.array(colorsys.hsv_to_rgb((hue + degrees / 360) % 1, saturation, value)) * 255
    assert np.abs(changed[0, 0] - wanted).max() <= 8    # Pillow's hues have 256 steps
    assert abs(int(changed.max()) - max(rgb)) <= 1


@given(st.integers(0, 255), st.floats(0.95, 1.05))
def test_gamma_bends_what_lies_between_black_and_white(value, exponent):
    changed = colour.change(np.full((1, 1, 3), value, np.uint8), "gamma", exponent)[0, 0]
    assert np.abs(changed - 255 * (value / 255) ** exponent).max() <= 0.5 + 1e-9

"""Each caption flag changes the prompts that a run shows, and the ones it encodes before the first step."""

import json

import numpy as np
import pytest
import tiny
from pieces import make, note_calls

from library.models.encoders import Encoders

CAPTIONS = ("red, cat, on a mat ||| day, sunny", "blue, dog, in the wood ||| night, moon")


@pytest.fixture
def prompts(parse, tmp_path, monkeypatch):
    """`prompts(*flags)` -> the prompts of 40 visits of each image. What is shown was encoded before the run."""
    folder = tiny.make_images(tmp_path / "own", [(64, 64)] * 2)
    for number, caption in enumerate(CAPTIONS):
        (folder / f"image{number:03d}.txt").write_text(f"{caption}\nsecond line {number}" if number else caption)
    encoded = note_calls(monkeypatch, Encoders, "encode_prompts")

    def prompts(*flags, steps: int = 200, visits=range(40)):
        encoded.clear()
        made = make(parse("--train_data_dir", folder, "--max_train_steps", steps, *flags), tmp_path / str(flags))
        shown = [[made.loader.prompt(row, visit, visit) for visit in visits] for row in range(2)]
        before = {text for given, _ in encoded for text in given[1]}
        assert made.prompts.store is None or set(sum(shown, [])) <= before
        return shown

    return prompts


def test_prefix_and_suffix_stand_around_dropped_captions_too(prompts):
    for shown, caption in zip(prompts("--caption_prefix", "sks", "--caption_suffix", "4k", "--proportion_empty_prompts", 0.5),
                              CAPTIONS, strict=True):
        assert set(shown) == {"sks 4k", f"sks {caption} 4k"} or caption is CAPTIONS[1]
        assert 8 < shown.count("sks 4k") < 32
        assert all(text.startswith("sks ") and text.endswith(" 4k") for text in shown)


def test_caption_separator_parts_and_joins_the_tags(prompts):
    first, _ = prompts("--shuffle_caption", "--caption_separator", " ")
    assert len(set(first)) == 4 and all(sorted(text.split()) == sorted(CAPTIONS[0].split()) for text in first)
    assert any(not text.startswith("red,") for text in first)


def test_secondary_separator_binds_tags(prompts):
    first, _ = prompts("--shuffle_caption", "--secondary_separator", " ||| ")
    assert len(set(first)) == 4 and all("on a mat,day" in text and "|||" not in text for text in first)


def test_keep_tokens_separator(prompts):
    first, _ = prompts("--shuffle_caption", "--keep_tokens_separator", "|||", "--cache_variants", 8)
    assert {text.rsplit(", ", 2)[0] for text in first} == {"red, cat, on a mat"} and len(set(first)) == 2


def test_enable_wildcard_chooses_in_braces_and_among_lines(prompts, tmp_path):
    _, plain = prompts()
    assert set(plain) == {f"{CAPTIONS[1]}\nsecond line 1"}    # without it, a caption file is one caption
    (tmp_path / "own" / "image000.txt").write_text("a {red|green} {{cat}}")
    first, second = prompts("--enable_wildcard", "--cache_variants", 6)
    assert set(first) == {"a red {cat}", "a green {cat}"} and set(second) == {CAPTIONS[1], "second line 1"}


def test_caption_dropout_every_n_epochs(prompts):
    for shown in prompts("--caption_dropout_every_n_epochs", 3):
        assert [visit for visit, text in enumerate(shown) if not text] == list(range(2, 40, 3))


def test_caption_tag_dropout_rate(prompts):
    first, _ = prompts("--caption_tag_dropout_rate", 0.5, "--cache_variants", 40, "--keep_tokens", 1, "--shuffle_caption")
    counts = [len(text.split(", ")) for text in first]
    assert all(text.split(", ")[0] == "red" for text in first) and min(counts) < 3 < max(counts) and 2 < np.mean(counts) < 3.5


def test_token_warmup(prompts):
    tags = [len(text.split(", ")) for text in prompts("--token_warmup_step", 30, "--token_warmup_min", 2)[0]]
    assert tags == sorted(tags) and tags[0] == 2 and tags[29] == 3 and set(tags[30:]) == {4}
    share = [len(text.split(", ")) for text in prompts("--token_warmup_step", 0.15, "--token_warmup_min", 1)[0]]
    assert share[0] == 1 and share[29] == 3 and set(share[30:]) == {4}    # 0.15 of 200 steps


@pytest.mark.parametrize("kind", ["json", "jsonl"])
def test_in_json(parse, tmp_path, tiny_images, kind):
    names = sorted(path.stem for path in tiny_images.glob("*.png"))
    entries = {name: {"caption": f"caption of {name}", "tags": "tag, other"} for name in names}
    table = tmp_path / f"meta.{kind}"
    table.write_text(json.dumps(entries) if kind == "json" else "".join(
        json.dumps({"image_path": f"{name}.png", **entry}) + "\n" for name, entry in entries.items()))
    made = make(parse("--in_json", table), tmp_path)
    assert [made.loader.prompt(row, 0) for row in range(6)] == [f"caption of {name}, tag, other" for name in names]

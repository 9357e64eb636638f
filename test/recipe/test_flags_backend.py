"""Each flag that is the default of the sets in a multidatabackend.json, the evaluation sets, and what is new in cuts."""

import json
import shutil

import datasets
import numpy as np
import pytest
import tiny
from pieces import make, note_calls
from test_data_sets import losses

from library.data import dataset, prepare
from library.data.cache import Store
from library.models.encoders import Encoders

SIZES = [(128, 128), (128, 64), (320, 320), (192, 200)]


@pytest.fixture
def table(parse, tmp_path):
    """`table(keys, *flags)` -> the table of one set with these keys."""
    folder = tiny.make_images(tmp_path / "own", SIZES)

    def table(keys: dict, *flags):
        config = tmp_path / "multidatabackend.json"
        config.write_text(json.dumps([{"id": "own", "type": "local", "instance_data_dir": str(folder), **keys}]))
        args = parse("--data_backend_config", config, *flags, without=["train_data_dir"])
        return dataset.load(args, 1, tmp_path / "scan", decode=False).table

    return table


def test_caption_strategy(table):
    assert table({}, "--caption_strategy", "filename").texts(0) == ["image000"]
    assert table({}, "--caption_strategy", "textfile").texts(0)[0].startswith("a photo of a red cat")
    assert table({"caption_strategy": "filename"}, "--caption_strategy", "textfile").texts(0) == ["image000"]


def test_resolution_type_and_alignment(table):
    def shapes(*flags, **keys):
        made = table({"caption_strategy": "filename", **keys}, *flags)
        return [made.buckets[bucket] for bucket in made.bucket_of]

    wide = ("--resolution", 128)
    assert shapes(*wide)[:2] == [(128, 128), (192, 64)]    # of the area of 128 x 128: 181 x 90.5
    assert shapes(*wide, "--aspect_bucket_alignment", 8)[1] == (184, 88)
    assert shapes(*wide, "--resolution_type", "pixel")[1] == (256, 128)    # the shorter edge is 128
    assert shapes("--resolution_type", "area", resolution=0.065536)[0] == (256, 256)
    rounded = [shapes("--aspect_bucket_alignment", 8, "--aspect_bucket_rounding", n, resolution=1024)[3] for n in (1, 5)]
    assert rounded == [(1024, 1024), (1000, 1048)]    # 192 / 200 is 1.0, or 0.96


def test_minimum_maximum_and_downsampled_sizes(table):
    keys = {"caption_strategy": "filename", "crop": True, "resolution": 64, "resolution_type": "pixel", "crop_style": "center"}
    assert [name for name in table(keys, "--minimum_image_size", 100).name] == ["image000.png", "image002.png", "image003.png"]
    assert table(keys).resized.tolist() == [list(size) for size in SIZES]    # not resized before the cut
    small = table(keys, "--maximum_image_size", 150, "--target_downsample_size", 96).resized.tolist()
    assert small == [[128, 128], [128, 64], [96, 96], [96, 100]]


def test_evaluation_sets(train, tmp_path, tiny_images):
    held_out = tiny.make_images(tmp_path / "held out", [(64, 64)] * 5)
    config, common = tmp_path / "sets.json", {"type": "local", "caption_strategy": "textfile", "crop": True, "resolution": 64,
                                              "resolution_type": "pixel"}
    config.write_text(json.dumps([{"id": "images", "instance_data_dir": str(tiny_images), **common},
                                  {"id": "unseen", "dataset_type": "eval", "instance_data_dir": str(held_out), **common}]))

    def lines(*more, name="out"):
        out = train("--data_backend_config", config, "--max_train_steps", 4, "--output_dir", tmp_path / name, *more,
                    without=["train_data_dir"])
        assert len(losses(out)) == 4
        return [json.loads(line) for line in (out / "evaluation.jsonl").read_text().splitlines()]

    often = lines("--eval_steps_interval", 2, "--eval_timesteps", 5)
    assert [line["step"] for line in often] == [2, 4] and all(line["unseen"] > 0 for line in often)
    frozen = lines("--eval_steps_interval", 1, "--eval_timesteps", 5, "--learning_rate", 0, name="frozen")
    assert len({line["unseen"] for line in frozen}) == 1 and len(frozen) == 4    # the same noise, the same timesteps
    other = [lines("--learning_rate", 0, *flags, name=str(flags))[-1]["unseen"] for flags in (
        ("--eval_timesteps", 5, "--num_eval_images", 1), ("--eval_timesteps", 6),
        ("--eval_timesteps", 5, "--num_eval_images", 5))]
    assert len({frozen[0]["unseen"], *other}) == 4
    assert "images" not in often[0]


def test_validation_split_of_a_toml(train, parse, tmp_path):
    images = tiny.make_images(tmp_path / "all", [(64, 64)] * 8)
    config = tmp_path / "sets.toml"
    names = {}
    for seed in (1, 2):
        config.write_text(f"""
[[datasets]]
resolution = 64
validation_split = 0.25
validation_seed = {seed}
  [[datasets.subsets]]
  image_dir = '{images}'
  caption_extension = ".txt"
""")
        data = dataset.load(parse("--dataset_config", config, without=["train_data_dir"]), 1, tmp_path / "scan", decode=False)
        trained, aside = set(data.table.name.tolist()), set(data.held_out.table.name.tolist())
        assert len(trained) == 6 and len(aside) == 2 and not trained & aside
        names[seed] = aside
    assert names[1] != names[2]
    for mode in ((), ("--vae_cache_ondemand",), ("--vae_cache_disable",)):
        out = train("--dataset_config", config, "--eval_timesteps", 3, "--output_dir", tmp_path / f"out{len(mode)}{mode}", *mode,
                    "--embedding_cache_dir", tmp_path / f"cache{mode}", without=["train_data_dir"])
        (line,) = [json.loads(line) for line in (out / "evaluation.jsonl").read_text().splitlines()]
        assert line["step"] == 2 and line[f"{images} (validation)"] > 0


def test_dataset_repeats(parse, tmp_path):
    once, thrice = (make(parse("--dataset_repeats", n, "--num_train_epochs", 2, "--max_train_steps", 1), tmp_path).order
                    for n in (1, 3))
    assert once.steps_before(2) * 3 == thrice.steps_before(2) == 18


def test_color_aug(parse, tmp_path):
    made = make(parse("--color_aug", "--center_crop", "--cache_variants", 12, "--max_train_steps", 60), tmp_path)
    plain = make(parse("--center_crop"), tmp_path)
    changed = 0
    for row in range(6):
        still = prepare.load_pixels(plain.data, row, 0, "lanczos").astype(int)
        assert made.table.variants(row, 12) == 12
        for number in range(12):
            seen = prepare.load_pixels(made.data, row, number, "lanczos").astype(int)
            changed += bool((seen != still).any())
            assert np.abs(seen - still).max() < 90    # slightly
    assert 8 < changed < 45    # a third of 72
    assert made.loader.compose(0, 0)["latents"].shape == (2, 4, 8, 8)


def test_streaming(train, tmp_path, monkeypatch):
    folder = tmp_path / "parquet"
    folder.mkdir()
    for part in range(2):
        made = datasets.Dataset.from_dict({"image": [tiny.picture(64, 64, 3 * part + row) for row in range(3)],
                                           "text": [f"row {3 * part + row}" for row in range(3)]})
        made.cast_column("image", datasets.Image()).to_parquet(folder / f"{part}.parquet")
    seen, streamed = [], note_calls(monkeypatch, datasets.DatasetBuilder, "as_streaming_dataset")
    for more in ((), ("--streaming",)):
        out = train("--dataset_name", folder, "--output_dir", tmp_path / f"out{len(seen)}", "--cache_dir", tmp_path / "hub",
                    "--embedding_cache_dir", tmp_path / f"cache{len(seen)}", *more, without=["train_data_dir"])
        seen.append((losses(out), len(streamed), any((tmp_path / "hub").rglob("*.arrow"))))
        shutil.rmtree(tmp_path / "hub", ignore_errors=True)
    assert seen[0][0] == seen[1][0] and seen[0][1:] == (0, True) and seen[1][1:] == (1, False)


@pytest.mark.parametrize("key", ["text_cache_ondemand", "text_cache_disable"])
def test_captions_encoded_as_training_meets_them(train, tmp_path, tiny_images, monkeypatch, key):
    encoded, seen = note_calls(monkeypatch, Encoders, "encode_prompts"), []
    for number, words in enumerate(({}, {key: True})):
        place = tmp_path / str(number)
        config = tmp_path / f"{number}.json"
        config.write_text(json.dumps([
            {"id": "images", "type": "local", "caption_strategy": "textfile", "crop": True, "resolution": 64,
             "resolution_type": "pixel", "instance_data_dir": str(tiny_images)},
            {"id": "words", "dataset_type": "text_embeds", "cache_dir": str(place / "words"), "text_encoder_batch_size": 1,
             **words}]))
        encoded.clear()
        out = train("--data_backend_config", config, "--output_dir", place, "--max_train_steps", 5, without=["train_data_dir"])
        kept = sum(len(Store(place / "words")._keys) for _ in range(1) if (place / "words").exists())
        seen.append((losses(out), [len(given[1]) for given, _ in encoded], kept))
    np.testing.assert_allclose(seen[0][0], seen[1][0], rtol=1e-5)
    assert seen[0][1:] == ([1] * 7, 7)    # six captions and the empty one, before the run
    assert seen[1][1:] == (([1] * 6, 6) if key == "text_cache_ondemand" else ([], 0))    # the ones that are shown; never

"""Whole runs on data sets of every kind: several at once, tars, masks, regularisation images, cache modes."""

import json
import os
import random
import signal
import tarfile
import time

import numpy as np
import pytest
import tiny
import torch
from forks import Run, flags, run, together
from pieces import make, note_calls
from PIL import Image
from test_kill import assert_same

from library.data import cache, prepare
from library.models.encoders import Encoders


def losses(out) -> list[float]:
    return [json.loads(line)["loss"] for line in (out / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def shards(tiny_images, tmp_path_factory):
    """The images of `tiny_images` as LAION-style tars, two images a tar, with what lies beside them."""
    folder = tmp_path_factory.mktemp("shards")
    images = sorted(tiny_images.glob("*.png"))
    for start in range(0, len(images), 2):
        with tarfile.open(folder / f"{start // 2:05d}.tar", "w") as tar:
            for path in images[start:start + 2]:
                tar.add(path, path.name)
                tar.add(path.with_suffix(".txt"), path.with_suffix(".txt").name)
                described = folder / f"{path.stem}.json"
                described.write_text(json.dumps({"caption": path.with_suffix(".txt").read_text(), "key": path.stem}))
                tar.add(described, described.name)
                described.unlink()
        (folder / f"{start // 2:05d}.parquet").write_bytes(b"of img2dataset, not read")
        (folder / f"{start // 2:05d}_stats.json").write_text('{"count": 2}')
    return folder


RICH = ("--enable_bucket", "--min_bucket_reso", 32, "--max_bucket_reso", 128, "--bucket_reso_steps", 32, "--random_flip",
        "--random_crop", "--shuffle_caption", "--max_train_steps", 6, "--proportion_empty_prompts", 0.1)


@pytest.mark.parametrize("cached", [True, False], ids=["cached", "encoded at every visit"])
def test_tars_train_as_the_folder_they_were_made_of(train, tmp_path, tiny_images, shards, cached):
    seen = [losses(train("--train_data_dir", place, "--output_dir", tmp_path / name, *RICH, f"--cache_latents={cached}"))
            for name, place in (("folder", tiny_images), ("tars", shards))]
    assert seen[0] == seen[1] and len(seen[0]) == 6


def test_killed_in_the_middle_of_a_tar_and_continued(tiny_model, shards, tmp_path):
    """Images are read while training: the kill falls between two of them."""
    more = (*RICH, "--max_train_steps", 9, "--checkpointing_steps", 2, "--use_ema", "--vae_cache_disable",
            "--resume_from_checkpoint", "latest")
    whole = tmp_path / "whole"
    run(flags(tiny_model, shards, whole, *more), tmp_path / "log.whole")
    kills, ours, draw = 0, tmp_path / "ours", random.Random(1)
    for attempt in range(8):
        going = Run(flags(tiny_model, shards, ours, *more), tmp_path / f"log{attempt}")
        done = len((ours / "metrics.jsonl").read_text().splitlines()) if (ours / "metrics.jsonl").exists() else 0
        while going.poll() is None:
            time.sleep(0.01)
            path = ours / "metrics.jsonl"
            if path.exists() and len(path.read_text().splitlines()) > done + draw.randint(0, 2):
                going.send_signal(signal.SIGKILL)
                kills += 1
                break
        if going.wait() == 0:
            break
    run(flags(tiny_model, shards, ours, *more), tmp_path / "log.last")
    assert kills >= 2
    assert_same(ours, whole, 9)


def test_two_sets_of_their_own_size_and_batch(train, parse, tmp_path, tiny_images):
    other = tiny.make_images(tmp_path / "other", [(64, 64), (96, 96), (64, 128), (64, 64)])
    config = tmp_path / "sets.toml"
    config.write_text(f"""
[general]
caption_extension = ".txt"
[[datasets]]
resolution = 64
batch_size = 3
  [[datasets.subsets]]
  image_dir = '{tiny_images}'
[[datasets]]
resolution = [32, 64]
batch_size = 1
  [[datasets.subsets]]
  image_dir = '{other}'
  num_repeats = 2
""")
    more = ("--dataset_config", config, "--embedding_cache_dir", tmp_path / "cache", "--max_train_steps", 10)
    made = make(parse(*more, without=["train_data_dir"]), tmp_path)
    assert made.order.steps_before(1) == 6 // 3 + 2 * 4 // 1
    shapes = [tuple(made.loader.compose(step, 0)["latents"].shape) for step in range(10)]
    assert sorted(set(shapes)) == [(1, 4, 8, 4), (3, 4, 8, 8)] and shapes.count((3, 4, 8, 8)) == 2
    assert len(losses(train(*more, without=["train_data_dir"]))) == 10


def test_repeats_and_probability_of_a_set(parse, tmp_path, tiny_images):
    other = tiny.make_images(tmp_path / "other", [(64, 64)] * 6)
    sets = [{"id": "often", "instance_data_dir": str(tiny_images), "repeats": 3, "cache_dir_vae": str(tmp_path / "a")},
            {"id": "seldom", "instance_data_dir": str(other), "probability": 0.5, "cache_dir_vae": str(tmp_path / "b")}]
    config = tmp_path / "multidatabackend.json"
    config.write_text(json.dumps([each | {"type": "local", "caption_strategy": "textfile", "crop": True, "resolution": 64,
                                          "resolution_type": "pixel"} for each in sets]))
    made = make(parse("--data_backend_config", config, "--max_train_steps", 27, without=["train_data_dir"]), tmp_path)
    seen = np.concatenate([made.table.set_of[made.order.batch(step)[1]] for step in range(27)])
    assert np.bincount(seen).tolist() == [48, 6]    # in two epochs: 6 x (1 + 3) x 2, and 6 x 0.5 x 2
    assert list((tmp_path / "a").glob("*.safetensors")) and list((tmp_path / "b").glob("*.safetensors"))


# masks

@pytest.fixture
def masks(tmp_path, tiny_images):
    """A folder of masks of one grey a call: `masks(255)` is white everywhere."""
    def masks(grey: int):
        folder = tmp_path / f"masks{grey}"
        folder.mkdir()
        for path in tiny_images.glob("*.png"):
            with Image.open(path) as image:
                Image.new("L", image.size, grey).save(folder / path.name)
        return folder
    return masks


def test_conditioning_data_dir_masks_the_loss(train, tmp_path, masks):
    def loss(*more):
        return losses(train("--output_dir", tmp_path / str(len(list(tmp_path.iterdir()))), "--max_train_steps", 3,
                            "--center_crop", "--learning_rate", 0, *more))

    plain, white, black, half = loss(), *(loss("--conditioning_data_dir", masks(grey)) for grey in (255, 0, 51))
    assert white == plain and black == [0, 0, 0]
    np.testing.assert_allclose(half, np.array(plain) * 0.2, rtol=1e-5)
    inside = loss("--conditioning_data_dir", tmp_path / "masks51", "--masked_loss_area", "mask")
    np.testing.assert_allclose(inside, plain, rtol=1e-5)
    uncached = loss("--conditioning_data_dir", tmp_path / "masks51", "--cache_latents=false")
    np.testing.assert_allclose(uncached, half, rtol=1e-4)


@pytest.mark.parametrize("cached", [True, False])
def test_alpha_mask_follows_the_cut(parse, tmp_path, cached):
    """Black under an alpha of a is 255 - a on white: the mask must say of each latent what its pixels show."""
    folder = tmp_path / "images"
    folder.mkdir()
    for number, (width, height) in enumerate(((160, 64), (64, 160), (96, 64))):
        alpha = np.random.default_rng(number).integers(0, 256, (height // 16, width // 16), dtype=np.uint8)
        alpha = alpha.repeat(16, 0).repeat(16, 1)
        Image.fromarray(np.dstack([np.zeros_like(alpha)] * 3 + [alpha])).save(folder / f"{number}.png")
    made = make(parse("--train_data_dir", folder, "--alpha_mask", "--random_flip", "--train_batch_size", 1,
                      "--max_train_steps", 24, f"--cache_latents={cached}"), tmp_path)
    differ = 0
    for step in range(24):
        row, visit, _ = (int(np.ravel(each)[0]) for each in made.loader.samples(step, 0))
        mask = made.loader.compose(step, 0)["loss_mask"]
        assert mask.shape == (1, 1, 8, 8) and mask.dtype == torch.float32
        number = made.loader._number(row, visit)
        pixels = prepare.load_pixels(made.data, row, number, "lanczos")[..., 0].reshape(8, 8, 8, 8).mean(axis=(1, 3))
        assert np.abs(pixels - (255 - mask[0, 0].numpy() * 255)).max() <= 1
        differ += int(pixels.std() > 10)
    assert differ > 12


def test_masked_loss_insists_on_masks(tiny_model, tiny_images, tmp_path):
    text = run(flags(tiny_model, tiny_images, tmp_path / "out", "--masked_loss"), tmp_path / "log", 2)
    assert "--masked_loss" in text and "--conditioning_data_dir" in text and "Traceback" not in text


def test_masks_of_another_shape_or_missing_are_named(tiny_model, tiny_images, masks, tmp_path):
    folder = masks(255)
    Image.new("L", (500, 20)).save(folder / "image000.png")
    (folder / "image003.png").unlink()
    for more, status in (((), 2), (("--skip_bad_images",), 0)):
        asked = flags(tiny_model, tiny_images, tmp_path / "out", "--conditioning_data_dir", folder, "--max_train_steps", 1, *more)
        text = run(asked, tmp_path / "log", status)
        assert "Traceback" not in text and "image003.png" in text
        if more:
            assert "image000.png" in text and "500x20" in text


# regularisation

def test_regularisation_images_are_balanced_and_weighed(train, parse, tmp_path, tiny_images):
    for folder, name, count in (("train", "3_cat", 4), ("reg", "1_animal", 9)):
        tiny.make_images(tmp_path / folder / name, [(64, 64)] * count)
    more = ("--train_data_dir", tmp_path / "train", "--reg_data_dir", tmp_path / "reg", "--train_batch_size", 4)
    made = make(parse(*more, "--prior_loss_weight", 0.25, "--max_train_steps", 6), tmp_path / "a")
    weights = torch.cat([made.loader.compose(step, 0)["loss_weight"] for step in range(6)])
    assert weights.tolist().count(0.25) == 12 == weights.tolist().count(1.0)    # an epoch: 3 x 4 of each
    seen = {weight: losses(train(*more, "--prior_loss_weight", weight, "--max_train_steps", 2, "--learning_rate", 0,
                                 "--output_dir", tmp_path / f"out{weight}")) for weight in (0, 1, 2)}
    np.testing.assert_allclose(np.array(seen[2]) - seen[1], np.array(seen[1]) - seen[0], rtol=1e-4)
    assert min(seen[0]) > 0 and all(one > none for one, none in zip(seen[1], seen[0], strict=True))


# cache modes

def test_on_disk_on_demand_and_never_are_one_run(train, tmp_path, monkeypatch):
    seen, kept, encoded = [], [], note_calls(monkeypatch, Encoders, "encode_images")
    for mode in ((), ("--vae_cache_ondemand",), ("--vae_cache_disable",)):
        encoded.clear()
        place = tmp_path / str(len(seen))
        out = train(*mode, "--output_dir", place, "--embedding_cache_dir", place / "c", "--vae_batch_size", 1, "--center_crop",
                    "--max_train_steps", 8, "--random_flip")
        seen.append(losses(out))
        kept.append((len(encoded), sum(path.stat().st_size for path in (place / "c").glob("latents/*.safetensors"))))
    assert seen[0] == seen[1] == seen[2]
    assert kept[0][0] == kept[1][0] == 12 and kept[2][0] == 16    # six images, mirrored or not; eight steps of two
    assert kept[0][1] and kept[1][1] and not kept[2][1]


def test_a_killed_run_on_demand_goes_on_bit_by_bit(tiny_model, tiny_images, tmp_path):
    more = ("--vae_cache_ondemand", "--max_train_steps", 8, "--checkpointing_steps", 3, "--use_ema", "--random_flip",
            "--resume_from_checkpoint", "latest")
    whole, ours = tmp_path / "whole", tmp_path / "ours"
    run(flags(tiny_model, tiny_images, whole, *more), tmp_path / "log.whole")
    going = Run(flags(tiny_model, tiny_images, ours, *more), tmp_path / "log", shard_bytes=3000)
    while not list(ours.glob("checkpoint-*")) and going.poll() is None:
        time.sleep(0.005)
    going.send_signal(signal.SIGKILL)
    assert going.wait() == -signal.SIGKILL
    run(flags(tiny_model, tiny_images, ours, *more), tmp_path / "log.last")
    assert_same(ours, whole, 8)


def test_cache_only_stops_before_the_first_step(train, tmp_path, monkeypatch):
    more = ("--embedding_cache_dir", tmp_path / "cache")
    out = train("--cache_only", *more)
    assert not (out / "metrics.jsonl").exists() and not (out / "unet").exists()
    assert all(list((tmp_path / "cache" / kind).glob("*.safetensors")) for kind in ("latents", "prompts"))
    calls = [note_calls(monkeypatch, Encoders, name) for name in ("encode_images", "encode_prompts")]
    for path in (tmp_path / "cache").rglob("*"):    # shared read-only with other runs
        os.chmod(path, 0o555 if path.is_dir() else 0o444)
    assert len(losses(train(*more))) == 2 and calls == [[], []]
    assert cache.Store(tmp_path / "cache" / "latents").damaged == []


def test_two_processes_share_sets(tiny_model, tiny_images, tmp_path):
    """Sets of two sizes, rates and batch sizes, one masked: one process in batches twice as large sees the same."""
    def losses_of(name: str, batch: int, processes: int) -> np.ndarray:
        config = tmp_path / f"{name}.toml"
        config.write_text(f"""
[[datasets]]
resolution = 64
batch_size = {2 * batch}
  [[datasets.subsets]]
  image_dir = '{tiny_images}'
  alpha_mask = true
  num_repeats = 2
[[datasets]]
resolution = [64, 32]
batch_size = {batch}
  [[datasets.subsets]]
  image_dir = '{tiny_images}'
  flip_aug = true
""")
        more = ("--dataset_config", config, "--max_train_steps", 6, "--adam_epsilon", 1e-6, "--logging_steps", 1)
        asked = [flag for flag in flags(tiny_model, "", tmp_path / name, *more) if flag not in ("--train_data_dir", "")]
        going = together(asked, tmp_path / f"log.{name}", processes) if processes > 1 else [Run(asked, tmp_path / f"log.{name}")]
        assert [each.wait() for each in going] == [0] * processes, going[0].text()
        return np.array(losses(tmp_path / name))

    np.testing.assert_allclose(losses_of("two", 1, 2), losses_of("one", 2, 1), rtol=0, atol=1e-6)


def test_all_that_is_wrong_with_a_folder_is_named_at_once(tiny_model, tmp_path):
    folder = tiny.make_images(tmp_path / "images", [(64, 64)] * 5)
    (folder / "image001.png").write_bytes(b"no image")
    (folder / "image002.txt").unlink()
    (folder / "image003.txt").write_bytes(b"caf\xe9")
    text = run(flags(tiny_model, folder, tmp_path / "out"), tmp_path / "log", 2)
    assert all(name in text for name in ("image001.png: not an image", "image002.png", "image003")) and "Traceback" not in text
    assert "image000" not in text

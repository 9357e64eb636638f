"""What a run leaves behind: models that other programs load, pictures and a report that open, and a quiet terminal."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from forks import REPOSITORY, flags, run
from PIL import Image
from safetensors.torch import load_file

from library.models.single_file import save_single_file

STEPS = ("--max_train_steps", 4, "--checkpointing_steps", 2, "--use_ema")
SHOWN = ("--validation_prompt", "a cat", "red dog", "--validation_steps", 2, "--num_validation_images", 1,
         "--validation_num_inference_steps", 2, "--validation_resolution", 64, "64,96")
WEIGHTS = "diffusion_pytorch_model.safetensors"
OURS = re.compile(r"\d+ images in \d+ bucket|wrote /|(scan|encode images|encode captions|train): +\d+%\|.*\| \d+/\d+ \[.*\] *$")


def cold(*command) -> tuple[str, list[str]]:
    """A run as a user starts it -> what it printed, and those lines of it that are not ours."""
    ended = subprocess.run([sys.executable, "train_sdxl.py", *map(str, command)], cwd=REPOSITORY, capture_output=True, text=True,
                           env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert ended.returncode == 0, ended.stderr
    lines = re.split(r"[\r\n]+", ended.stdout + ended.stderr)
    return ended.stdout + ended.stderr, [line for line in lines if line and not OURS.match(line)]


@pytest.fixture(scope="module")
def folder(tiny_model, tiny_images, shared_cache, tmp_path_factory):
    """A whole run to a diffusers folder, with all that it can leave behind; and what it printed that is not ours."""
    output = tmp_path_factory.mktemp("folder") / "out"
    text, foreign = cold(*flags(tiny_model, tiny_images, output, *STEPS, *SHOWN, "--report_to", "tensorboard",
                                "--save_every_n_steps", 3, "--save_every_n_epochs", 1))
    return output, foreign


@pytest.fixture
def save(tiny_model, tiny_images, shared_cache, tmp_path):
    """`save(*flags)`: the same run, saved differently -> its output folder."""
    def save(*more, model=tiny_model):
        output = tmp_path / "saved"
        run(flags(model, tiny_images, output, *STEPS, "--embedding_cache_dir", shared_cache, *more), tmp_path / "log")
        return output
    return save


def draw(pipeline) -> np.ndarray:
    pipeline.set_progress_bar_config(disable=True)
    return pipeline("a red cat", width=64, height=64, num_inference_steps=2, generator=torch.Generator().manual_seed(0),
                    output_type="np").images


def single_file(model: Path, path: Path) -> Path:
    """The pipeline in a folder as one file."""
    pipeline = StableDiffusionXLPipeline.from_pretrained(model)
    states = {part: getattr(pipeline, part).state_dict() for part in ("unet", "vae", "text_encoder", "text_encoder_2")}
    save_single_file(path, states, pipeline.unet.config)
    return path


def losses(output: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (output / "metrics.jsonl").read_text().splitlines()]


def equal(one: dict, other: dict) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def test_the_terminal_is_quiet(folder):
    assert folder[1] == []


def test_the_terminal_is_quiet_otherwise(tiny_model, tiny_images, tmp_path):
    """From one file to one file; nothing cached, text encoders trained, bf16, threads, 8-bit AdamW."""
    base = single_file(tiny_model, tmp_path / "base.safetensors")
    text, foreign = cold(*flags(base, tiny_images, tmp_path / "out", "--single_file_config", tiny_model, "--max_train_steps", 1,
                                "--save_model_as", "ckpt", "--cache_latents=false", "--train_text_encoder",
                                "--gradient_checkpointing", "--mixed_precision", "bf16", "--dataloader_num_workers", 2,
                                "--use_8bit_adam"))
    assert foreign == [] and f"wrote {tmp_path / 'out' / 'last.ckpt'}" in text


def test_averaged_and_raw_weights_are_both_kept(folder):
    output, _ = folder
    averaged, raw = (load_file(output / name / WEIGHTS) for name in ("unet", "unet_raw"))
    assert equal(averaged, load_file(output / "checkpoint-4" / "ema.safetensors"))
    assert equal(raw, load_file(output / "checkpoint-4" / "unet" / WEIGHTS))
    assert not equal(averaged, raw)


def test_numbered_models(folder):
    """Every three steps and every epoch, in kohya's numbering; the last step's is the model itself."""
    output, _ = folder
    assert sorted(path.name for path in output.glob("last-*")) == ["last-000001", "last-000002", "last-step00000003"]
    for path in output.glob("last-*"):
        assert (path / "model_index.json").exists() and (path / "unet_raw" / WEIGHTS).exists()
    raw = load_file(output / "last-step00000003" / "unet_raw" / WEIGHTS)
    assert not equal(raw, load_file(output / "unet_raw" / WEIGHTS))
    assert draw(StableDiffusionXLPipeline.from_pretrained(output / "last-000001")).std() > 0


def test_pictures_and_report(folder):
    output, _ = folder
    for step in (2, 4):
        pictures = sorted((output / "validation" / f"step-{step:06d}").glob("*.png"))
        assert [(path.name, Image.open(path).size) for path in pictures] == [
            (f"{name}-{width}x{height}-0.png", (width, height)) for name in ("00-a-cat", "01-red-dog")
            for width, height in ((64, 64), (64, 96))]
        assert all(np.asarray(Image.open(path)).std() > 0 for path in pictures)
    assert min(Image.open(output / "loss_curve.png").size) > 300
    page = (output / "report.html").read_text()
    assert "<title>" in page and "a cat" in page and page.count("data:image/") >= 8
    assert any(path.stat().st_size > 1000 for path in (output / "logs").glob("events.out.tfevents.*"))


@pytest.mark.parametrize("kind", ["safetensors", "ckpt"])
def test_one_file_draws_what_the_folder_draws(folder, save, tiny_model, kind):
    output = save("--save_model_as", kind, "--output_name", "mine")
    assert not (output / "model_index.json").exists()
    whole = StableDiffusionXLPipeline.from_pretrained(folder[0])
    single, raw = (StableDiffusionXLPipeline.from_single_file(str(output / f"{name}.{kind}"), config=str(tiny_model),
                                                              local_files_only=True) for name in ("mine", "mine-raw"))
    for part in ("unet", "vae", "text_encoder", "text_encoder_2"):
        assert equal(getattr(whole, part).state_dict(), getattr(single, part).state_dict())
    assert np.array_equal(draw(whole), draw(single))
    assert equal(raw.unet.state_dict(), load_file(folder[0] / "unet_raw" / WEIGHTS))
    assert not np.array_equal(draw(whole), draw(raw))


@pytest.mark.parametrize(("name", "dtype"), [("fp16", torch.float16), ("bf16", torch.bfloat16), ("float", torch.float32)])
def test_save_precision(folder, save, name, dtype):
    """All parts; and the weights are those of the unrounded model, rounded once."""
    output = save("--save_precision", name)
    for part in ("unet", "unet_raw", "vae", "text_encoder", "text_encoder_2"):
        (path,) = (output / part).glob("*.safetensors")
        ours, whole = load_file(path), load_file(folder[0] / part / path.name)
        assert equal(ours, {key: value.to(dtype) for key, value in whole.items()})
    assert load_file(output / "checkpoint-4" / "unet" / WEIGHTS)["conv_in.weight"].dtype == torch.float32


@pytest.mark.parametrize("kind", ["safetensors", "ckpt"])
def test_training_starts_from_one_file(folder, save, tiny_model, tmp_path, kind):
    output = save("--single_file_config", tiny_model, model=single_file(tiny_model, tmp_path / f"base.{kind}"))
    assert losses(output) == losses(folder[0]) and len(losses(output)) == 4
    for part in ("unet", "unet_raw"):
        assert equal(load_file(output / part / WEIGHTS), load_file(folder[0] / part / WEIGHTS))
    assert np.array_equal(draw(StableDiffusionXLPipeline.from_pretrained(output)),
                          draw(StableDiffusionXLPipeline.from_pretrained(folder[0])))

"""train_lora_sdxl.py on the tiny model: it starts as the base, learns, stops and goes on, and writes what others load."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from forks import REPOSITORY
from safetensors.torch import load_file, save_file
from test_data_sets import losses

import train_lora_sdxl

WEIGHTS = "pytorch_lora_weights.safetensors"
KINDS = [(), ("--use_dora",), ("--use_rslora",), ("--lora_type", "loha", "--lora_format", "kohya"),
         ("--lora_type", "lokr", "--lora_format", "kohya"), ("--lora_type", "oft"), ("--lora_targets", "convolutions"),
         ("--lora_targets", "kohya"), ("--lora_init_type", "gaussian"), ("--lora_init_type", "pissa"),
         ("--lora_dropout", 0.5, "--rank_dropout", 0.5, "--module_dropout", 0.5),
         ("--network_module", "networks.lora", "--network_args", "conv_dim=2", "loraplus_lr_ratio=4"), ("--train_text_encoder",)]


def test_the_first_loss_is_that_of_the_full_script(train, train_lora, tmp_path):
    """The adapter adds nothing at first: then the same images, noise and timesteps give the same loss."""
    full = losses(train("--max_train_steps", 1, "--center_crop", "--output_dir", tmp_path / "full"))
    for number, kind in enumerate(KINDS):
        first = losses(train_lora("--max_train_steps", 1, "--center_crop", *kind, "--output_dir", tmp_path / str(number)))
        assert first[0] == pytest.approx(full[0], abs=1e-6), kind


@pytest.mark.parametrize("kind", [KINDS[0], ("--network_module", "networks.lora", "--network_args", "conv_dim=2")], ids=" ".join)
def test_the_loss_falls(train_lora, tmp_path, kind):
    same = ("--center_crop", "--learning_rate", 0.01, "--max_train_steps", 30, "--train_batch_size", 6, "--lr_warmup_steps", 0)
    fell = losses(train_lora(*same, *kind, "--output_dir", tmp_path / "long"))
    still = losses(train_lora(*same, "--learning_rate", 1e-12, *kind, "--output_dir", tmp_path / "still"))
    assert np.mean(fell[-10:]) < np.mean(still[-10:]) - 0.01


def test_stopped_and_continued_it_is_the_same_bits(train_lora, tmp_path):
    more = ("--max_train_steps", 6, "--checkpointing_steps", 3, "--use_ema", "--random_flip", "--lora_dropout", 0,
            "--lora_format", "both", "--train_text_encoder")
    whole = train_lora(*more)
    again = tmp_path / "again"
    shutil.copytree(whole / "checkpoint-3", again / "checkpoint-3")
    train_lora(*more, "--output_dir", again, "--resume_from_checkpoint", "latest")
    for name in (WEIGHTS, "last.safetensors", "checkpoint-6/adapter.safetensors", "checkpoint-6/ema.safetensors"):
        one, other = load_file(whole / name), load_file(again / name)
        assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one), name
    assert losses(again) == losses(whole)[3:]
    assert sum(path.stat().st_size for path in (whole / "checkpoint-6").rglob("*")) < 3e6    # the base is not in it


def test_diffusers_loads_it_and_draws_what_validation_drew(train_lora, tiny_model, tmp_path):
    from diffusers import StableDiffusionXLPipeline
    out = train_lora("--max_train_steps", 4, "--learning_rate", 0.05, "--lora_format", "both", "--train_text_encoder")
    drawn = []
    for file in (None, WEIGHTS, "last.safetensors"):
        pipeline = StableDiffusionXLPipeline.from_pretrained(tiny_model)
        pipeline.set_progress_bar_config(disable=True)
        if file:
            pipeline.load_lora_weights(out, weight_name=file)
        drawn.append(pipeline("a red cat", num_inference_steps=2, height=64, width=64, output_type="latent",
                              generator=torch.Generator().manual_seed(0)).images)
    assert (drawn[0] - drawn[1]).abs().max() > 1e-3    # it does something
    torch.testing.assert_close(drawn[1], drawn[2], rtol=1e-3, atol=1e-4)


def test_dreambooth_draws_the_class_images_that_are_missing(train_lora, tmp_path):
    things = tiny.make_images(tmp_path / "things", [(64, 64)] * 3, captions=False)
    kind = tiny.make_images(tmp_path / "kind", [(64, 64)], captions=False)
    kept = (kind / "image000.png").read_bytes()
    flags = ("--instance_data_dir", things, "--instance_prompt", "a photo of sks cat", "--with_prior_preservation",
             "--class_data_dir", kind, "--class_prompt", "a photo of a cat", "--num_class_images", 3,
             "--embedding_cache_dir", tmp_path / "cache")
    out = train_lora(*flags, "--max_train_steps", 2, without=["train_data_dir"])
    assert len(losses(out)) == 2 and len(list(kind.glob("*.png"))) == 3 and (kind / "image000.png").read_bytes() == kept
    weighed = [losses(train_lora(*flags, "--learning_rate", 1e-12, "--prior_loss_weight", weight, "--output_dir", tmp_path / str(
        weight), without=["train_data_dir"])) for weight in (0, 1, 2)]
    np.testing.assert_allclose(np.diff(weighed, axis=0)[0], np.diff(weighed, axis=0)[1], rtol=1e-3)


def test_simpletuners_regularisation_sets_keep_what_the_base_says(train_lora, tmp_path, tiny_images):
    config = tmp_path / "multidatabackend.json"
    sets = [{"id": "all", "type": "local", "instance_data_dir": str(tiny_images), "caption_strategy": "textfile", "crop": True,
             "resolution": 64, "resolution_type": "pixel", "is_regularisation_data": True}]
    config.write_text(json.dumps(sets))
    out = train_lora("--data_backend_config", config, "--max_train_steps", 1, without=["train_data_dir"])
    assert losses(out) == [0.0]    # at first the adapter changes nothing, so that there is nothing to mend


@pytest.mark.parametrize("flags, words", [(("--rank", 0), ["--rank"]), (("--lora_targets", "to_qq"), ["to_qq", "to_q"])])
def test_what_cannot_be_is_refused(tiny_model, tiny_images, tmp_path, flags, words):
    """By the parser, and by what knows the model; test_flags_lora.py has all that is refused."""
    done = subprocess.run([sys.executable, "train_lora_sdxl.py", "--pretrained_model_name_or_path", tiny_model, "--resolution",
                           "64", "--train_data_dir", tiny_images, "--output_dir", tmp_path / "out", "--report_to", "none",
                           *map(str, flags)], cwd=REPOSITORY, capture_output=True, text=True)
    assert not (tmp_path / "out").exists()    # before anything is made
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert all(word in done.stderr for word in words), done.stderr


@pytest.mark.parametrize("kind", [(), ("--use_dora",), ("--lora_type", "lokr")], ids=lambda kind: " ".join(kind) or "lora")
def test_fewer_casts_are_the_same_bits(train_lora, tmp_path, monkeypatch, kind):
    from library.models import adapters
    flags = ("--mixed_precision", "bf16", "--learning_rate", 0.01, "--lr_warmup_steps", 0, "--max_train_steps", 3, *kind)
    fewer = losses(train_lora(*flags))
    monkeypatch.setattr(adapters, "leave_casts_to_autocast", lambda network: None)
    assert losses(train_lora(*flags, "--output_dir", tmp_path / "more")) == fewer


def test_an_adapter_that_went_wrong_and_another_rank_are_refused_before_anything_is_made(train_lora, tmp_path):
    from library.errors import UserError
    out = train_lora("--max_train_steps", 1, "--lora_format", "both")
    state = load_file(out / "last.safetensors")
    name = next(name for name in state if "lora_up" in name)
    save_file(state | {name: torch.full_like(state[name], float("nan"))}, tmp_path / "nan.safetensors")
    for given, said in ((tmp_path / "nan.safetensors", "holds NaN or infinite values"),
                        (f"{out / 'last.safetensors'}=0.5", "there is no weight to start from"),
                        (tmp_path / "no", "there is no adapter")):
        with pytest.raises(UserError, match=said):
            train_lora("--init_lora", given, "--output_dir", tmp_path / "new", without=["rank"])
        assert not (tmp_path / "new").exists()
    with pytest.raises(UserError, match="was made with --rank 4, not 8"):
        train_lora("--rank", 8, "--max_train_steps", 2, "--resume_from_checkpoint", "latest")


@pytest.mark.parametrize("flags, said", [
    (("--rank_pattern", "mid_blok=4"), "--rank_pattern mid_blok fits no layer that gets an adapter; did you mean mid_block?"),
    (("--alpha_pattern", "attn3=4"), "--alpha_pattern attn3 fits no layer"),
    (("--rank_pattern", "mid[=4"), "is not a regular expression")])
def test_patterns_that_fit_nothing_are_refused(tiny_model, flags, said):
    from diffusers import UNet2DConditionModel

    from library.errors import UserError
    from library.models import adapter_flags
    args = train_lora_sdxl.parse_args(["--pretrained_model_name_or_path=x", "--train_data_dir=x", *flags])
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(json.loads((Path(tiny_model) / "unet" / "config.json").read_text()))
    with pytest.raises(UserError, match=re.escape(said)):
        adapter_flags.adapter_of(args, unet)


def test_a_kind_beside_kohyas_module_is_told(capsys):
    train_lora_sdxl.parse_args(["--pretrained_model_name_or_path=x", "--train_data_dir=x", "--lora_type=lokr",
                                "--network_module=networks.lora", "--network_train_unet_only"])
    assert "--lora_type has no effect with --network_module" in capsys.readouterr().err

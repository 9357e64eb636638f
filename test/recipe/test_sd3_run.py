"""train_sd3.py on a tiny SD 3.5: it stops and goes on, each flag changes what it says, and diffusers loads what it writes."""

import itertools
import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline
from forks import flags, together
from PIL import Image
from safetensors.torch import load_file
from test_data_sets import losses

import train_sd3
from library.errors import UserError
from library.models import sd3, sd3_file
from library.training import spikes

WEIGHTS = "diffusion_pytorch_model.safetensors"
SHOWN = ("--validation_prompt", "a red cat", "--num_validation_images", 1, "--validation_num_inference_steps", 6)
PARTS = ("transformer", "vae", "text_encoder", "text_encoder_2", "text_encoder_3")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny.make_sd3(tmp_path_factory.mktemp("sd3"), "3.5-medium")


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def train(model, tiny_images, cache, tmp_path, one_process, monkeypatch):
    """`train(*flags)`: a whole run in this process -> its output folder; later flags go before earlier ones."""
    usual = {"pretrained_model_name_or_path": model, "train_data_dir": tiny_images, "output_dir": tmp_path / "out",
             "embedding_cache_dir": cache, "resolution": 64, "train_batch_size": 2, "max_train_steps": 2, "seed": 1,
             "report_to": "none", "logging_steps": 1, "lr_warmup_steps": 0}

    def train(*flags, without=()):
        one_process()
        given = [f"--{name}={value}" for name, value in usual.items() if name not in without]
        args = train_sd3.parse_args([*given, *map(str, flags)])
        with monkeypatch.context() as patch:
            patch.setattr(train_sd3.report, "write_loss_curve", lambda folder: folder)
            patch.setattr(train_sd3.report, "write_report", lambda folder, notes, **_: (folder / "notes").write_text(str(notes)))
            train_sd3.main(args)
        return Path(args.output_dir)

    return train


def metrics(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def drawn(out: Path, step: int) -> dict[str, np.ndarray]:
    return {path.name: np.asarray(Image.open(path)).astype(int) for path in (out / f"validation/step-{step:06d}").glob("*.png")}


def assert_equal(one: Path, other: Path, names) -> None:
    for name in names:
        ours, theirs = load_file(one / name), load_file(other / name)
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours), name


# what it writes

@pytest.fixture
def pipeline_of():
    """`pipeline_of(folder)`: the pipeline there, every part of it loaded with all its keys and no other."""
    def load(folder: Path, **absent) -> StableDiffusion3Pipeline:
        pipeline = StableDiffusion3Pipeline.from_pretrained(folder, dtype=torch.float32, **absent)
        for part in PARTS:
            if network := getattr(pipeline, part):
                _, info = type(network).from_pretrained(folder / part, output_loading_info=True)
                assert not info["missing_keys"] and not info["unexpected_keys"], (part, info)
        pipeline.set_progress_bar_config(disable=True)
        return pipeline
    return load


@pytest.mark.parametrize("flavour", ["medium", "3.5-large"])
def test_diffusers_loads_what_it_writes_and_draws_what_validation_drew(train, pipeline_of, tmp_path, flavour):
    base = tiny.make_sd3(tmp_path / "base", flavour)
    out = train("--pretrained_model_name_or_path", base, *SHOWN, "--validation_resolution", "64,96", 64, "--learning_rate", 0.01,
                "--use_ema", "--embedding_cache_dir", tmp_path / "cache", "--validation_guidance", 3.0)
    pipeline = pipeline_of(out)
    shown = drawn(out, 2)
    assert len(shown) == 2
    for name, image in shown.items():
        height, width = image.shape[:2]
        theirs = pipeline("a red cat", negative_prompt="", width=width, height=height, num_inference_steps=6, guidance_scale=3.0,
                          max_sequence_length=154, generator=torch.Generator().manual_seed(1), output_type="np").images[0]
        assert np.abs(theirs * 255 - image).max() < 1.5, name    # rounding
    averaged, raw, start = (load_file(folder / WEIGHTS) for folder in (
        out / "transformer", out / "transformer_raw", base / "transformer"))
    assert averaged.keys() == raw.keys() == start.keys()
    assert all(any(not torch.equal(other[key], raw[key]) for key in raw) for other in (averaged, start))
    assert_equal(out, base, [f"{part}/model.safetensors" for part in PARTS[2:]] + [f"vae/{WEIGHTS}"])
    assert pipeline.scheduler.config.shift == 3.0


def test_without_t5_neither_the_run_nor_the_model_has_one(train, pipeline_of, tmp_path, model):
    base = tmp_path / "base"
    shutil.copytree(model, base, ignore=shutil.ignore_patterns("text_encoder_3", "tokenizer_3"))
    with pytest.raises(UserError, match="no text_encoder_3.*--no_t5"):
        train("--pretrained_model_name_or_path", base)
    out = train("--pretrained_model_name_or_path", base, "--no_t5", "--save_precision", "fp16")
    assert not list(out.glob("*_3")) and json.loads((out / "model_index.json").read_text())["text_encoder_3"] == [None, None]
    assert pipeline_of(out, text_encoder_3=None, tokenizer_3=None)("a cat", num_inference_steps=1, height=64, width=64).images
    assert {tensor.dtype for tensor in load_file(out / "transformer" / WEIGHTS).values()} == {torch.float16}


@pytest.mark.parametrize(("precision", "dtype"), [("float", torch.float32), ("fp16", torch.float16), ("bf16", torch.bfloat16)])
def test_one_file_is_stabilitys_and_diffusers_and_we_read_the_run_from_it(train, model, tmp_path, precision, dtype):
    """The last and one on the way, averaged and not; with the CLIPs that were trained."""
    out = train("--save_model_as", "safetensors", "--save_precision", precision, "--save_every_n_steps", 1, "--use_ema",
                "--train_text_encoder", "--checkpointing_steps", 1, "--learning_rate", 0.01)
    files = {step: [f"last{name}{kind}.safetensors" for kind in ("", "-raw")] for step, name in ((1, "-step00000001"), (2, ""))}
    assert {path.name for path in out.glob("*.safetensors")} == {*files[1], *files[2]} and not (out / "model_index.json").exists()
    layout = tiny.original_layout(SD3Transformer2DModel.from_pretrained(model / "transformer")).keys()
    for step, names in files.items():
        kept = out / f"checkpoint-{step}"
        raw = load_file(kept / "transformer" / WEIGHTS)
        clips = {part: load_file(kept / part / "model.safetensors") for part in PARTS[2:4]}
        projection = clips["text_encoder"].pop("text_projection.weight")    # goes into the layer that reads it
        for name, average in zip(names, (load_file(kept / "ema.safetensors"), {}), strict=True):
            written = load_file(out / name)
            assert {tensor.dtype for tensor in written.values()} == {dtype}
            assert {key for key in written if key.startswith("model.")} == layout
            assert {".".join(key.split(".")[:3]) for key in written if not key.startswith(("model.", "first_stage_model."))} == {
                f"text_encoders.{kind}.transformer" for kind in ("clip_l", "clip_g", "t5xxl")}
            wanted = raw | average
            pooled = "time_text_embed.text_embedder.linear_1.weight"
            wanted[pooled] = torch.cat([wanted[pooled][:, :16] @ projection, wanted[pooled][:, 16:]], dim=1)
            theirs = SD3Transformer2DModel.from_single_file(out / name, config=str(model), subfolder="transformer", dtype=dtype)
            ours = sd3_file.load_part(out / name, "transformer", SD3Transformer2DModel, model, dtype)
            for read in (theirs.state_dict(), ours.state_dict()):
                assert read.keys() == wanted.keys()
                assert all(torch.equal(read[key], wanted[key].to(dtype)) for key in read.keys() - {pooled})
                torch.testing.assert_close(read[pooled].float(), wanted[pooled], rtol=0.01, atol=1e-3)
            for part, state in clips.items():
                read = sd3_file.load_part(out / name, part, sd3.class_of(part), model, dtype).state_dict()
                assert all(torch.equal(read[key], state[key].to(dtype)) for key in state), part
    whole = StableDiffusion3Pipeline.from_single_file(out / "last.safetensors", config=str(model), dtype=dtype)
    for part in ("vae", "text_encoder_3"):
        base = type(getattr(whole, part)).from_pretrained(model / part).state_dict()
        assert all(torch.equal(tensor, base[key].to(dtype)) for key, tensor in getattr(whole, part).state_dict().items()), part


# stopping, spreading

def test_stopped_and_continued_it_is_the_same_bits(train, tmp_path):
    more = ("--max_train_steps", 6, "--checkpointing_steps", 3, "--use_ema", "--random_flip", "--train_text_encoder",
            "--spike_guard", "skip", "--logging_steps", 2, "--clip_l_dropout_rate", 0.3, "--t5_dropout_rate", 0.3)
    whole = train(*more)
    again = tmp_path / "again"
    shutil.copytree(whole / "checkpoint-3", again / "checkpoint-3")
    train(*more, "--output_dir", again, "--resume_from_checkpoint", "latest")
    assert_equal(whole, again, [f"transformer/{WEIGHTS}", f"transformer_raw/{WEIGHTS}", "text_encoder/model.safetensors",
                                "text_encoder_2/model.safetensors", "checkpoint-6/ema.safetensors"])
    assert losses(again) == losses(whole)[1:]
    kept = [json.loads((out / "checkpoint-6/manifest.json").read_text())["unlogged"] for out in (whole, again)]
    assert kept[0] == kept[1] and len(kept[0]["guarded_norms"]) == 6


def test_one_process_is_accumulation_and_two_processes(train, model, tiny_images, cache, tmp_path):
    more = ("--max_train_steps", 4, "--train_text_encoder", "--adam_epsilon", 1e-6, "--weighting_scheme", "sigma_sqrt",
            "--noise_offset", 0.05, "--proportion_empty_prompts", 0.3, "--use_ema")
    one = train("--train_batch_size", 4, *more)
    two = train("--train_batch_size", 2, "--gradient_accumulation_steps", 2, *more, "--output_dir", tmp_path / "two")
    spread = flags(model, tiny_images, tmp_path / "spread", "--embedding_cache_dir", cache, "--train_batch_size", 2,
                   "--lr_warmup_steps", 0, "--spike_guard", "skip", *more)
    for process in together(spread, tmp_path / "log", 2, script="train_sd3"):
        assert process.wait() == 0, process.text()
    for other in (two, tmp_path / "spread"):
        np.testing.assert_allclose(losses(other), losses(one), rtol=1e-6)
        for name in (f"transformer/{WEIGHTS}", f"transformer_raw/{WEIGHTS}", "text_encoder/model.safetensors",
                     "text_encoder_2/model.safetensors"):
            ours, theirs = load_file(one / name), load_file(other / name)
            assert max((ours[key].float() - theirs[key].float()).abs().max() for key in ours) < 1e-5, name


# flags

CHANGES = [("--no_t5",), ("--tokenizer_max_length", 77), ("--t5_padding", "zero"), ("--apply_lg_attn_mask",),
           ("--apply_t5_attn_mask",), ("--max_token_length", 150), ("--clip_l_dropout_rate", 1), ("--clip_g_dropout_rate", 1),
           ("--t5_dropout_rate", 1), ("--text_encoder_3_precision", "int8-quanto"), ("--proportion_empty_prompts", 1),
           ("--proportion_empty_prompts", 1, "--sd3_clip_uncond_behaviour", "zero"),
           ("--proportion_empty_prompts", 1, "--sd3_t5_uncond_behaviour", "zero"), ("--precondition_outputs", 1),
           ("--weighting_scheme", "cosmap"), ("--flow_schedule_auto_shift",), ("--flow_use_beta_schedule",),
           ("--noise_offset", 0.3)]


def test_each_flag_changes_the_loss(train, tmp_path):
    found = {(): losses(train("--max_train_steps", 1))[0]}
    for change in CHANGES:
        found[change] = losses(train("--max_train_steps", 1, *change, "--output_dir", tmp_path / str(len(found))))[0]
    in_order = sorted(found, key=found.get)
    assert not [pair for pair in itertools.pairwise(in_order) if found[pair[1]] - found[pair[0]] < 1e-6]
    assert losses(train("--max_train_steps", 1, "--flow_use_uniform_schedule", "--output_dir", tmp_path / "a")) == losses(
        train("--max_train_steps", 1, "--weighting_scheme", "uniform", "--output_dir", tmp_path / "b"))    # kohya's none


def test_skip_layer_guidance_is_the_pipelines_own(train, pipeline_of, tmp_path):
    """As a list and as a string, in a config file and typed."""
    more = (*SHOWN, "--max_train_steps", 1, "--validation_guidance", 4.0, "--validation_guidance_skip_layers_start", 0.01,
            "--validation_guidance_skip_layers_stop", 0.6, "--validation_guidance_skip_scale", 2.0, "--learning_rate", 0)
    ways = {"list": [0, 1], "string": "[0, 1]"}
    found = {}
    for name, layers in ways.items():
        config = tmp_path / f"{name}.json"
        config.write_text(json.dumps({"--validation_guidance_skip_layers": layers}))
        found[name] = drawn(train(*more, "--config_file", config, "--output_dir", tmp_path / name), 1)
    found["typed"] = drawn(train(*more, "--validation_guidance_skip_layers", 0, 1, "--output_dir", tmp_path / "typed"), 1)
    plain = drawn(train(*more, "--output_dir", tmp_path / "plain"), 1)
    (name,) = plain
    assert all((each[name] == found["typed"][name]).all() for each in found.values())
    assert (found["typed"][name] != plain[name]).any()
    pipeline = pipeline_of(tmp_path / "typed")
    theirs = pipeline("a red cat", negative_prompt="", width=64, height=64, num_inference_steps=6, guidance_scale=4.0,
                      max_sequence_length=154, generator=torch.Generator().manual_seed(1), output_type="np",
                      skip_guidance_layers=[0, 1], skip_layer_guidance_start=0.01, skip_layer_guidance_stop=0.6,
                      skip_layer_guidance_scale=2.0).images[0]
    assert np.abs(theirs * 255 - found["typed"][name]).max() < 1.5


def test_a_library_of_prompts_is_drawn_too(train, tmp_path):
    library = tmp_path / "user_prompt_library.json"
    library.write_text(json.dumps({"dog": "a green dog", "house": "blue house"}))
    out = train(*SHOWN, "--user_prompt_library", library, "--max_train_steps", 1)
    assert [*sorted(drawn(out, 1))] == [f"{name}-64x64-0.png" for name in ("00-a-red-cat", "01-a-green-dog", "02-blue-house")]


def test_evaluation_does_not_depend_on_what_is_drawn(train, tmp_path, tiny_images):
    """Its levels are evenly spread, whatever the density of training."""
    config = tmp_path / "sets.json"
    sets = [{"id": "train", "type": "local", "instance_data_dir": str(tiny_images), "caption_strategy": "textfile", "crop": True,
             "resolution": 64, "resolution_type": "pixel"}, {"id": "held", "type": "local", "dataset_type": "eval",
             "instance_data_dir": str(tiny_images), "caption_strategy": "textfile", "crop": True, "resolution": 64,
             "resolution_type": "pixel"}]
    config.write_text(json.dumps(sets))
    found = []
    for density in ((), ("--logit_mean", 1.5), ("--flow_use_beta_schedule",)):
        out = train("--data_backend_config", config, "--max_train_steps", 1, "--learning_rate", 0, "--eval_timesteps", 3,
                    *density, "--output_dir", tmp_path / str(len(found)), without=["train_data_dir"])
        found.append(json.loads((out / "evaluation.jsonl").read_text())["held"])
    assert found[0] == found[1] == found[2]


# the guard

def spiky(monkeypatch, *calls: int) -> None:
    """Let the loss be NaN at these calls."""
    whole, count = train_sd3.training_loss, iter(range(1, 1000))
    monkeypatch.setattr(train_sd3, "training_loss", lambda *given: whole(*given) * (math.nan if next(count) in calls else 1))


def test_a_gradient_that_is_not_finite_is_skipped_and_counted(train, tmp_path, monkeypatch):
    more = ("--max_train_steps", 4, "--checkpointing_steps", 2, "--lr_scheduler", "constant")
    spiky(monkeypatch, 3, 7)
    out = train(*more, "--spike_guard", "skip")
    assert [line["spikes"] for line in metrics(out)] == [0, 0, 1, 1] and losses(out)[2] is None
    assert [json.loads(line)["step"] for line in (out / spikes.NAME).read_text().splitlines()] == [3]
    assert "--spike_guard skip: 1 gradients were not applied" in (out / "notes").read_text()
    assert all(torch.isfinite(tensor).all() for tensor in load_file(out / "transformer" / WEIGHTS).values())
    spoilt = train(*more, "--output_dir", tmp_path / "spoilt")    # the seventh call is its third step
    assert not all(torch.isfinite(tensor).all() for tensor in load_file(spoilt / "transformer" / WEIGHTS).values())


def test_a_skipped_step_leaves_weights_and_moments_alone(train, tmp_path, monkeypatch):
    spiky(monkeypatch, 3)
    out = train("--max_train_steps", 3, "--checkpointing_steps", 1, "--spike_guard", "skip", "--max_grad_norm", 0)
    assert_equal(out / "checkpoint-2", out / "checkpoint-3", [f"transformer/{WEIGHTS}"])
    two, three = (torch.load(out / f"checkpoint-{step}/training_state.pt", weights_only=True)["optimizer"]["state"]
                  for step in (2, 3))
    assert all(torch.equal(two[key]["exp_avg"], three[key]["exp_avg"]) for key in two)


def test_stop_saves_and_ends_and_goes_on_behind_it(train, tmp_path, monkeypatch):
    monkeypatch.setattr(spikes, "LEAST", 1)
    more = ("--max_train_steps", 4, "--spike_guard", "stop", "--spike_factor", 1000)
    whole = train(*more, "--output_dir", tmp_path / "whole")
    spiky(monkeypatch, 2)
    with pytest.raises(UserError, match=r"--spike_guard stop: step 2: the gradient's norm is nan.*--resume_from_checkpoint"):
        train(*more)
    assert [path.name for path in (tmp_path / "out").glob("checkpoint-*")] == ["checkpoint-2"]
    out = train(*more, "--resume_from_checkpoint", "latest")
    assert [line["spikes"] for line in metrics(out)] == [0, 1, 1, 1] and losses(out)[0] == losses(whole)[0]
    monkeypatch.setattr(spikes, "LEAST", 2)
    with pytest.raises(UserError, match=r"step 3: .* [\d.]+ times the median of the last 2"):    # what outlies, too
        train(*more, "--spike_factor", 1.0001, "--output_dir", tmp_path / "outlying", "--learning_rate", 1.0)


# mistakes

@pytest.mark.parametrize("flags, words", [
    (("--validation_guidance_skip_layers", 1, 3), ["no layer 3", "layers 0 to 2"]),
    (("--enable_npu_flash_attention",), ["npu"])])
def test_what_the_model_or_machine_cannot_do_is_refused(train, flags, words):
    with pytest.raises(UserError) as error:
        train(*flags)
    assert all(word in str(error.value) for word in words), error.value


def test_sizes_that_a_data_set_says_are_looked_at(train, tmp_path, tiny_images):
    config = tmp_path / "sets.toml"
    config.write_text(f"[[datasets]]\nresolution = 72\n[[datasets.subsets]]\nimage_dir = '{tiny_images}'\n")
    with pytest.raises(UserError, match="72 x 72 pixels.*multiples of 16"):
        train("--dataset_config", config, without=["train_data_dir"])
    with pytest.raises(UserError, match="800 x 64 pixels.*at most 768"):    # its grid of positions is 48 x 48
        train("--validation_resolution", "800,64")


def test_a_checkpoint_of_another_transformer_is_refused(train, tmp_path):
    out = train("--max_train_steps", 1)
    other = tiny.make_sd3(tmp_path / "other", "medium")
    with pytest.raises(UserError, match="another transformer.*dual_attention_layers"):
        train("--pretrained_model_name_or_path", other, "--resume_from_checkpoint", out / "checkpoint-1", "--embedding_cache_dir",
              tmp_path / "cache")
    assert SD3Transformer2DModel.from_pretrained(out / "checkpoint-1" / "transformer")

"""Each flag of the groups `training`, `optimizer` and `objective` changes what it says it changes, in a run."""

import json

import forks
import pytest
import torch
from diffusers import UNet2DConditionModel
from pieces import make, note_calls
from safetensors.torch import load_file

import train_sdxl
from library.diffusion import ddpm
from library.models import sdxl

UNET, TE1, TE2 = "unet/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors", "text_encoder_2/model.safetensors"


def lines(out, name: str) -> list:
    return [json.loads(line)[name] for line in (out / "metrics.jsonl").open()]


def moved(out, base, part: str = UNET) -> float:
    """The largest change of any weight since the base model."""
    ours, theirs = load_file(out / part), load_file(base / part)
    return max((value - theirs[name]).abs().max().item() for name, value in ours.items())


def apart(one, other, part: str = UNET) -> float:
    return moved(one, other, part)


def test_train_batch_size(train, monkeypatch):
    calls = note_calls(monkeypatch, train_sdxl, "training_loss")
    train("--train_batch_size", 3)
    assert [len(given[1]["noise"]) for given, _ in calls] == [3, 3]


def test_gradient_accumulation_steps(train, tmp_path, monkeypatch):
    """Four images at once, or one by one: the same optimizer steps."""
    calls = note_calls(monkeypatch, train_sdxl, "training_loss")
    whole = train("--train_batch_size", 4, "--output_dir", tmp_path / "whole")
    assert len(calls) == 2
    parts = train("--train_batch_size", 1, "--gradient_accumulation_steps", 4, "--output_dir", tmp_path / "parts")
    assert len(calls) == 2 + 8 and {len(given[1]["noise"]) for given, _ in calls[2:]} == {1}
    assert lines(parts, "loss") == pytest.approx(lines(whole, "loss"), rel=1e-5)
    assert lines(parts, "grad_norm") == pytest.approx(lines(whole, "grad_norm"), rel=1e-4)
    assert lines(parts, "step") == [1, 2]


def test_length_of_the_run(train, tmp_path):
    out = train("--num_train_epochs", 2, "--output_dir", tmp_path / "epochs", without=["max_train_steps"])
    assert lines(out, "step")[-1] == 6    # 6 images, twice, 2 at a time
    out = train("--num_train_epochs", 2, "--max_train_steps", 4, "--output_dir", tmp_path / "steps")
    assert lines(out, "step")[-1] == 4


def test_learning_rate_and_scale_lr(train, tmp_path, tiny_model):
    flags = ("--max_train_steps", 1, "--lr_scheduler", "constant", "--adam_weight_decay", 0)
    for rate, more, wanted in ((1e-3, (), 1e-3), (1e-5, (), 1e-5),
                               (1e-5, ("--scale_lr", "--gradient_accumulation_steps", 3), 6e-5)):
        out = train("--learning_rate", rate, *more, *flags, "--output_dir", tmp_path / f"{rate}{len(more)}")
        assert lines(out, "lr") == [pytest.approx(wanted)]
        assert moved(out, tiny_model) == pytest.approx(wanted, rel=0.02)    # Adam's first step is as long as the rate


def test_train_text_encoder_and_its_rates(train, tmp_path, tiny_model):
    flags = ("--max_train_steps", 1, "--learning_rate", 1e-3, "--adam_weight_decay", 0)
    frozen = train(*flags, "--output_dir", tmp_path / "frozen")
    assert moved(frozen, tiny_model, TE1) == moved(frozen, tiny_model, TE2) == 0
    both = train(*flags, "--train_text_encoder", "--output_dir", tmp_path / "both")
    assert [moved(both, tiny_model, part) for part in (UNET, TE1, TE2)] == pytest.approx([1e-3] * 3, rel=0.02)
    assert (both / "checkpoint-1" / TE1).exists() and not (frozen / "checkpoint-1" / TE1).exists()
    own = train(*flags, "--train_text_encoder", "--learning_rate_te1", 2e-5, "--learning_rate_te2", 0, "--output_dir",
                tmp_path / "own")
    assert moved(own, tiny_model, TE1) == pytest.approx(2e-5, rel=0.02) and moved(own, tiny_model, TE2) == 0


def test_max_grad_norm(train, tmp_path, tiny_model):
    """With an epsilon far above the gradients Adam's step is proportional to them."""
    flags = ("--max_train_steps", 1, "--adam_epsilon", 1e6, "--adam_weight_decay", 0, "--learning_rate", 1e3)
    free = train("--max_grad_norm", 0, *flags, "--output_dir", tmp_path / "free")
    assert lines(free, "grad_norm") == [None]
    norms, steps = [], []
    for name, limit in (("wide", 1e6), ("tight", 0.01)):
        out = train("--max_grad_norm", limit, *flags, "--output_dir", tmp_path / name)
        norms.append(lines(out, "grad_norm")[0])
        steps.append(moved(out, tiny_model))
    assert norms[0] == norms[1] > 1 and steps[0] == moved(free, tiny_model)
    assert steps[1] / steps[0] == pytest.approx(0.01 / norms[0], rel=1e-2)


@pytest.mark.parametrize(("flags", "kind", "words"), [
    ((), "AdamW", {"betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 1e-2}),
    (("--optimizer", "adafactor", "--adam_weight_decay", 0.3), "Adafactor", {"weight_decay": 0.3}),
    (("--use_8bit_adam", "--adam_beta1", 0.5), "AdamW8bit", {"betas": (0.5, 0.999)}),
    (("--optimizer_type", "DAdaptLion", "--learning_rate", 1, "--optimizer_args", "weight_decay=0.1", "decouple=True"),
     "DAdaptLion", {"weight_decay": 0.1, "weight_decouple": True}),
    (("--optimizer", "adamw", "--adam_beta2", 0.9, "--adam_epsilon", 1e-3), "AdamW", {"betas": (0.9, 0.9), "eps": 1e-3})],
    ids=str)
def test_optimizer_of_a_run(train, monkeypatch, flags, kind, words):
    made = []
    original = train_sdxl.optimizers.make_optimizer
    monkeypatch.setattr(train_sdxl.optimizers, "make_optimizer", lambda *given: made.append(original(*given)) or made[-1])
    out = train(*flags, "--max_train_steps", 1)
    assert type(made[0]).__name__ == kind and made[0].param_groups[0].items() >= words.items()
    assert load_file(out / UNET).keys()


def test_learning_rate_schedule_of_a_run(train):
    out = train("--lr_scheduler", "linear", "--lr_warmup_steps", 2, "--max_train_steps", 4, "--learning_rate", 1e-3)
    assert lines(out, "lr") == pytest.approx([0, 5e-4, 1e-3, 5e-4])


@pytest.mark.parametrize("flags", [("--snr_gamma", 0.5), ("--noise_offset", 0.3), ("--prediction_type", "v_prediction")], ids=str)
def test_objective(parse, tmp_path, tiny_model, flags):
    """The flag reaches the loss; that it is then right is test_parity.py's."""
    unet = UNet2DConditionModel.from_pretrained(tiny_model / "unet")
    batch = make(parse(), tmp_path).loader.compose(0, 0)
    losses = []
    for args in (parse(), parse(*flags)):
        schedule = sdxl.load_schedule(sdxl.find_base(args), args.prediction_type, args.zero_terminal_snr)
        cdf = ddpm.cumulative(ddpm.timestep_bias("none", 1000, 1, 0, 1000, 0))
        losses.append(train_sdxl.training_loss(unet, batch, schedule, cdf, args).item())
    assert abs(losses[0] - losses[1]) > 1e-3


def test_prediction_type_and_zero_terminal_snr_of_a_run(train, monkeypatch):
    """Both reach the loss, and what is written tells the sampler."""
    targets = note_calls(monkeypatch, train_sdxl.ddpm, "target")
    out = train("--prediction_type", "v_prediction", "--zero_terminal_snr")
    kinds, tables = {given[0] for given, _ in targets}, [given[4] for given, _ in targets]
    assert kinds == {"v_prediction"} and all(table[-1] == 0 for table in tables)
    written = json.loads((out / "scheduler" / "scheduler_config.json").read_text())
    assert written.items() >= {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True,
                               "timestep_spacing": "trailing"}.items()
    plain = train("--output_dir", out / "plain")
    assert {given[0] for given, _ in targets[2:]} == {"epsilon"} and targets[-1][0][4][-1] > 0
    assert json.loads((plain / "scheduler" / "scheduler_config.json").read_text())["timestep_spacing"] == "leading"


@pytest.mark.parametrize(("flags", "low", "high"), [
    (("later", "--timestep_bias_multiplier", 1e9, "--timestep_bias_portion", 0.1), 900, 1000),
    (("earlier", "--timestep_bias_multiplier", 1e9, "--timestep_bias_portion", 0.02), 0, 20),
    (("later", "--timestep_bias_multiplier", 1e-9, "--timestep_bias_portion", 0.9), 0, 100),
    (("range", "--timestep_bias_multiplier", 1e9, "--timestep_bias_begin", 300, "--timestep_bias_end", 303), 300, 303)], ids=str)
def test_timestep_bias(train, monkeypatch, flags, low, high):
    drawn = note_calls(monkeypatch, train_sdxl.ddpm, "add_noise")
    train("--timestep_bias_strategy", *flags, "--train_batch_size", 4)
    timesteps = torch.cat([given[2] for given, _ in drawn])
    assert len(timesteps) == 8 and timesteps.min() >= low and timesteps.max() < high and len(set(timesteps.tolist())) > 1


def test_a_wrong_range_is_refused_before_anything_is_done(train, parse, tmp_path):
    from library.errors import UserError
    with pytest.raises(UserError, match="--timestep_bias_begin 500"):
        train("--timestep_bias_strategy", "range", "--timestep_bias_begin", 500, "--timestep_bias_end", 400)
    assert not (tmp_path / "out").exists()


def test_use_ema_and_its_decay(train, tmp_path, tiny_model):
    flags = ("--max_train_steps", 4, "--learning_rate", 1e-3)
    raw = UNET.replace("unet", "unet_raw")
    plain = train(*flags, "--output_dir", tmp_path / "plain")
    assert not (plain / raw).exists() and not (plain / "checkpoint-4" / "ema.safetensors").exists()
    shadow = load_file(tiny_model / UNET)
    average = train(*flags, "--use_ema", "--checkpointing_steps", 1, "--output_dir", tmp_path / "ema")
    for step in range(1, 5):    # the closed form, over the weights that each checkpoint holds
        weights = load_file(average / f"checkpoint-{step}" / UNET)
        decay = step / (9 + step) if step > 1 else 0
        shadow = {name: decay * value + (1 - decay) * weights[name] for name, value in shadow.items()}
    written, own = load_file(average / UNET), load_file(average / raw)
    assert max((written[name] - value).abs().max() for name, value in shadow.items()) < 1e-6
    assert all(torch.equal(own[name], value) for name, value in weights.items()) and apart(plain, average) > 1e-4
    assert all(torch.equal(value, own[name]) for name, value in load_file(plain / UNET).items())
    low = train(*flags, "--use_ema", "--ema_decay", 0, "--output_dir", tmp_path / "low")
    assert all(torch.equal(value, own[name]) for name, value in load_file(low / UNET).items())


def test_trained_text_encoders_learn_from_all_processes(tiny_model, tiny_images, tmp_path):
    """Two processes with half of each batch: the weights of one with the whole."""
    common = ("--max_train_steps", 2, "--train_text_encoder", "--learning_rate", 1e-3, "--adam_epsilon", 1e-6, "--center_crop")
    alone, spread = tmp_path / "alone", tmp_path / "spread"
    forks.run(forks.flags(tiny_model, tiny_images, alone, *common), tmp_path / "alone.log")
    command = forks.flags(tiny_model, tiny_images, spread, *common, "--train_batch_size", 2)
    runs = forks.together(command, tmp_path / "spread.log", 2)
    assert [run.wait() for run in runs] == [0, 0], runs[0].text()[-3000:]
    for part in (UNET, TE1, TE2):
        assert apart(spread, alone, part) < 1e-5 < 1e-3 < moved(alone, tiny_model, part)

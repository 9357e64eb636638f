"""A run of SD 3, of model or adapter, is one run wherever it is killed: with EMA, dropouts, and gradients that are skipped."""

import json
import random
import signal
import time
from pathlib import Path

import pytest
import tiny
import torch
from forks import Run, flags, run, until
from test_kill import files, flat, numbers, temporary
from test_lora_exact import tensors

STEPS, EVERY = 26, 10    # the guard judges from the 21st gradient on
RICH = ("--max_train_steps", STEPS, "--checkpointing_steps", EVERY, "--save_every_n_steps", EVERY, "--logging_steps", 2,
        "--train_batch_size", 2, "--use_ema", "--random_flip", "--shuffle_caption", "--proportion_empty_prompts", 0.2,
        "--clip_l_dropout_rate", 0.2, "--clip_g_dropout_rate", 0.2, "--t5_dropout_rate", 0.2, "--sd3_t5_uncond_behaviour", "zero",
        "--spike_guard", "skip", "--spike_factor", 1.01, "--weighting_scheme", "sigma_sqrt", "--lr_scheduler", "cosine",
        "--lr_warmup_steps", 2, "--train_text_encoder", "--resume_from_checkpoint", "latest")
SCRIPTS = {"train_sd3": (), "train_lora_sd3": ("--rank", 4, "--lora_dropout", 0.2, "--rank_dropout", 0.2, "--module_dropout", 0.2,
                                               "--learning_rate_te3", 1e-3, "--learning_rate", 1e-3)}
WRITTEN = {"train_sd3": {f"{folder}{part}/{kind}.safetensors" for folder in ("", f"last-step000000{EVERY}/") for part, kind in (
               ("transformer", "diffusion_pytorch_model"), ("transformer_raw", "diffusion_pytorch_model"),
               ("text_encoder", "model"), ("text_encoder_2", "model"))},
           "train_lora_sd3": {"last.safetensors", f"last-step000000{EVERY}.safetensors",
                              f"checkpoint-{STEPS}/adapter.safetensors"}}
AIMS = ("step", "checkpoint", f"checkpoint-{EVERY}", f"checkpoint-{2 * EVERY}", "end")    # of a checkpoint: behind it


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny.make_sd3(tmp_path_factory.mktemp("sd3"), "3.5-medium")


def stage(text: str, output: Path) -> str:
    """What a run is at, or was when it was killed."""
    if any(output.glob(".checkpoint-*.tmp")):
        return "checkpoint"
    if any(output.glob("*/.saving.tmp")) or any(output.glob(".*.safetensors.tmp")):
        return "model"
    if (output / f"checkpoint-{STEPS}").exists():
        return "end"
    bars = {"step": "train:", "captions": "encode captions:", "images": "encode images:", "scan": "scan:"}
    return next((name for name, bar in bars.items() if bar in text), "start")


def assert_same(ours: Path, whole: Path) -> None:
    """The same files; weights, EMA, optimizer state, losses and what was skipped are the same to the last bit."""
    assert files(ours) == files(whole)
    for name in (name for name in files(whole) if name.endswith(".safetensors")):
        (mine, header), (theirs, wanted) = tensors(ours / name), tensors(whole / name)
        assert mine.keys() == theirs.keys() and header == wanted, name
        assert all(torch.equal(mine[key], theirs[key]) for key in mine), f"{name}: not the same bits"
    mine, theirs = (flat(torch.load(folder / f"checkpoint-{STEPS}" / "training_state.pt")) for folder in (ours, whole))
    assert mine.keys() == theirs.keys() and sum(isinstance(value, torch.Tensor) for value in mine.values()) > 100
    assert not [key for key, value in mine.items()
                if not (torch.equal(value, theirs[key]) if isinstance(value, torch.Tensor) else value == theirs[key])]
    kept = [json.loads((folder / f"checkpoint-{STEPS}" / "manifest.json").read_text())["unlogged"] for folder in (ours, whole)]
    assert kept[0] == kept[1] and len(kept[0]["guarded_norms"]) == STEPS
    assert numbers(ours) == numbers(whole) and (ours / "spikes.jsonl").read_text() == (whole / "spikes.jsonl").read_text()


@pytest.mark.parametrize("script", SCRIPTS)
def test_kill_9_anywhere(script, model, tiny_images, tmp_path):
    def given(output: Path) -> list[str]:
        return flags(model, tiny_images, output, *RICH, *SCRIPTS[script])

    whole, output, log, seconds = tmp_path / "whole", tmp_path / "out", tmp_path / "log", {}
    going, last = Run(given(whole), log, script), time.monotonic()
    while going.poll() is None:
        at, now = stage(going.text(), whole), time.monotonic()
        seconds[at], last = seconds.get(at, 0) + now - last, now
        time.sleep(0.002)
    assert going.wait() == 0, going.text()
    assert not temporary(whole) and WRITTEN[script] | {f"checkpoint-{STEPS}/ema.safetensors", "spikes.jsonl"} <= files(whole)
    assert [row[0] for row in numbers(whole)] == [*range(2, STEPS + 1, 2)]

    draw, hits, resumed = random.Random(), [], 0
    for aim in ("captions" if script == "train_sd3" else "images", *AIMS):    # where T5 is trained, no caption is cached
        going = Run(given(output), log, script)
        until(lambda: going.poll() is not None or (output / aim).exists() or stage(going.text(), output) == aim,    # noqa: B023
              pause=0.002)
        time.sleep(draw.random() * seconds.get(aim, seconds["step"]) / 3)
        going.send_signal(signal.SIGKILL)
        if going.wait() == -signal.SIGKILL:
            hits.append(stage(going.text(), output))
        resumed += "going on from" in going.text()
    assert len(hits) > len(AIMS) / 2 and resumed
    run(given(output), log, script=script)
    assert not [path for path in temporary(output) if output / "cache" not in path.parents]
    assert_same(output, whole)
    print(f"killed at {', '.join(hits)}")

"""An adapter's run is one run, stopped anywhere or spread differently: as test_kill.py and test_processes.py show of models."""

import random
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from forks import Run, flags, run, together, until
from safetensors import safe_open
from safetensors.torch import load_file
from test_kill import RICH, STEPS, files, flat, launch, numbers, phase, temporary
from test_processes import command, losses

LORA, WEIGHTS = "train_lora_sdxl", "pytorch_lora_weights.safetensors"
SMALL = (*RICH, "--rank", 4, "--train_batch_size", 2)
KINDS = {"dropouts": ("--conv_rank", 2, "--lora_dropout", 0.2, "--rank_dropout", 0.2, "--module_dropout", 0.2),
         "text encoders": ("--use_dora", "--train_text_encoder", "--lora_dropout", 0.2, "--lora_format", "both",
                           "--optimizer", "adamw-schedulefree", "--use_ema=false")}
AIMS = {"dropouts": ("scan", "captions", "step", "checkpoint", "checkpoint-3", "end"),
        "text encoders": ("images", "step", "checkpoint-3", "model", "end")}    # of a checkpoint: steps after it


def stage(text: str, output: Path) -> str:
    """As `phase`; an adapter is saved in one file."""
    saving = [*output.glob(".*.safetensors.tmp"), *output.glob("last-*/.*.safetensors.tmp")]
    return "model" if saving else phase(text, output)


def tensors(path: Path) -> tuple[dict, dict]:
    """(tensors, header without what names the folder and the time of the run)."""
    with safe_open(path, "pt") as file:
        own = {"modelspec.date", "flags"}
        return load_file(path), {key: value for key, value in (file.metadata() or {}).items() if key not in own}


def assert_same(ours: Path, whole: Path) -> None:
    """Adapters, EMA, optimizer state and losses are the same to the last bit."""
    names = [name for name in files(whole) if name.endswith(".safetensors")]
    assert {WEIGHTS, f"last-step00000003/{WEIGHTS}", f"checkpoint-{STEPS}/adapter.safetensors"} <= set(names)
    for name in names:
        (mine, header), (theirs, wanted) = tensors(ours / name), tensors(whole / name)
        assert mine.keys() == theirs.keys() and header == wanted, name
        assert all(torch.equal(mine[key], theirs[key]) for key in mine), f"{name}: not the same bits"
    mine, theirs = (flat(torch.load(folder / f"checkpoint-{STEPS}" / "training_state.pt")) for folder in (ours, whole))
    assert mine.keys() == theirs.keys() and sum(isinstance(value, torch.Tensor) for value in mine.values()) > 100
    assert not [key for key, value in mine.items()
                if not (torch.equal(value, theirs[key]) if isinstance(value, torch.Tensor) else value == theirs[key])]
    assert numbers(ours) == numbers(whole)


@pytest.fixture(scope="module", params=KINDS)
def uninterrupted(request, tiny_model, tiny_images, tmp_path_factory):
    """(flags of a run into a folder, the folder of the uninterrupted run, its seconds at each stage, the name of the kind)."""
    folder = tmp_path_factory.mktemp("uninterrupted")

    def given(output: Path) -> list[str]:
        return flags(tiny_model, tiny_images, output, *SMALL, *KINDS[request.param])

    going = Run(given(folder / "out"), folder / "log", LORA)
    seconds, last = {}, time.monotonic()
    while going.poll() is None:
        at, now = stage(going.text(), folder / "out"), time.monotonic()
        seconds[at], last = seconds.get(at, 0) + now - last, now
        time.sleep(0.002)
    assert going.wait() == 0, going.text()
    assert not temporary(folder / "out") and [row[0] for row in numbers(folder / "out")] == [2, 4, 6, 8]
    return given, folder / "out", seconds, request.param


def test_kill_9_anywhere(uninterrupted, tmp_path):
    given, whole, seconds, kind = uninterrupted
    most = seconds | {"step": seconds["step"] / 3, "checkpoint": seconds["checkpoint"] / 3, "model": 0.005,
                      "checkpoint-3": seconds["step"] / 2}
    output, log, draw, hits, resumed = tmp_path / "out", tmp_path / "log", random.Random(), [], 0
    for aim in AIMS[kind]:
        going = Run(given(output), log, LORA)
        until(lambda: going.poll() is not None or (output / aim).exists() or stage(going.text(), output) == aim,    # noqa: B023
              pause=0.002)
        time.sleep(draw.random() * most[aim])
        going.send_signal(signal.SIGKILL)
        if going.wait() == -signal.SIGKILL:
            hits.append(stage(going.text(), output))
        resumed += "going on from" in going.text()
    assert len(hits) >= len(AIMS[kind]) / 2 and resumed
    run(given(output), log, script=LORA)
    assert_same(output, whole)
    assert files(output) == files(whole)
    print(f"killed at {', '.join(hits)}")


@pytest.mark.parametrize("uninterrupted", ["text encoders"], indirect=True)
def test_asked_to_stop(uninterrupted, tmp_path):
    """By SIGTERM to a python of its own; what is forked goes on to the same end."""
    given, whole, *_ = uninterrupted
    output, log = tmp_path / "out", tmp_path / "log"
    going = launch(["train_lora_sdxl.py", *given(output)], log)
    until(lambda: going.poll() is not None or (output / "checkpoint-3" / "manifest.json").exists())
    going.send_signal(signal.SIGTERM)
    assert going.wait(120) == 0, log.read_text()
    step = max(int(path.name[11:]) for path in output.glob("checkpoint-*"))
    assert f"stopped after step {step} of {STEPS}; --resume" in log.read_text() and not (output / WEIGHTS).exists()
    assert f"going on from {output / f'checkpoint-{step}'}" in run(given(output), log, script=LORA)
    if step % 3:
        shutil.rmtree(output / f"checkpoint-{step}")    # the uninterrupted run has none at this step
    assert_same(output, whole)


def weights(output: Path) -> dict[str, torch.Tensor]:
    return {f"{name} {key}": value for name in (WEIGHTS, "checkpoint-4/adapter.safetensors")
            for key, value in load_file(output / name).items()}


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.mark.parametrize(("kind", "ways"), [
    (("--train_text_encoder", "--use_dora"), {"alone": (1, 4, 1), "two": (2, 2, 1), "accumulated": (1, 2, 2)}),
    (("--base_model_precision", "int8-torchao"), {"alone": (1, 4, 1), "two that accumulate": (2, 1, 2)})], ids=str)
def test_processes_and_accumulation_change_nothing(kind, ways, tiny_model, tiny_images, cache, tmp_path):
    """ways: processes, batch and accumulation that make a global batch of 4. The same losses, and the same adapter."""
    more = ("--rank", 4, "--learning_rate", 1e-3, "--max_train_steps", 4, "--embedding_cache_dir", cache, *kind)
    for name, (processes, batch, accumulation) in ways.items():
        given = command(tiny_model, tiny_images, tmp_path / name, batch, "--gradient_accumulation_steps", accumulation, *more)
        going = together(given, tmp_path / f"{name}.log", processes, script=LORA)
        assert [one.wait() for one in going] == [0] * processes, going[0].text() + going[-1].text()
    first, wanted = losses(tmp_path / "alone"), weights(tmp_path / "alone")
    assert len(first) == 4 and len(set(first)) == 4
    for name in ways:
        np.testing.assert_allclose(losses(tmp_path / name), first, rtol=0, atol=1e-6)
        mine = weights(tmp_path / name)
        assert mine.keys() == wanted.keys() and max((mine[key] - wanted[key]).abs().max() for key in mine) <= 1e-5

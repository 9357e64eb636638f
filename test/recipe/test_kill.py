"""Stopped anywhere, by kill -9 or kindly, and started again with the same command: the run is the uninterrupted one."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from forks import REPOSITORY, Run, flags, run, until

STEPS, PHASES = 8, ("scan", "images", "captions", "step", "checkpoint", "model", "end")
RICH = ("--max_train_steps", STEPS, "--checkpointing_steps", 3, "--logging_steps", 2, "--use_ema", "--random_flip",
        "--shuffle_caption", "--noise_offset", 0.05, "--snr_gamma", 5, "--proportion_empty_prompts", 0.2, "--lr_scheduler",
        "cosine", "--lr_warmup_steps", 2, "--save_every_n_steps", 3, "--vae_batch_size", 2, "--text_encoder_batch_size", 2,
        "--resume_from_checkpoint", "latest")
LONG = ("--max_train_steps", 20, "--checkpointing_steps", 100, "--use_ema", "--center_crop", "--resume_from_checkpoint", "latest")


def phase(text: str, output: Path) -> str:
    """What a run is (or was, when it was killed) at: by the files that are there, and by what it printed."""
    if any(output.glob(".checkpoint-*.tmp")):
        return "checkpoint"
    if (output / f"checkpoint-{STEPS}").exists():    # the final save and the report are left
        return "end"
    if any(output.glob("*/.saving.tmp")):
        return "model"
    bars = {"step": "train:", "captions": "encode captions:", "images": "encode images:", "scan": "scan:"}
    return next((name for name, bar in bars.items() if bar in text), "start")


def flat(state, name: str = "") -> dict:
    """A nested state as {path: value}."""
    if isinstance(state, (dict, list, tuple)):
        items = state.items() if isinstance(state, dict) else enumerate(state)
        return {path: leaf for key, value in items for path, leaf in flat(value, f"{name}/{key}").items()}
    return {name: state}


def files(output: Path) -> set[str]:
    found = (str(path.relative_to(output)) for path in output.rglob("*") if path.is_file())
    return {name for name in found if not name.startswith(("cache/", "logs/"))}


def assert_same(ours: Path, whole: Path, steps: int) -> None:
    """The same files; weights, EMA, optimizer state and losses bit by bit."""
    weights = [name for name in files(whole) if name.endswith(".safetensors")]
    assert {"unet/diffusion_pytorch_model.safetensors", "unet_raw/diffusion_pytorch_model.safetensors",
            f"checkpoint-{steps}/ema.safetensors"} <= set(weights)
    differ = [name for name in weights if (ours / name).read_bytes() != (whole / name).read_bytes()]
    assert not differ, f"not the same bits: {differ}"
    mine, theirs = (flat(torch.load(folder / f"checkpoint-{steps}" / "training_state.pt")) for folder in (ours, whole))
    assert mine.keys() == theirs.keys() and sum(isinstance(value, torch.Tensor) for value in mine.values()) > 100
    differ = [key for key, value in mine.items()
              if not (torch.equal(value, theirs[key]) if isinstance(value, torch.Tensor) else value == theirs[key])]
    assert not differ, f"not the same state: {differ}"
    assert numbers(ours) == numbers(whole)


def numbers(output: Path) -> list:
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [[row[name] for name in ("step", "loss", "grad_norm", "lr", "epoch")] for row in rows]


def temporary(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.name.endswith((".tmp", ".old")) or path.name.startswith(".")]


@pytest.fixture(scope="module")
def uninterrupted(tiny_model, tiny_images, tmp_path_factory):
    """The uninterrupted run's folder, and how long it was at each phase."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    going = Run(flags(tiny_model, tiny_images, folder / "out", *RICH), folder / "log", plots=True)
    seconds, last = {}, time.monotonic()
    while going.poll() is None:
        at, now = phase(going.text(), folder / "out"), time.monotonic()
        seconds[at], last = seconds.get(at, 0) + now - last, now
        time.sleep(0.001)
    assert going.wait() == 0, going.text()
    assert not temporary(folder / "out")
    assert [row[0] for row in numbers(folder / "out")] == [2, 4, 6, 8]
    return folder / "out", seconds


def test_kill_9_anywhere(uninterrupted, tiny_model, tiny_images, tmp_path):
    """At random moments of every phase. Each chain of kills has a folder and a cache of its own, and ends by itself."""
    whole, seconds = uninterrupted
    parts = {"step": STEPS / 2, "checkpoint": 3, "model": 2}    # how often a phase comes; two steps are one part
    draw, hits, chains = random.Random(), [], 0
    while chains < 2 or len(hits) < 20 or not set(PHASES) <= set(hits):
        chains += 1
        assert chains <= 8, f"some phase cannot be hit: {hits}"
        output, log = tmp_path / f"out{chains}", tmp_path / f"log{chains}"
        command = flags(tiny_model, tiny_images, output, *RICH)
        for aim in (*PHASES[:3], *draw.choices(PHASES[3:6], k=6), "end"):
            going = Run(command, log, shard_bytes=1, plots=True)
            until(lambda: phase(going.text(), output) == aim or going.poll() is not None)    # noqa: B023
            time.sleep(draw.random() * seconds[aim] / parts.get(aim, 1))
            going.send_signal(signal.SIGKILL)
            if going.wait() == -signal.SIGKILL:
                hits.append(phase(going.text(), output))
        run(command, log, plots=True)
        assert_same(output, whole, STEPS)
        strays = temporary(output)
        assert not [path for path in strays if output / "cache" not in path.parents]
        if strays or chains == 1:    # in a cache that others may share they are left for an hour
            strays += [output / "cache" / name for name in ("a.1.tmp", "latents/.tmpAbC123", "scan/b.2.tmp")]
            for path in strays:
                path.touch()
                os.utime(path, (time.time() - 7200,) * 2)
            for name in (".tmpAbC123", ".last.ckpt.tmp", ".checkpoint-7.tmp/file", "last-step00000003/.saving.tmp/file"):
                (output / name).parent.mkdir(exist_ok=True)
                (output / name).touch()
            run(command, log)
            assert not temporary(output)
            assert_same(output, whole, STEPS)
        assert files(output) == files(whole)
    print(f"{len(hits)} kills in {chains} chains: {({name: hits.count(name) for name in sorted(set(hits))})}")


@pytest.fixture(scope="module")
def long(tiny_model, tiny_images, tmp_path_factory):
    """(flags of a run that is long enough to be stopped kindly, its uninterrupted folder)."""
    folder = tmp_path_factory.mktemp("long")
    more = (*LONG, "--embedding_cache_dir", folder / "cache")
    run(flags(tiny_model, tiny_images, folder / "out", *more), folder / "log")
    return (lambda output: flags(tiny_model, tiny_images, output, *more)), folder / "out"


def launch(command: list[str], log: Path) -> subprocess.Popen:
    """Python with this command in the repository, its output in `log`."""
    with log.open("w") as file:
        return subprocess.Popen([sys.executable, *command], cwd=REPOSITORY, stdout=file, stderr=subprocess.STDOUT,
                                env={**os.environ, "OMP_NUM_THREADS": "1"})


@pytest.mark.parametrize("how", ["SIGINT", "SIGTERM to python", "SIGTERM to accelerate launch"])
def test_asked_to_stop(long, how, tmp_path):
    """The step is finished, a checkpoint saved, the status is 0; then the same command goes on to the same end.

    `accelerate launch` dies of SIGTERM without passing it on: its orphan sees that, and stops as well.
    """
    command, whole = long
    output, log = tmp_path / "out", tmp_path / "log"
    if how == "SIGINT":
        going = Run(command(output), log)
    else:
        accelerate = ["-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1", "--num_machines", "1",
                      "--mixed_precision", "no", "--dynamo_backend", "no", "--num_cpu_threads_per_process", "1"]
        going = launch([*(accelerate if "accelerate" in how else []), "train_sdxl.py", *command(output)], log)
    until(lambda: going.poll() is not None or (output / "metrics.jsonl").exists() and len(numbers(output)) > 2)
    going.send_signal(signal.SIGINT if how == "SIGINT" else signal.SIGTERM)
    assert going.wait(120) == (-signal.SIGTERM if "accelerate" in how else 0), log.read_text()
    text = until(lambda: log.read_text() if "stopped after step" in log.read_text() else "")
    (saved,) = output.glob("checkpoint-*")
    step = int(saved.name.partition("-")[2])
    assert 3 <= step < 20 and len(numbers(output)) == step
    assert f"stopped after step {step} of 20; --resume_from_checkpoint latest goes on from there" in text
    assert "Traceback" not in text
    assert not (output / "model_index.json").exists()
    assert f"going on from {saved}" in run(command(output), log)
    shutil.rmtree(saved)    # the uninterrupted run has none at this step
    assert_same(output, whole, 20)
    assert files(output) == files(whole)


def test_interrupted_while_caching(uninterrupted, tiny_model, tiny_images, tmp_path):
    """Ctrl-C before the first step: one line, and what is encoded already is kept."""
    output = tmp_path / "out"
    going = Run(flags(tiny_model, tiny_images, output, *RICH), tmp_path / "log")
    until(lambda: phase(going.text(), output) == "captions")
    going.send_signal(signal.SIGINT)
    assert going.wait() == 130
    assert going.text().splitlines()[-1] == "train_sdxl.py: interrupted" and "Traceback" not in going.text()
    assert len(list(output.glob("cache/latents/*.safetensors"))) == 1 and not temporary(output)

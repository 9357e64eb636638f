"""One run, spread differently: over processes, accumulation, worker threads, or without caches. It stays the same run."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tiny
import torch
from forks import REPOSITORY, flags, free_port, run, together, until
from safetensors.torch import load_file

from library.data import prepare
from library.data.cache import Store
from library.data.loader import Loader
from library.data.sampler import Sampler
from library.training import processes

COMMON = ("--max_train_steps", 6, "--checkpointing_steps", 3, "--use_ema", "--enable_bucket", "--min_bucket_reso", 32,
          "--max_bucket_reso", 128, "--bucket_reso_steps", 32, "--random_flip", "--shuffle_caption", "--proportion_empty_prompts",
          0.2, "--noise_offset", 0.05, "--adam_epsilon", 1e-6)    # at 1e-8 AdamW makes steps of mere rounding


def command(model, images, output: Path, batch: int, *more) -> list[str]:
    return flags(model, images, output, *COMMON, "--train_batch_size", batch, *more)


def losses(output: Path) -> np.ndarray:
    return np.array([json.loads(line)["loss"] for line in (output / "metrics.jsonl").read_text().splitlines()])


def weights(output: Path) -> dict[str, torch.Tensor]:
    return {f"{name} {key}": value for name in ("unet", "unet_raw")
            for key, value in load_file(output / name / "diffusion_pytorch_model.safetensors").items()}


def assert_close(ours: Path, reference: Path, loss: float = 1e-6, weight: float = 1e-5) -> None:
    assert len(losses(ours)) == len(losses(reference))
    np.testing.assert_allclose(losses(ours), losses(reference), rtol=0, atol=loss)
    mine, theirs = weights(ours), weights(reference)
    assert mine.keys() == theirs.keys()
    assert max((mine[key] - theirs[key]).abs().max() for key in mine) <= weight


def assert_equal(ours: Path, reference: Path) -> None:
    assert_close(ours, reference, loss=0, weight=0)


@pytest.fixture(scope="module")
def alone(tiny_model, tiny_images, tmp_path_factory):
    """The run by one process in batches of 4."""
    output = tmp_path_factory.mktemp("alone") / "out"
    run(command(tiny_model, tiny_images, output, 4), output.with_name("log"))
    return output


@pytest.fixture(scope="module")
def launched(tiny_model, tiny_images, tmp_path_factory):
    """The run by two processes in batches of 2, with a cache of their own, as a user starts it."""
    output = tmp_path_factory.mktemp("launched") / "out"
    launcher = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1",
                "--mixed_precision", "no", "--dynamo_backend", "no", "--num_cpu_threads_per_process", "1",
                "--main_process_port", str(free_port())]
    done = subprocess.run([sys.executable, *launcher, "train_sdxl.py", *command(tiny_model, tiny_images, output, 2)],
                          cwd=REPOSITORY, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("4 a step; 6 steps") == 1, "the main process alone speaks; the global batch is that of one process"
    return output


@pytest.fixture
def shared(alone):
    return "--embedding_cache_dir", alone / "cache"


def dealt(sampler: Sampler, step: int, accumulation: int, world: int) -> tuple[list[int], list[int]]:
    """Rows and visits of a step, micro step by micro step, process by process."""
    args = SimpleNamespace(gradient_accumulation_steps=accumulation, dataloader_num_workers=0, image_interpolation_mode="box")
    parts = []
    for micro in range(accumulation):
        for rank in range(world):
            place = SimpleNamespace(process_index=rank, num_processes=world, device=torch.device("cpu"))
            parts.append(Loader(SimpleNamespace(table=None), sampler, None, None, args, 0, place).samples(step, micro)[:2])
    assert {len(rows) for rows, _ in parts} == {sampler.batch_sizes[0] // (accumulation * world)}
    return tuple(np.concatenate(column).tolist() for column in zip(*parts, strict=True))


def test_a_step_has_the_same_samples_however_it_is_dealt():
    sampler = Sampler(np.repeat([0, 1, 2], [7, 30, 13]), 5, 8)
    for step in range(40):
        whole = dealt(sampler, step, 1, 1)
        assert len(whole[0]) == 8
        for accumulation, world in ((1, 2), (2, 1), (2, 2), (1, 8), (4, 2), (8, 1)):
            assert dealt(sampler, step, accumulation, world) == whole


def test_two_processes_are_one(alone, launched):
    assert_close(launched, alone)


def test_two_processes_encode_what_one_encodes(alone, launched):
    for kind, fields in (("latents", ["moments"]), ("prompts", ["hidden", "pooled"])):
        ours, theirs = (Store(output / "cache" / kind) for output in (launched, alone))
        assert len(ours._keys) > 8 and ours._keys.tolist() == theirs._keys.tolist()
        assert len(list(ours.folder.glob("*.safetensors"))) == 2, "each process writes its own share"
        for key in ours._keys:
            assert all(torch.equal(ours.read(key, field), theirs.read(key, field)) for field in fields)


def test_processes_agree_on_what_is_missing(tmp_path, monkeypatch):
    """Another run may fill the cache while they look: one that sees all there encodes its share of what others miss."""
    store, prompts = Store(tmp_path), [f"prompt {number}" for number in range(8)]
    encoded = []

    def encode(texts):
        encoded.append(texts)
        return {"hidden": torch.zeros(len(texts), 1)}

    prepare.cache_prompts(prompts, store, "recipe", 2, lambda: encode)
    assert sum(encoded, []) == prompts
    encoded.clear()
    store.team = [0, 1]
    monkeypatch.setattr(processes, "gather", lambda values: values + [~seen for seen in values])
    prepare.cache_prompts(prompts, store, "recipe", 2, lambda: encode)
    assert encoded == [prompts[0:2], prompts[4:6]]


def test_accumulation_is_a_larger_batch(alone, shared, tiny_model, tiny_images, tmp_path):
    run(command(tiny_model, tiny_images, tmp_path / "out", 2, "--gradient_accumulation_steps", 2, *shared), tmp_path / "log")
    assert_close(tmp_path / "out", alone)


def test_accumulation_by_two_processes(alone, shared, tiny_model, tiny_images, tmp_path):
    going = together(command(tiny_model, tiny_images, tmp_path / "out", 1, "--gradient_accumulation_steps", 2, *shared),
                     tmp_path / "log", 2)
    assert [one.wait() for one in going] == [0, 0], going[0].text() + going[1].text()
    assert going[1].text() == ""
    assert_close(tmp_path / "out", alone)


def test_two_processes_go_on_as_one_and_one_as_two(alone, launched, shared, tiny_model, tiny_images, tmp_path):
    for made, batch in ((launched, 4), (alone, 2)):
        output = tmp_path / f"batch{batch}"
        shutil.copytree(made / "checkpoint-3", output / "checkpoint-3")
        shutil.copy(made / "metrics.jsonl", output)
        more = command(tiny_model, tiny_images, output, batch, "--resume_from_checkpoint", "latest", *shared)
        going = together(more, output / "log", 4 // batch)
        assert [one.wait() for one in going] == [0] * (4 // batch), going[0].text()
        assert "going on from" in going[0].text() and "is now" not in going[0].text()
        assert_close(output, alone)


def test_worker_threads_change_no_bit(alone, shared, tiny_model, tiny_images, tmp_path):
    for name, more in (("cached", ()), ("not cached", ("--cache_latents=false", "--cache_text_encoder_outputs=false"))):
        for workers in (0, 2):
            output = tmp_path / name / str(workers)
            output.parent.mkdir(exist_ok=True)
            place = shared if name == "cached" else ()
            run(command(tiny_model, tiny_images, output, 4, "--dataloader_num_workers", workers, *more, *place), tmp_path / "log")
        assert_equal(tmp_path / name / "2", tmp_path / name / "0")
    assert_equal(tmp_path / "cached" / "2", alone)
    assert_close(tmp_path / "not cached" / "2", alone, loss=1e-5, weight=1e-4)
    assert not (tmp_path / "not cached" / "2" / "cache" / "latents").exists(), "it was cached after all"


def test_one_process_of_two_is_asked_to_stop(tiny_model, tiny_images, tmp_path, shared):
    """Both stop after the same step with status 0; then both go on, to the bits of two that were not stopped."""
    for name in ("whole", "stopped"):
        more = command(tiny_model, tiny_images, tmp_path / name, 2, *shared, "--max_train_steps", 16, "--checkpointing_steps", 99,
                       "--resume_from_checkpoint", "latest")
        going = together(more, tmp_path / name, 2)
        if name == "stopped":
            until(lambda: (tmp_path / "stopped" / "metrics.jsonl").exists() and len(losses(tmp_path / "stopped")) > 1)
            going[1].send_signal(signal.SIGTERM)
        assert [one.wait() for one in going] == [0, 0], going[0].text() + going[1].text()
    (saved,) = (tmp_path / "stopped").glob("checkpoint-*")
    assert f"stopped after step {saved.name[11:]} of 16" in going[0].text() and 2 <= int(saved.name[11:]) < 16
    assert len(losses(tmp_path / "stopped")) == int(saved.name[11:])
    assert [one.wait() for one in together(more, tmp_path / name, 2)] == [0, 0]
    assert_equal(tmp_path / "stopped", tmp_path / "whole")


def test_torch_run_is_asked_to_stop(tiny_model, tiny_images, tmp_path, shared):
    """The launcher passes SIGTERM on and then ends on its own status, 1; the run has stopped whole all the same."""
    output, log = tmp_path / "out", tmp_path / "log"
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", str(free_port())]
    more = command(tiny_model, tiny_images, output, 2, *shared, "--max_train_steps", 30, "--checkpointing_steps", 99)
    with log.open("w") as file:
        going = subprocess.Popen([sys.executable, *launcher, "train_sdxl.py", *more], cwd=REPOSITORY, stdout=file,
                                 stderr=subprocess.STDOUT, env={**os.environ, "OMP_NUM_THREADS": "1"})
    until(lambda: going.poll() is not None or (output / "metrics.jsonl").exists() and len(losses(output)) > 1)
    going.terminate()
    assert going.wait(120) == 1
    stopped = re.search(r"stopped after step (\d+) of 30", log.read_text())
    assert stopped and (output / f"checkpoint-{stopped[1]}" / "manifest.json").exists()


def test_evaluation_that_falls_to_one_process_more_often(tiny_model, tiny_images, tmp_path):
    """One held-out image, two processes, and text encoders that are trained: the other process calls none of them."""
    held_out, config = tiny.make_images(tmp_path / "held out", [(64, 64)]), tmp_path / "sets.json"
    common = {"type": "local", "caption_strategy": "textfile", "crop": True, "resolution": 64, "resolution_type": "pixel"}
    config.write_text(json.dumps([{"id": "images", "instance_data_dir": str(tiny_images), **common},
                                  {"id": "unseen", "dataset_type": "eval", "instance_data_dir": str(held_out), **common}]))
    output = tmp_path / "out"
    given = flags(tiny_model, "none", output, "--data_backend_config", config, "--train_batch_size", 1, "--max_train_steps", 3,
                  "--train_text_encoder", "--eval_steps_interval", 1, "--eval_timesteps", 2, "--rank_timeout", 20)
    place = given.index("--train_data_dir")
    both = together(given[:place] + given[place + 2:], tmp_path / "log", 2)
    assert [each.wait() for each in both] == [0, 0], both[0].text() + both[1].text()
    assert [json.loads(line)["step"] for line in (output / "evaluation.jsonl").read_text().splitlines()] == [1, 2, 3]

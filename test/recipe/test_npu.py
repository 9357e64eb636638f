"""Whole scripts on the stand-in for an Ascend NPU (test/npu_sim): fused attention, restarts, two processes, the CPU's losses.

The stand-in is loaded with torch, so all runs of one kind share a process that has it. What it cannot show is in its README:
kernels, numerics, speed and memory of the device.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from forks import free_port
from safetensors.torch import load_file

REPOSITORY = Path(__file__).resolve().parents[2]
STAND_IN = REPOSITORY / "test" / "npu_sim"
SCRIPTS = {"train_sdxl": 22, "train_lora_sdxl": 22, "train_sd3": 5, "train_lora_sd3": 5}    # and their attention layers
BUCKETS = ("--enable_bucket", "--min_bucket_reso", 32, "--max_bucket_reso", 128, "--bucket_reso_steps", 32)
# what is special on each: an average and text encoders in the step, dropout from the device's generator
OWN = {"train_sdxl": ("--use_ema", "--gradient_checkpointing", "--train_text_encoder"), "train_lora_sdxl": ("--rank", 4),
       "train_sd3": ("--spike_guard", "skip"), "train_lora_sd3": ("--rank", 4, "--lora_dropout", 0.2)}
FUSED = ("--attention_mechanism", "npu")
DRAWN = ("--validation_prompt", "a cat", "--num_validation_images", 1, "--validation_steps", 3,
         "--validation_num_inference_steps", 1, "--validation_guidance", 1)


def environment(**more) -> dict[str, str]:
    if not shutil.which(os.environ.get("CXX", "g++")):
        pytest.fail("the stand-in for an NPU is built with g++, and there is none: apt-get install g++")
    path = os.pathsep.join(map(str, (STAND_IN, REPOSITORY, REPOSITORY / "test")))
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **more}


def start(plan: Path, runs: list[dict], checks: bool = False, processes: int = 1) -> list[dict]:
    """Run them in one process (or some, by accelerate launch) with the stand-in -> what runs.py found, of each process."""
    plan.write_text(json.dumps({"runs": runs, "checks": checks}))
    launch = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", str(processes), "--num_machines", "1",
              "--mixed_precision", "bf16", "--dynamo_backend", "no", "--num_cpu_threads_per_process", "1", "--main_process_port",
              str(free_port())] if processes > 1 else []
    done = subprocess.run([sys.executable, *launch, str(STAND_IN / "runs.py"), str(plan)], cwd=plan.parent, text=True,
                          env=environment(NPU_SIM_DEVICES=str(processes)), capture_output=True, timeout=500)
    assert done.returncode == 0, done.stderr[-5000:]
    return [json.loads(plan.with_suffix(f".{rank}.json").read_text()) for rank in range(processes)]


@pytest.fixture(scope="module")
def place(tiny_model, tiny_images, tmp_path_factory):
    """A folder for the runs, and the base model of each family."""
    folder = tmp_path_factory.mktemp("npu")
    return folder, {"sdxl": tiny_model, "sd3": tiny.make_sd3(folder / "sd3", "3.5-medium")}, tiny_images


def run_of(place, name: str, script: str, *more, batch: int = 2, resume: bool = False, **env) -> dict:
    """One entry of a plan: three steps in bf16, a checkpoint after the second."""
    folder, models, images = place
    family = "sd3" if "sd3" in script else "sdxl"
    cache = folder / ("cpu" if env.get("ACCELERATE_USE_CPU") else "npu") / family
    flags = ["--pretrained_model_name_or_path", models[family], "--train_data_dir", images, "--output_dir", folder / name,
             "--embedding_cache_dir", cache, "--resolution", 64, *BUCKETS, "--train_batch_size", batch, "--max_train_steps", 3,
             "--checkpointing_steps", 2, "--seed", 1, "--report_to", "none", "--logging_steps", 1, "--mixed_precision", "bf16",
             *OWN[script], *more] + ["--resume_from_checkpoint", "checkpoint-2"] * resume
    return {"name": name, "script": script, "flags": [str(flag) for flag in flags], "env": env}


@pytest.fixture(scope="module")
def alone(place):
    """One process: checks of the stand-in, each script on it and on the CPU beside it, and one in fp16."""
    runs = [run_of(place, f"npu {script}", script, *FUSED, *DRAWN * (script == "train_lora_sdxl")) for script in SCRIPTS]
    runs += [run_of(place, f"cpu {script}", script, ACCELERATE_USE_CPU="true") for script in SCRIPTS]
    runs.append(run_of(place, "fp16", "train_lora_sd3", *FUSED, "--mixed_precision", "fp16"))
    return start(place[0] / "alone", runs, checks=True)[0]


@pytest.fixture(scope="module")
def resumed(place, alone):
    """The second checkpoint of each script in a folder of its own, from where a fresh process goes on."""
    folder = place[0]
    for script in SCRIPTS:
        shutil.copytree(folder / f"npu {script}" / "checkpoint-2", folder / f"again {script}" / "checkpoint-2")
        shutil.copy(folder / f"npu {script}" / "metrics.jsonl", folder / f"again {script}")
    return start(folder / "resumed", [run_of(place, f"again {script}", script, *FUSED, resume=True) for script in SCRIPTS])[0]


@pytest.fixture(scope="module")
def together(place, alone):
    """Two processes in batches of 1."""
    runs = [run_of(place, f"two {script}", script, *FUSED, batch=1) for script in SCRIPTS]
    return start(place[0] / "together", runs, processes=2)


def losses(folder: Path) -> np.ndarray:
    return np.array([json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()])


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """All that a run wrote for use, and its last checkpoint's state."""
    found = {f"{path.relative_to(folder)} {key}": value for path in sorted(folder.rglob("*.safetensors"))
             if "checkpoint-2" not in path.parts for key, value in load_file(path).items()}
    state = torch.load(folder / "checkpoint-3" / "training_state.pt", map_location="cpu", weights_only=True)["optimizer"]["state"]
    return found | {f"{number} {name}": value for number, moments in state.items() for name, value in moments.items()}


def whole(results: dict, name: str) -> dict:
    assert isinstance(results[name], dict), results[name]
    return results[name]


@pytest.mark.parametrize("check", [
    "layers_and_the_optimizer_agree_with_the_host", "norms_of_tensors_in_channels_last", "devices_are_not_mixed",
    "layouts_of_fused_attention", "fused_attention_refuses_what_the_real_one_does", "every_length_and_mask_is_fused",
    "random_states_and_files", "settings_of_the_process", "what_an_npu_has_not_is_refused"])
def test_the_stand_in(alone, check):
    assert alone[check] is None, alone[check]


@pytest.mark.parametrize("script", SCRIPTS)
def test_fused_attention_in_every_layer_of_every_step(alone, script):
    found, layers = whole(alone, f"npu {script}"), SCRIPTS[script]
    passes = {"train_sdxl": 6, "train_lora_sdxl": 4}.get(script, 3)    # checkpointing does all twice; validation is one more
    assert found["fused"] == 1 + passes * layers    # what it is tried with at the start
    assert found["types"] == ["torch.bfloat16"] and found["device"].startswith("npu")
    assert any(length % 256 for length in found["lengths"])


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_losses_are_those_of_a_cpu(place, alone, script):
    """Near, and for SDXL never equal: diffusers' GEGLU on an NPU is the tanh approximation."""
    assert whole(alone, f"cpu {script}")["device"] == "cpu" and alone[f"cpu {script}"]["fused"] == 0
    ours, theirs = losses(place[0] / f"npu {script}"), losses(place[0] / f"cpu {script}")
    assert len(ours) == 3 and len(set(theirs)) == 3
    np.testing.assert_allclose(ours, theirs, rtol=1e-3)
    before, after = (weights(place[0] / f"{kind} {script}") for kind in ("cpu", "npu"))
    assert before.keys() == after.keys()


def test_a_cpu_beside_an_npu_is_a_cpu(place, alone, train):
    """diffusers calls operators of torch_npu wherever it is installed, on a CPU, too; that is turned off."""
    flags = run_of(place, "cpu train_sdxl", "train_sdxl")["flags"]
    out = train(*flags, "--output_dir", place[0] / "plain")
    assert losses(out).tolist() == losses(place[0] / "cpu train_sdxl").tolist()


def test_fp16(place, alone):
    assert whole(alone, "fp16")["types"] == ["torch.float16"]
    state = torch.load(place[0] / "fp16" / "checkpoint-3" / "training_state.pt", map_location="cpu", weights_only=True)
    assert state["scaler"]["scale"] > 0
    np.testing.assert_allclose(losses(place[0] / "fp16"), losses(place[0] / "npu train_lora_sd3"), rtol=1e-2)


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_restart_is_exact(place, resumed, script):
    assert whole(resumed, f"again {script}")["fused"] < 1 + 3 * SCRIPTS[script]    # one step was left, not three
    ours, theirs = (place[0] / f"{kind} {script}" for kind in ("again", "npu"))
    assert losses(ours).tolist() == losses(theirs).tolist()
    mine, wanted = weights(ours), weights(theirs)
    assert mine.keys() == wanted.keys() and all(torch.equal(mine[key], wanted[key]) for key in wanted)


@pytest.mark.parametrize("script", SCRIPTS)
def test_two_processes(place, alone, together, script):
    for rank, results in enumerate(together):
        found = whole(results, f"two {script}")
        assert (found["device"], found["backend"]) == (f"npu:{rank}", "hccl")
        assert found["fused"] >= 1 + 3 * SCRIPTS[script] and found["types"] == ["torch.bfloat16"]
    tolerance = 2e-2 if "--lora_dropout" in OWN[script] else 2e-3    # each process draws its own
    np.testing.assert_allclose(losses(place[0] / f"two {script}"), losses(place[0] / f"npu {script}"), rtol=tolerance)


def test_a_torch_npu_that_cannot_be_loaded_is_told_in_one_sentence(tmp_path):
    (tmp_path / "torch_npu").mkdir()
    (tmp_path / "torch_npu" / "__init__.py").write_text(
        "def _autoload():\n    raise ImportError('libhccl.so: cannot open shared object file')\n")
    shutil.copytree(STAND_IN / "torch_npu-2.13.0.dist-info", tmp_path / "torch_npu-2.13.0.dist-info")
    done = subprocess.run([sys.executable, "train_sdxl.py", "--pretrained_model_name_or_path", "m", "--train_data_dir", "d"],
                          cwd=REPOSITORY, env={**os.environ, "PYTHONPATH": str(tmp_path)}, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "Traceback" not in done.stderr
    assert "train_sdxl.py: error: PyTorch: Failed to load the backend extension: torch_npu (libhccl.so" in done.stderr
    assert "`source set_env.sh` of CANN first" in done.stderr

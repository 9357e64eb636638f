"""One run by every engine: DDP, ZeRO-1 by torch and by fairscale, FSDP2. One course of losses, and checkpoints for all."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from forks import REPOSITORY, flags, free_port, run, together
from safetensors.torch import load_file

from library.errors import UserError
from library.training import optimizers, sharding

STEPS = 20
COMMON = ("--max_train_steps", STEPS, "--checkpointing_steps", 10, "--use_ema", "--adam_epsilon", 1e-6)
FSDP2 = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
         "FSDP_RESHARD_AFTER_FORWARD": "true", "FSDP_CPU_RAM_EFFICIENT_LOADING": "false"}


def command(model, images, output: Path, cache: Path, batch: int, *more) -> list[str]:
    return flags(model, images, output, *COMMON, "--embedding_cache_dir", cache, "--train_batch_size", batch, *more)


def losses(output: Path, name: str = "loss") -> np.ndarray:
    return np.array([json.loads(line)[name] for line in (output / "metrics.jsonl").read_text().splitlines()])


def state(output: Path, step: int) -> dict:
    return torch.load(output / f"checkpoint-{step}" / "training_state.pt", map_location="cpu", weights_only=True)


def assert_close(ours: Path, reference: Path, step: int | None = None, atol: float = 1e-5) -> None:
    """Losses of all steps, and moments, average and weights of the checkpoint at `step`."""
    assert len(losses(ours)) == STEPS
    np.testing.assert_allclose(losses(ours, "grad_norm"), losses(reference, "grad_norm"), rtol=1e-4)    # which AdamW forgives
    np.testing.assert_allclose(losses(ours), losses(reference), rtol=0, atol=atol)
    if step is None:
        return
    mine, theirs = state(ours, step), state(reference, step)
    assert mine["lr_schedule"] == theirs["lr_schedule"]
    mine, theirs = mine["optimizer"], theirs["optimizer"]
    assert mine["param_groups"] == theirs["param_groups"]
    mine, theirs = mine["state"], theirs["state"]
    assert mine.keys() == theirs.keys() and len(theirs) > 10
    for number, moments in theirs.items():
        assert mine[number].keys() == moments.keys() and float(mine[number]["step"]) == float(moments["step"]) == step
        for name in ("exp_avg", "exp_avg_sq"):
            torch.testing.assert_close(mine[number][name], moments[name], rtol=1e-3, atol=1e-6 if atol else 0)
    for file in (reference / f"checkpoint-{step}").rglob("*.safetensors"):
        ours_too = load_file(ours / file.relative_to(reference))
        for name, value in load_file(file).items():
            torch.testing.assert_close(ours_too[name], value, rtol=0, atol=10 * atol)


@pytest.fixture(scope="module")
def alone(tiny_model, tiny_images, tmp_path_factory):
    """The run by one process, which has asked for sharding, and nobody to share with."""
    output = tmp_path_factory.mktemp("alone") / "out"
    said = run(command(tiny_model, tiny_images, output, output / "cache", 4, "--optimizer_sharding", "zero1"),
               output.with_name("log"))
    assert said.count("one process has nobody to share the optimizer's state with") == 1
    return output


@pytest.mark.parametrize("engine", ["--optimizer_sharding=zero1", "--optimizer_type=oss", "--optimizer_sharding=none"])
def test_two_processes_make_the_losses_and_the_checkpoints_of_one(engine, alone, tiny_model, tiny_images, tmp_path):
    going = together(command(tiny_model, tiny_images, tmp_path / "out", alone / "cache", 2, engine), tmp_path / "log", 2)
    assert [one.wait() for one in going] == [0, 0], going[0].text() + going[1].text()
    assert_close(tmp_path / "out", alone, 10)


def test_four_go_on_as_two_and_two_as_one_each_by_another_engine(alone, tiny_model, tiny_images, tmp_path):
    for world, until, more in ((4, 7, ("--optimizer_sharding", "zero1")), (2, 14, ("--optimizer_type", "oss")), (1, STEPS, ())):
        line = command(tiny_model, tiny_images, tmp_path / "out", alone / "cache", 4 // world, "--max_train_steps", until,
                       "--resume_from_checkpoint", "latest", *more)
        going = together(line, tmp_path / f"log{world}", world)
        assert [one.wait() for one in going] == [0] * world, going[0].text()
        assert ("going on from" in going[0].text()) == (world < 4)
    assert_close(tmp_path / "out", alone)
    shutil.copytree(tmp_path / "out" / f"checkpoint-{STEPS}", tmp_path / "end" / f"checkpoint-{STEPS}")
    shutil.copy(tmp_path / "out" / "metrics.jsonl", tmp_path / "end")
    assert_close(tmp_path / "end", alone, STEPS)


def launch(runs: list[dict], folder: Path, **environment) -> str:
    """Runs one after another in two processes that `accelerate launch` starts -> what they said."""
    (folder / "runs.json").write_text(json.dumps(runs))
    launcher = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1",
                "--mixed_precision", "no", "--dynamo_backend", "no", "--num_cpu_threads_per_process", "1",
                "--main_process_port", str(free_port())]
    done = subprocess.run([sys.executable, *launcher, "test/several.py", str(folder / "runs.json")], cwd=REPOSITORY, text=True,
                          capture_output=True, env={**os.environ, "OMP_NUM_THREADS": "1", **environment})
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    return done.stdout


def test_fsdp2_on_the_stand_in(tiny_images, tmp_path_factory, tmp_path):
    """FSDP2 makes what DDP makes, on two stand-ins for an NPU; gone on with, bit by bit what it made in one go."""
    import tiny
    model, cache = tiny.make_sd3(tmp_path_factory.mktemp("sd3")), tmp_path / "cache"
    drawn = ("--validation_prompt", "a cat", "--num_validation_images", 1, "--validation_num_inference_steps", 1,
             "--validation_steps", STEPS)
    few = ("--rank", 4, "--max_train_steps", 3, "--learning_rate", 1e-2)

    def planned(name: str, script: str, env: dict, *more) -> dict:
        line = command(model, tiny_images, tmp_path / name, cache, 2, "--checkpointing_steps", 5, *more)
        return {"script": script, "flags": line, "env": env}

    resumed = ("--max_train_steps", 15, "--resume_from_checkpoint", tmp_path / "fsdp2/checkpoint-10")
    launch([planned("ddp", "train_sd3", {}), planned("fsdp2", "train_sd3", FSDP2, *drawn),
            planned("again", "train_sd3", FSDP2, *resumed), planned("lora_ddp", "train_lora_sd3", {}, *few),
            planned("lora_fsdp2", "train_lora_sd3", FSDP2, *few)],
           tmp_path, PYTHONPATH=str(REPOSITORY / "test" / "npu_sim"), NPU_SIM_DEVICES="2")
    assert_close(tmp_path / "fsdp2", tmp_path / "ddp", 10)
    assert list((tmp_path / "fsdp2" / "validation").rglob("*.png")) and (tmp_path / "fsdp2" / "transformer_raw").is_dir()
    np.testing.assert_array_equal(losses(tmp_path / "again"), losses(tmp_path / "fsdp2")[10:15])
    assert_same_files(tmp_path / "again", tmp_path / "fsdp2", 15)

    np.testing.assert_allclose(losses(tmp_path / "lora_fsdp2"), losses(tmp_path / "lora_ddp"), rtol=0, atol=1e-5)
    ours, theirs = (load_file(tmp_path / name / "pytorch_lora_weights.safetensors") for name in ("lora_fsdp2", "lora_ddp"))
    assert ours.keys() == theirs.keys() and any(value.abs().max() > 1e-3 for name, value in ours.items() if "lora_B" in name)
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, rtol=0, atol=1e-4)


def assert_same_files(ours: Path, reference: Path, step: int) -> None:
    """Every tensor of a checkpoint, bit by bit."""
    for file in (reference / f"checkpoint-{step}").rglob("*.safetensors"):
        mine, theirs = load_file(ours / file.relative_to(reference)), load_file(file)
        assert mine.keys() == theirs.keys() and all(torch.equal(mine[key], value) for key, value in theirs.items()), file
    mine, theirs = (state(output, step)["optimizer"]["state"] for output in (ours, reference))
    assert all(torch.equal(mine[number][key], value) for number, moments in theirs.items() for key, value in moments.items())


def test_what_is_shared_out_is_a_share_and_comes_back_whole():
    """Gradients are DDP's, a process holds its part of the moments, a saved state is that of one process; see shares.py."""
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", str(free_port()), "test/shares.py"]
    done = subprocess.run([sys.executable, *launcher], cwd=REPOSITORY, text=True, capture_output=True,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert "all is well" in done.stdout, done.stdout[-2000:] + done.stderr[-6000:]


@pytest.mark.parametrize("path", sorted((REPOSITORY / "config" / "accelerate").glob("*.yaml")), ids=lambda path: path.stem)
def test_accelerate_reads_its_configs(path):
    import yaml
    from accelerate.commands.config.config_args import load_config_from_file
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    config = load_config_from_file(str(path))    # refuses a key that it does not know
    number, words = re.search(r"_(\d)$", path.stem), yaml.safe_load(path.read_text())
    assert config.num_processes == (int(number[1]) if number else {"cpu": 1, "multi_node": 16}.get(path.stem, 8))
    assert config.use_cpu == (path.stem == "cpu") and "gradient_accumulation_steps" not in words.get("deepspeed_config", {})
    args, *_ = _validate_launch_command(launch_command_parser().parse_args(["--config_file", str(path), "train_sdxl.py"]))
    kinds = {"fsdp2": "use_fsdp", "deepspeed_zero2": "use_deepspeed", "deepspeed_zero3_offload": "use_deepspeed",
             "ddp_8": "multi_gpu", "npu_8": "multi_gpu", "multi_node": "multi_gpu"}
    for kind in set(kinds.values()):
        assert bool(getattr(args, kind)) == (kinds.get(path.stem) == kind), kind


@pytest.mark.parametrize(("env", "given", "more", "said"), [
    ({"ACCELERATE_USE_FSDP": "true"}, {}, (), "asks for FSDP, which accelerate leaves out on a CPU"),
    ({"ACCELERATE_USE_DEEPSPEED": "true"}, {}, (), "asks for DEEPSPEED, which accelerate leaves out on a CPU"),
    ({"ACCELERATE_USE_MEGATRON_LM": "true"}, {}, (), "Megatron-LM"),
    ({}, {"fsdp_version": 1}, (), "fsdp_version: 2"),
    ({}, {"activation_checkpointing": True}, (), "--gradient_checkpointing"),
    ({}, {"cpu_ram_efficient_loading": True}, (), "fsdp_cpu_ram_efficient_loading"),
    ({}, {"offload": True}, ("--optimizer", "muon"), "--optimizer muon cannot step on FSDP's shares"),
    ({}, {"offload": True}, ("--use_8bit_adam",), "--use_8bit_adam cannot step on FSDP's shares"),
    ({}, {"offload": True}, ("--train_text_encoder",), "takes one network"),
    ({}, {"offload": True}, ("--optimizer_type", "oss"), "is for DDP"),
    ({}, {"offload": True}, ("--optimizer_sharding", "zero1"), "is for DDP"),
    ({}, {"offload": True}, ("--gradient_accumulation_steps", "2"), "sets gradient_accumulation_steps to 1")])
def test_what_was_asked_and_what_came_are_compared(env, given, more, said, parse, monkeypatch):
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    usual = {"fsdp_version": 2, "activation_checkpointing": False, "cpu_ram_efficient_loading": False}
    accelerator = SimpleNamespace(
        distributed_type=SimpleNamespace(value="FSDP" if given else "NO"), device=torch.device("cpu"), num_processes=2,
        mixed_precision="no", gradient_accumulation_steps=1, state=SimpleNamespace(fsdp_plugin=SimpleNamespace(**usual | given)))
    with pytest.raises(UserError, match=re.escape(said)):
        sharding.check(accelerator, parse(*more))
    if given:
        accelerator.state.fsdp_plugin = SimpleNamespace(**usual)
        sharding.check(accelerator, parse())


@pytest.mark.parametrize("name", [name for name in optimizers.TABLE if name.startswith((*optimizers.WHOLE, "ao-"))])
def test_what_cannot_be_shared_out_is_refused_by_name(name, parse):
    with pytest.raises(UserError, match=f"--optimizer_sharding zero1: {name} "):
        optimizers.check_optimizer(parse("--optimizer_sharding", "zero1", "--optimizer", name), "cpu")

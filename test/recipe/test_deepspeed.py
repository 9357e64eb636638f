"""DeepSpeed on two stand-ins for an NPU, as accelerate's config launches it: DDP's losses, checkpoints for every engine."""

import contextlib
import importlib.util
import json
import os
import re
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from forks import REPOSITORY, flags, free_port
from PIL import Image
from safetensors.torch import load_file

from library.errors import UserError
from library.training import deepspeed_engine

STEPS, HALF = 4, 2
ZERO3 = {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"},
                               "stage3_param_persistence_threshold": 1000, "sub_group_size": 100000}}    # few stay whole
ZERO3 |= dict.fromkeys(("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"), "auto")


def losses(output, name: str = "loss", file: str = "metrics.jsonl") -> np.ndarray:
    return np.array([json.loads(line)[name] for line in (output / file).read_text().splitlines()])


def assert_alike(ours, theirs, step: int, atol: float) -> None:
    """Every tensor of a checkpoint, its moments, settings and counts."""
    mine, other = (torch.load(output / f"checkpoint-{step}" / "training_state.pt", map_location="cpu", weights_only=True)
                   for output in (ours, theirs))
    assert mine["lr_schedule"] == other["lr_schedule"] and mine["optimizer"]["param_groups"] == other["optimizer"]["param_groups"]
    mine, other = mine["optimizer"]["state"], other["optimizer"]["state"]
    assert mine.keys() == other.keys() and len(other) > 10
    for number, moments in other.items():
        assert mine[number].keys() == moments.keys() and float(moments["step"]) == step
        for name, value in moments.items():
            torch.testing.assert_close(mine[number][name], value, rtol=1e-3 if atol else 0, atol=atol)
    files = [*(theirs / f"checkpoint-{step}").rglob("*.safetensors"), *theirs.glob("transformer*/*.safetensors"),
             *theirs.glob("*.safetensors")]
    assert len(files) >= 2
    for file in files:
        mine, other = load_file(ours / file.relative_to(theirs)), load_file(file)
        assert mine.keys() == other.keys()
        for name, value in other.items():
            torch.testing.assert_close(mine[name], value, rtol=0, atol=atol)


@pytest.mark.skipif(not importlib.util.find_spec("deepspeed"), reason="deepspeed is not installed")
def test_zero_2_and_3_make_what_ddp_makes(tiny_images, tmp_path_factory, tmp_path):
    import tiny
    model, runs = tiny.make_sd3(tmp_path_factory.mktemp("sd3")), []
    unseen = tiny.make_images(tmp_path / "unseen", [(64, 64)] * 2)
    common = {"type": "local", "caption_strategy": "textfile", "crop": True, "resolution": 64, "resolution_type": "pixel"}
    (tmp_path / "sets.json").write_text(json.dumps([
        {"id": "images", "instance_data_dir": str(tiny_images), **common},
        {"id": "unseen", "dataset_type": "eval", "instance_data_dir": str(unseen), **common}]))
    (tmp_path / "zero3.json").write_text(json.dumps(ZERO3))
    engines = {"ddp": {"ACCELERATE_USE_DEEPSPEED": "false"}, "zero1": {"ACCELERATE_DEEPSPEED_ZERO_STAGE": "1"}, "zero2": {},
               "zero3": {"ACCELERATE_DEEPSPEED_CONFIG_FILE": str(tmp_path / "zero3.json"), "ACCELERATE_CONFIG_DS_FIELDS": ""}}

    def plan(name: str, script: str, *more) -> None:
        line = flags(model, tiny_images, tmp_path / name, "--max_train_steps", STEPS, "--checkpointing_steps", HALF, "--use_ema",
                     "--adam_epsilon", 1e-6, "--embedding_cache_dir", tmp_path / "cache", "--train_batch_size", 2,
                     "--learning_rate", 1e-3, *more)
        place = line.index("--train_data_dir")
        line[place:place + 2] = ["--data_backend_config", str(tmp_path / "sets.json")]
        runs.append({"script": script, "flags": line, "env": engines[re.search("ddp|zero.", name)[0]]})

    drawn = ("--validation_prompt", "a cat", "--num_validation_images", 1, "--validation_num_inference_steps", 1,
             "--validation_steps", HALF, "--eval_steps_interval", HALF, "--num_eval_images", 2, "--eval_timesteps", 2)
    few = ("--rank", 4, "--max_train_steps", 2, "--learning_rate", 1e-2, "--gradient_accumulation_steps", 2,
           "--train_batch_size", 1, "--checkpointing_steps", 1)
    plan("ddp", "train_sd3", *drawn)
    plan("zero2", "train_sd3", *drawn)
    plan("again_zero2", "train_sd3", "--resume_from_checkpoint", tmp_path / f"zero2/checkpoint-{HALF}")
    for name in ("ddp", "zero1", "zero2", "zero3"):    # ZeRO 3 last: it leaves a linear layer of its own in torch
        plan(f"lora_{name}", "train_lora_sd3", *few)
        if name in ("zero2", "zero3"):
            plan(f"again_lora_{name}", "train_lora_sd3", *few, "--resume_from_checkpoint", tmp_path / f"lora_{name}/checkpoint-1")
    plan("zero3", "train_sd3", *drawn)
    plan("again_zero3", "train_sd3", "--resume_from_checkpoint", tmp_path / f"zero3/checkpoint-{HALF}")
    plan("ddp_to_zero3", "train_sd3", "--resume_from_checkpoint", tmp_path / f"ddp/checkpoint-{HALF}")
    runs[-1]["env"] = engines["zero3"]
    plan("zero3_to_ddp", "train_sd3", "--resume_from_checkpoint", tmp_path / f"zero3/checkpoint-{HALF}")
    runs[-1]["env"] = engines["ddp"]
    launch_all(runs, tmp_path)

    for name in ("zero2", "zero3"):
        np.testing.assert_allclose(losses(tmp_path / name, "grad_norm"), losses(tmp_path / "ddp", "grad_norm"), rtol=1e-4)
        np.testing.assert_allclose(losses(tmp_path / name), losses(tmp_path / "ddp"), rtol=0, atol=1e-5)
        assert_alike(tmp_path / name, tmp_path / "ddp", STEPS, atol=1e-6)
        evaluated = [losses(tmp_path / each, "unseen", "evaluation.jsonl") for each in (name, "ddp")]    # with averaged weights
        np.testing.assert_allclose(*evaluated, rtol=0, atol=2e-6)
        drawn = sorted((tmp_path / "ddp" / "validation").rglob("*.png"))
        assert len(drawn) == 2
        for file in drawn:
            ours, theirs = (np.asarray(Image.open(str(file).replace("/ddp/", f"/{each}/"))).astype(int) for each in (name, "ddp"))
            np.testing.assert_allclose(ours, theirs, rtol=0, atol=1)
        np.testing.assert_allclose(losses(tmp_path / f"lora_{name}"), losses(tmp_path / "lora_ddp"), rtol=0, atol=1e-5)
        for kind, done, step in (("", HALF, STEPS), ("lora_", 1, 2)):
            whole, again = tmp_path / f"{kind}{name}", tmp_path / f"again_{kind}{name}"
            np.testing.assert_array_equal(losses(again), losses(whole)[done:])
            assert_alike(again, whole, step, atol=0)
    for name in ("zero3_to_ddp", "ddp_to_zero3"):
        np.testing.assert_allclose(losses(tmp_path / name), losses(tmp_path / "ddp")[HALF:], rtol=0, atol=1e-5)
        assert_alike(tmp_path / name, tmp_path / "ddp", STEPS, atol=1e-6)
    for name in ("zero1", "zero2", "zero3"):
        assert_alike(tmp_path / f"lora_{name}", tmp_path / "lora_ddp", 2, atol=1e-4)


def launch_all(runs: list[dict], folder) -> None:
    """Runs one after another in two processes that accelerate launches by the config for ZeRO 2."""
    (folder / "runs.json").write_text(json.dumps(runs))
    launcher = ["-m", "accelerate.commands.launch", "--config_file", "config/accelerate/deepspeed_zero2.yaml", "--num_processes",
                "2", "--mixed_precision", "no", "--num_cpu_threads_per_process", "1", "--main_process_port", str(free_port())]
    path = os.pathsep.join(filter(None, (str(REPOSITORY / "test/npu_sim"), os.environ.get("PYTHONPATH"))))
    done = subprocess.run([sys.executable, *launcher, "test/several.py", str(folder / "runs.json")], cwd=REPOSITORY, text=True,
                          capture_output=True, env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path,
                                                    "NPU_SIM_DEVICES": "2", "ASCEND_HOME_PATH": str(folder)})
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]


@pytest.mark.parametrize(("config", "plugin", "more", "said"), [
    ({}, {"zero_stage": 0}, (), "zero_stage 0"),
    ({}, {"zero3_init_flag": True}, (), "zero3_init_flag"),
    ({"optimizer": {"type": "AdamW"}}, {}, (), "optimizer in DeepSpeed's config"),
    ({"zero_optimization": {"stage": 3, "mics_shard_size": 2}}, {}, (), "zero_optimization.mics_shard_size"),
    ({"zero_optimization": {"offload_param": {"device": "nvme"}}}, {}, (), "offload_param to nvme"),
    ({"gradient_clipping": 0.5}, {}, (), "gradient_clipping is 0.5 in DeepSpeed's config, and by the flags it is 1.0"),
    ({"gradient_accumulation_steps": 1}, {}, ("--gradient_accumulation_steps", "2"), "gradient_accumulation_steps is 1"),
    ({"train_batch_size": 6}, {}, (), "train_batch_size is 6 in DeepSpeed's config, and by the flags it is 4"),
    ({}, {"mixed_precision": "fp16"}, (), "--mixed_precision fp16"),
    ({}, {}, ("--optimizer", "muon"), "--optimizer muon cannot step on DeepSpeed's flat parts"),
    ({}, {}, ("--use_8bit_adam",), "--use_8bit_adam"),
    ({}, {}, ("--layer_statistics", "5"), "--layer_statistics")])
def test_what_does_not_go_is_refused_by_name(config, plugin, more, said, parse):
    usual = {"zero_optimization": {"stage": 2}, "train_batch_size": "auto", "gradient_clipping": "auto", "bf16": {}}

    def accelerator(config: dict, zero_stage: int = 2, zero3_init_flag: bool = False, mixed_precision: str = "no"):
        plugin = SimpleNamespace(deepspeed_config=usual | config, zero_stage=zero_stage, zero3_init_flag=zero3_init_flag)
        return SimpleNamespace(state=SimpleNamespace(deepspeed_plugin=plugin), num_processes=2, mixed_precision=mixed_precision)

    deepspeed_engine.check(accelerator({}), parse())
    with pytest.raises(UserError, match=re.escape(said)):
        deepspeed_engine.check(accelerator(config, **plugin), parse(*more))


@pytest.mark.parametrize(("device", "found", "said"), [
    ("npu", True, "ASCEND_HOME_PATH"), ("cuda", False, "pip install deepspeed=="), ("cuda", True, None), ("cpu", False, None)])
def test_what_deepspeed_needs_is_said_before_it_is_imported(device, found, said, monkeypatch):
    monkeypatch.delenv("ASCEND_HOME_PATH", raising=False)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: found or None)
    deepspeed_engine.check_installed(device)    # nobody has asked for it
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(UserError, match=said) if said else contextlib.nullcontext():
        deepspeed_engine.check_installed(device)

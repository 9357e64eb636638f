"""One run by every engine: DDP, ZeRO-1 by torch and by fairscale, FSDP2. One course of losses, and checkpoints for all."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from forks import REPOSITORY, Run, flags, free_port, together
from safetensors.torch import load_file

from library.errors import UserError
from library.training import optimizers, sharding

STEPS = 20
ENGINES = {"ddp": (), "zero1": ("--optimizer_sharding", "zero1"), "oss": ("--optimizer_type", "oss")}
LOSS_SCALE = 2.0**22
TEN = ("--checkpointing_steps", 10)
COMMON = ("--checkpointing_steps", STEPS, "--use_ema", "--adam_epsilon", 1e-6, "--lr_scheduler", "constant_with_warmup",
          "--lr_warmup_steps", 12)
LAUNCH = ["-m", "accelerate.commands.launch", "--config_file", "config/accelerate/fsdp2.yaml", "--num_processes", "2",
          "--mixed_precision", "no", "--num_cpu_threads_per_process", "1"]


def planned(script: str, model, images, output: Path, batch: int, *more, env: dict | None = None) -> dict:
    """A run of several.py; the encoded images and captions lie beside its output."""
    line = flags(model, images, output, *COMMON, "--max_train_steps", STEPS, "--embedding_cache_dir", output.with_name("cache"),
                 "--train_batch_size", batch, *more)
    return {"script": script, "flags": line, "env": env or {}}


def several(runs: list[dict], log: Path, processes: int, script: str = "train_sdxl") -> str:
    """Runs one after another in the same forked processes -> what the first of them said."""
    log.with_suffix(".json").write_text(json.dumps(runs))
    given = [str(log.with_suffix(".json"))]
    going = together(given, log, processes, module="several", script=script) if processes > 1 else [
        Run(given, log, module="several", script=script)]
    assert [one.wait(900) for one in going] == [0] * processes, "".join(one.text()[-4000:] for one in going)
    return going[0].text()


def logged(output: Path, name: str = "loss") -> np.ndarray:
    return np.array([json.loads(line)[name] for line in (output / "metrics.jsonl").read_text().splitlines()])


def state(output: Path, step: int) -> dict:
    return torch.load(output / f"checkpoint-{step}" / "training_state.pt", map_location="cpu", weights_only=True)


def assert_near(ours: Path, reference: Path) -> None:
    """Losses within 1e-5, norms nearly: for AdamW a gradient's size is nothing."""
    theirs = logged(reference)[-len(logged(ours)):]
    np.testing.assert_allclose(logged(ours), theirs, rtol=0, atol=1e-5)
    np.testing.assert_allclose(logged(ours, "grad_norm"), logged(reference, "grad_norm")[-len(theirs):], rtol=1e-4)


def assert_same_checkpoint(ours: Path, reference: Path, step: int, **tolerance) -> None:
    """Moments, schedule, average and weights at `step`: bit by bit, or within rtol and atol."""
    tolerance = tolerance or {"rtol": 0, "atol": 0}
    mine, theirs = state(ours, step), state(reference, step)
    assert mine["lr_schedule"] == theirs["lr_schedule"] and mine["scaler"] == theirs["scaler"]
    mine, theirs = mine["optimizer"], theirs["optimizer"]
    for groups in (mine["param_groups"], theirs["param_groups"]):
        assert [group.pop("fused", None) for group in groups]    # the kernel: another device may have none
    assert mine["param_groups"] == theirs["param_groups"]
    mine, theirs = mine["state"], theirs["state"]
    assert mine.keys() == theirs.keys() and len(theirs) > 10
    for number, moments in theirs.items():
        assert mine[number].keys() == moments.keys()
        for name, value in moments.items():
            torch.testing.assert_close(torch.as_tensor(mine[number][name]), torch.as_tensor(value), **tolerance)
    files = list((reference / f"checkpoint-{step}").rglob("*.safetensors"))
    assert len(files) > 1
    for file in files:
        ours_too, whole = load_file(ours / file.relative_to(reference)), load_file(file)
        assert ours_too.keys() == whole.keys()
        for name, value in whole.items():
            torch.testing.assert_close(ours_too[name], value, **tolerance)


@pytest.fixture(scope="module")
def spread(tiny_model, tiny_images, tmp_path_factory):
    """Runs of train_sdxl.py at a global batch of 4, by 1, 2 and 4 processes and every engine of theirs: ENGINE-PROCESSES.

    again: 4 processes of zero1, from their tenth step on 2 of oss, from the fifteenth 1. ENGINE-bf16: with accumulation.
    """
    place = tmp_path_factory.mktemp("spread")

    def of(name, batch, *more):
        return planned("train_sdxl", tiny_model, tiny_images, place / name, batch, *more)

    said = several([of("ddp-1", 4, *ENGINES["zero1"])], place / "log1", 1)
    assert said.count("one process has nobody to share the optimizer's state with") == 1
    several([of(f"{engine}-4", 1, *more, *TEN * (engine == "zero1")) for engine, more in ENGINES.items()], place / "log4", 4)
    four = place / "zero1-4" / "checkpoint-10"
    bf16 = ("--mixed_precision", "bf16", "--gradient_accumulation_steps", 2, "--max_grad_norm", 0.05, "--lr_scheduler", "cosine",
            "--lr_warmup_steps", 2, "--max_train_steps", 3, "--checkpointing_steps", 3)
    several([of(f"{engine}-2", 2, *more) for engine, more in ENGINES.items()]
            + [of(f"{engine}-bf16", 1, *bf16, *more) for engine, more in ENGINES.items()]
            + [of("again", 2, *ENGINES["oss"], "--max_train_steps", 15, "--resume_from_checkpoint", four)], place / "log2", 2)
    said = several([of("again", 4, "--resume_from_checkpoint", "latest")], place / "log", 1)
    assert "checkpoint-15" in said
    return place


@pytest.mark.parametrize("processes", [2, 4])
@pytest.mark.parametrize("engine", ENGINES)
def test_some_processes_make_the_losses_and_the_checkpoints_of_one(spread, engine, processes):
    ours, alone = spread / f"{engine}-{processes}", spread / "ddp-1"
    assert len(logged(ours)) == STEPS and logged(alone).std() > 0.01
    assert_near(ours, alone)
    assert_same_checkpoint(ours, alone, STEPS, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("engine", ["zero1", "oss"])
@pytest.mark.parametrize("kind", ["2", "4", "bf16"])
def test_what_is_shared_out_is_bit_by_bit_what_ddp_makes(spread, engine, kind):
    """In float32; and in bfloat16, with accumulation, clipping and a schedule."""
    ours, ddp = spread / f"{engine}-{kind}", spread / f"ddp-{kind}"
    np.testing.assert_array_equal(logged(ours), logged(ddp))
    np.testing.assert_array_equal(logged(ours, "grad_norm"), logged(ddp, "grad_norm"))
    assert kind != "bf16" or len(logged(ddp)) == 3 and logged(ddp, "grad_norm").min() > 0.05
    assert_same_checkpoint(ours, ddp, 3 if kind == "bf16" else STEPS)


def test_four_go_on_as_two_and_two_as_one_each_by_another_engine(spread):
    assert len(logged(spread / "again")) == STEPS - 10
    assert_near(spread / "again", spread / "ddp-1")
    assert_same_checkpoint(spread / "again", spread / "ddp-1", STEPS, rtol=1e-3, atol=1e-4)


@pytest.fixture(scope="module")
def on_npus(tiny_images, tmp_path_factory):
    """Runs of SD 3's scripts by 2 processes on the stand-in for an NPU, with FSDP2 and without, and beside them one on a CPU."""
    import tiny
    place = tmp_path_factory.mktemp("fsdp2")
    model = tiny.make_sd3(place / "sd3")

    def of(name, script, *more, batch=2, **env):
        return planned(script, model, tiny_images, place / name, batch, *more, env=env)

    drawn = ("--validation_prompt", "a cat", "--num_validation_images", 1, "--validation_num_inference_steps", 1,
             "--validation_steps", STEPS)
    few = ("--rank", 4, "--max_train_steps", 3, "--learning_rate", 1e-2, "--lr_warmup_steps", 0, "--checkpointing_steps", 2)
    several([of("one", "train_sd3", batch=4), of("lora-one", "train_lora_sd3", *few, batch=4)], place / "log", 1,
            "train_lora_sd3")    # which has PEFT

    def half(name, *more):
        """In float16, from so large a scale of the loss on that the first steps overflow."""
        return of(name, "train_sd3", "--max_train_steps", 5, "--checkpointing_steps", 4, *more, ACCELERATE_USE_FSDP="false",
                  ACCELERATE_MIXED_PRECISION="fp16") | {"loss_scale": LOSS_SCALE}

    def again(run, name, step, steps):
        """The same run, from its checkpoint on, in a folder of its own."""
        line = [*run["flags"], "--output_dir", str(place / name), "--max_train_steps", str(steps), "--resume_from_checkpoint",
                str(Path(run["flags"][run["flags"].index("--output_dir") + 1]) / f"checkpoint-{step}")]
        return run | {"flags": line}

    fsdp2, lora = of("fsdp2", "train_sd3", *TEN, *drawn), of("lora-fsdp2", "train_lora_sd3", *few)
    fp16 = {engine: half(f"{engine}-fp16", *more) for engine, more in ENGINES.items()}
    bf16 = of("fsdp2-bf16", "train_sd3", "--gradient_accumulation_steps", 2, "--max_train_steps", 2, batch=1,
              ACCELERATE_MIXED_PRECISION="bf16")
    runs = [fsdp2, again(fsdp2, "fsdp2-again", 10, 12), lora, again(lora, "lora-again", 2, 3), bf16,
            *fp16.values(), again(fp16["oss"], "oss-again", 4, 5), {"script": "collectives", "flags": [], "env": {}}]
    (place / "runs.json").write_text(json.dumps(runs))
    done = subprocess.run([sys.executable, *LAUNCH, "--main_process_port", str(free_port()), "test/several.py",
                           place / "runs.json"], cwd=REPOSITORY, text=True, capture_output=True,
                          env={**os.environ, "PYTHONPATH": str(REPOSITORY / "test/npu_sim"), "NPU_SIM_DEVICES": "2"})
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    several([of("then-one", "train_sd3", "--resume_from_checkpoint", place / "fsdp2/checkpoint-10", batch=4)], place / "log", 1,
            "train_lora_sd3")
    return place


def test_fsdp2_makes_the_losses_and_the_checkpoints_of_one(on_npus):
    ours, alone = on_npus / "fsdp2", on_npus / "one"
    assert len(logged(ours)) == STEPS and logged(alone).std() > 0.01
    assert_near(ours, alone)
    assert_same_checkpoint(ours, alone, STEPS, rtol=1e-3, atol=1e-4)
    assert list((ours / "validation").rglob("*.png")) and (ours / "transformer_raw").is_dir()


def test_one_process_on_a_cpu_goes_on_from_two_npus(on_npus):
    assert len(logged(on_npus / "then-one")) == STEPS - 10
    assert_near(on_npus / "then-one", on_npus / "one")
    assert_same_checkpoint(on_npus / "then-one", on_npus / "one", STEPS, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("run", "step"), [("fsdp2", 10), ("lora", 2), ("oss", 4)])
def test_on_npus_a_run_goes_on_bit_by_bit(on_npus, run, step):
    ours, whole = on_npus / f"{run}-again", on_npus / {"lora": "lora-fsdp2", "oss": "oss-fp16"}.get(run, run)
    steps = len(logged(ours))
    assert steps == {"fsdp2": 2}.get(run, 1)
    np.testing.assert_array_equal(logged(ours), logged(whole)[step:step + steps])
    np.testing.assert_array_equal(logged(ours, "grad_norm"), logged(whole, "grad_norm")[step:step + steps])
    if run != "fsdp2":    # which went on as far
        assert_same_checkpoint(ours, whole, step + steps)


def test_fsdp2_in_bfloat16_with_accumulation(on_npus):
    ours, alone = on_npus / "fsdp2-bf16", on_npus / "one"
    np.testing.assert_allclose(logged(ours), logged(alone)[:2], rtol=2e-3)
    np.testing.assert_allclose(logged(ours, "grad_norm"), logged(alone, "grad_norm")[:2], rtol=2e-2)


def test_adapters_by_fsdp2(on_npus):
    assert_near(on_npus / "lora-fsdp2", on_npus / "lora-one")
    ours, theirs = (load_file(on_npus / name / "pytorch_lora_weights.safetensors") for name in ("lora-fsdp2", "lora-one"))
    assert ours.keys() == theirs.keys() and any(value.abs().max() > 1e-3 for name, value in ours.items() if "lora_B" in name)
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, rtol=0, atol=1e-4)


@pytest.mark.parametrize("engine", ["zero1", "oss"])
def test_fp16_and_its_scaler(on_npus, engine):
    """Bit by bit what DDP makes, where the first steps overflow and are skipped by all processes."""
    ours, ddp = on_npus / f"{engine}-fp16", on_npus / "ddp-fp16"
    np.testing.assert_array_equal(logged(ours), logged(ddp))
    assert_same_checkpoint(ours, ddp, 4)
    mine = state(ours, 4)
    made = {float(moments["step"]) for moments in mine["optimizer"]["state"].values()}
    assert made < {1.0, 2.0, 3.0} and mine["scaler"]["scale"] == LOSS_SCALE / 2 ** (4 - max(made))


def test_what_is_shared_out_is_a_share_and_comes_back_whole(tmp_path):
    """Gradients are DDP's, a process holds its part of the moments, a saved state is that of one process; see shares.py."""
    going = together(["shares"], tmp_path / "log", 2, module="shares")
    assert [one.wait(300) for one in going] == [0, 0], going[0].text() + going[1].text()
    assert "all is well" in going[0].text()


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


def test_activations_are_not_sent_away_with_gathered_weights(parse):
    accelerator = SimpleNamespace(distributed_type=SimpleNamespace(value="FSDP"), gradient_accumulation_steps=1)
    with pytest.raises(UserError, match="--offload_activations: with FSDP gathered weights"):
        sharding.check(accelerator, SimpleNamespace(**vars(parse()), offload_activations=True))


@pytest.mark.parametrize("name", [name for name in optimizers.TABLE if name.startswith((*optimizers.WHOLE, "ao-"))])
def test_what_cannot_be_shared_out_is_refused_by_name(name, parse):
    with pytest.raises(UserError, match=f"--optimizer_sharding zero1: {name} "):
        optimizers.check_optimizer(parse("--optimizer_sharding", "zero1", "--optimizer", name), "cpu")

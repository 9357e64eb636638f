"""What a machine cannot do is said at once: which flag it is, and what to do."""

import ast
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

from library import errors, flags
from library.errors import UserError
from library.training import accelerator, devices, optimizers

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture
def cpu(one_process, monkeypatch):
    """A run on the CPU, also where there is a GPU."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    one_process()


@pytest.mark.parametrize(("flags", "words"), [
    (("--mixed_precision", "fp16"), "--mixed_precision fp16 needs a GPU or NPU.*use bf16, or no"),
    (("--enable_xformers_memory_efficient_attention",),
     r"--attention_mechanism xformers \(--enable_xformers_memory_efficient_attention\) needs a CUDA or ROCm GPU.*leave the flag"),
    (("--enable_npu_flash_attention",),
     r"--attention_mechanism npu \(--enable_npu_flash_attention\) needs an Ascend NPU.*this run is on cpu: leave the flag out"),
    (("--attention_mechanism=flash",), "--attention_mechanism flash needs a CUDA or ROCm GPU"),
    (("--attention_mechanism=sageattention",), "--attention_mechanism sageattention needs a CUDA GPU and `pip install sage"),
    (("--allow_tf32",), "--allow_tf32 is for NVIDIA GPUs; this run is on cpu")], ids=lambda value: value[0])
def test_flags_for_other_hardware_are_refused_on_a_cpu(parse, cpu, flags, words):
    with pytest.raises(UserError, match=words):
        accelerator.start(parse(*flags))


def test_fp16_of_accelerates_own_configuration_is_refused_too(parse, cpu, monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    with pytest.raises(UserError, match="--mixed_precision fp16 needs a GPU"):
        accelerator.start(parse())
    assert accelerator.start(parse("--mixed_precision", "bf16")).mixed_precision == "bf16"    # the flag goes before it


def test_nothing_of_the_run_is_written_before_a_refusal(parse, train, cpu):
    with pytest.raises(UserError, match="--allow_tf32"):
        train("--allow_tf32")
    assert not Path(parse().output_dir).exists()


@pytest.mark.parametrize("device", ["cpu", "mps", "npu", "xpu", "cuda"])
def test_what_fits_the_device_is_let_pass(device, monkeypatch):
    devices.check_precision("no", device)
    for mechanism in ("default", "sdpa"):
        devices.check_attention(mechanism, "no", device)
    if device != "cpu":
        devices.check_precision("fp16", device)
    monkeypatch.setattr(devices.importlib.util, "find_spec", lambda name: True)
    for mechanism, place in {"xformers": "cuda", "flash": "cuda", "sageattention": "cuda", "npu": "npu"}.items():
        if device == place:
            devices.check_attention(mechanism, "bf16", device)
        else:
            with pytest.raises(UserError, match=f"--attention_mechanism {mechanism} .*this run is on {device}"):
                devices.check_attention(mechanism, "bf16", device)


@pytest.mark.parametrize("mechanism, package", [
    ("xformers", "xformers"), ("flash", "flash-attn"), ("sageattention", "sageattention"), ("npu", "torch-npu")])
def test_an_attention_that_is_not_installed_is_refused(monkeypatch, mechanism, package):
    monkeypatch.setattr(devices.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=f"--attention_mechanism {mechanism} .*needs .*{package}"):
        devices.check_attention(mechanism, "bf16", "npu" if mechanism == "npu" else "cuda")


def test_the_flag_names_every_attention():
    assert {"default", "sdpa", *devices.ATTENTION} == set(flags.ATTENTION)


@pytest.mark.parametrize("mechanism", ["flash", "sageattention", "npu"])
def test_an_attention_in_half_precision_is_refused_in_float32(monkeypatch, mechanism):
    monkeypatch.setattr(devices.importlib.util, "find_spec", lambda name: True)
    with pytest.raises(UserError, match="this run is in float32: add --mixed_precision bf16 or fp16"):
        devices.check_attention(mechanism, "no", "npu" if mechanism == "npu" else "cuda")


@pytest.fixture
def installed(monkeypatch):
    """`installed(module)`: a torch_npu that is found, and that `import` gives, or refuses if it is None."""
    monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)
    monkeypatch.setattr(devices.importlib.util, "find_spec", lambda name: name == "torch_npu")
    return lambda module: monkeypatch.setitem(sys.modules, "torch_npu", module)


def test_an_npu_that_is_not_usable_is_refused_and_not_replaced_by_a_cpu(installed, monkeypatch):
    installed(None)
    with pytest.raises(UserError, match=r"torch_npu is installed and cannot be loaded: .*`source set_env.sh` of CANN"):
        devices.best()
    installed(ModuleType("torch_npu"))
    monkeypatch.setattr(torch, "npu", SimpleNamespace(is_available=lambda: False), raising=False)
    with pytest.raises(UserError, match="finds no NPU: look at `npu-smi info`.*ACCELERATE_USE_CPU=true"):
        devices.best()
    monkeypatch.setattr(torch, "npu", SimpleNamespace(is_available=lambda: True), raising=False)
    assert devices.best() == "npu"
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    assert devices.best() == "cpu"


def test_another_device_than_accelerates_is_refused(parse, cpu, monkeypatch):
    from accelerate.state import PartialState
    PartialState(cpu=True)
    monkeypatch.setattr(devices, "best", lambda: "cuda")
    with pytest.raises(UserError, match="this machine has the device cuda, but accelerate chose cpu"):
        accelerator.start(parse())


@pytest.mark.parametrize("optimizer", ["adamw_8bit", "bnb-lion8bit-paged", "ao-adamw8bit", "adamw_fused"])
def test_optimizers_without_kernels_for_an_npu(parse, optimizer):
    with pytest.raises(UserError, match=f"--optimizer {optimizer} does not run on npu"):
        optimizers.check_optimizer(parse("--optimizer", optimizer), "npu")


def test_an_extension_that_torch_cannot_load_is_one_sentence(monkeypatch, capsys):
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    errors.explain_imports("train_sdxl.py")
    statuses = []
    monkeypatch.setattr(errors.os, "_exit", statuses.append)
    fault = RuntimeError("Failed to load the backend extension: torch_npu. You can disable it")
    fault.__cause__ = ImportError("libhccl.so: no such file")
    sys.excepthook(RuntimeError, fault, None)
    said = capsys.readouterr().err
    assert statuses == [2] and said.startswith("train_sdxl.py: error: PyTorch: Failed to load the backend extension: torch_npu")
    sys.excepthook(ValueError, ValueError("another"), None)
    assert statuses == [2] and "ValueError: another" in capsys.readouterr().err


def test_bf16_on_a_gpu_without_it_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: False)
    with pytest.raises(UserError, match="--mixed_precision bf16: this GPU has no bfloat16; use fp16"):
        devices.check_precision("bf16", "cuda")


def test_processes_that_accelerate_did_not_join_are_refused(parse, cpu, monkeypatch):
    """Started by hand as two, each would train alone and write over the other."""
    from accelerate.state import PartialState
    PartialState()    # one process, whatever the environment says from now on
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="2 processes were launched.*accelerate launch"):
        accelerator.start(parse())


def test_the_cpu_as_it_is():
    assert devices.fused_adamw("cpu") and not devices.fused_adamw("npu")
    devices.free_memory("cpu")
    assert "cpu" in devices.description("cpu") and "1 threads" in devices.description("cpu")
    if (status := Path("/proc/self/status")).exists():    # as Linux counts it
        peak = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        assert devices.peak_memory("cpu") == pytest.approx(int(peak.split()[1]) / 2**20, rel=0.05)


def test_only_one_file_names_devices():
    """D10. `torch.cuda`, `torch.npu`, `torch.mps`, `torch_npu`, and torch.xpu and torch.backends of them."""
    named = []
    for path in [*REPOSITORY.glob("*.py"), *(REPOSITORY / "library").rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            torch_of = isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "torch"
            imported = [alias.name for alias in node.names] if isinstance(node, ast.Import | ast.ImportFrom) else []
            if (torch_of and node.attr in ("cuda", "npu", "mps", "xpu", "backends")) or "torch_npu" in imported:
                named.append(str(path.relative_to(REPOSITORY)))
    assert set(named) == {"library/training/devices.py"}


def test_more_processes_than_devices(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    devices.check_count("cuda")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    devices.check_count("cuda")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    devices.check_count("cpu")
    with pytest.raises(UserError, match=r"8 processes were launched.*finds 4 of its devices \(cuda\): give --nproc_per_node 4"):
        devices.check_count("cuda")

"""What a machine cannot do is said at once: which flag it is, and what to do."""

import ast
from pathlib import Path

import pytest
import torch

from library.errors import UserError
from library.training import accelerator, devices

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture
def cpu(one_process, monkeypatch):
    """A run on the CPU, also where there is a GPU."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    one_process()


@pytest.mark.parametrize(("flags", "words"), [
    (("--mixed_precision", "fp16"), "--mixed_precision fp16 needs a GPU or NPU.*use bf16, or no"),
    (("--enable_xformers_memory_efficient_attention",),
     "--enable_xformers_memory_efficient_attention needs a CUDA or ROCm GPU.*leave the flag out"),
    (("--enable_npu_flash_attention",), "--enable_npu_flash_attention needs an Ascend NPU.*leave the flag out"),
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
    devices.check_attention(False, device == "npu", device)
    if device != "cpu":
        devices.check_precision("fp16", device)
    monkeypatch.setattr(devices.importlib.util, "find_spec", lambda name: name == "xformers")
    if device == "cuda":
        devices.check_attention(True, False, device)
    else:
        with pytest.raises(UserError, match="xformers"):
            devices.check_attention(True, False, device)


def test_xformers_that_is_not_installed_is_refused(monkeypatch):
    monkeypatch.setattr(devices.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install xformers"):
        devices.check_attention(True, False, "cuda")


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

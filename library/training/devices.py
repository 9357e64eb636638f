"""Everything that differs from device to device. Only this file names torch.cuda, torch.npu, torch.mps or torch_npu."""

import ctypes
import importlib.util
import platform
import resource
import sys

import torch

from library.errors import UserError


def best() -> str:
    """The kind of device this machine trains on: cuda (also ROCm), npu, xpu, mps or cpu."""
    if torch.cuda.is_available():
        return "cuda"
    if importlib.util.find_spec("torch_npu") and hasattr(torch, "npu") and torch.npu.is_available():
        return "npu"
    if hasattr(torch, "xpu") and torch.xpu.is_available():
        return "xpu"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def check_precision(mixed_precision: str, device: str) -> None:
    """Refuse a precision the device cannot train in. Raises `UserError`."""
    if mixed_precision == "fp16" and device == "cpu":
        raise UserError("--mixed_precision fp16 needs a GPU or NPU and there is none here: use bf16, or no")
    if mixed_precision == "bf16" and device == "cuda" and not torch.cuda.is_bf16_supported():
        raise UserError("--mixed_precision bf16: this GPU has no bfloat16; use fp16")


def check_attention(xformers: bool, npu: bool, device: str) -> None:
    """Refuse an attention the machine does not have. Raises `UserError`."""
    if xformers and (device != "cuda" or not importlib.util.find_spec("xformers")):
        raise UserError("--enable_xformers_memory_efficient_attention needs a CUDA or ROCm GPU and `pip install xformers`. "
                        "PyTorch's own attention is as lean: leave the flag out")
    if npu and device != "npu":
        raise UserError("--enable_npu_flash_attention needs an Ascend NPU and torch_npu; leave the flag out elsewhere")


def allow_tf32(device: str) -> None:
    """Let float32 matrix products run in TF32. Raises `UserError` where there is no such thing."""
    if device != "cuda":
        raise UserError(f"--allow_tf32 is for NVIDIA GPUs; this run is on {device}")
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.backends.cudnn.allow_tf32 = True


def fused_adamw(device: str) -> bool:
    """Whether torch has the fused AdamW kernel for the device."""
    return device in ("cuda", "cpu", "mps", "xpu")


def manual_seed(seed: int, device: str) -> None:
    """Seed the CPU's generator and the device's. `torch.manual_seed` asks all kinds of devices: 2 ms where there are none."""
    torch.default_generator.manual_seed(seed)
    if device != "cpu":
        getattr(torch, device).manual_seed(seed)


def memory_format(device: str) -> torch.memory_format:
    """The layout in which convolutions of the VAE are fastest: measured 1.3 to 1.8 times on a CPU."""
    return torch.channels_last if device in ("cpu", "cuda") else torch.contiguous_format


def peak_memory(device: str) -> float:
    """Most memory used so far, in GB: the device's, or this process's where the device has none of its own."""
    if device in ("cuda", "npu", "xpu"):
        return getattr(torch, device).max_memory_allocated() / 2**30
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**30 if sys.platform == "darwin" else 2**20)


def free_memory(device: str) -> None:
    """Give memory that is no longer used back: to the device, and to the system."""
    if device in ("cuda", "npu", "xpu", "mps"):
        getattr(torch, device).empty_cache()
    if platform.libc_ver()[0] == "glibc":    # its allocator otherwise keeps what the encoders took
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def description(device: str) -> str:
    """The device in words, for the report."""
    if device in ("cuda", "npu", "xpu"):
        return getattr(torch, device).get_device_name()
    return f"{device}, {platform.machine()}, {torch.get_num_threads()} threads"

"""Everything that differs from device to device. Only this file names torch.cuda, torch.npu, torch.mps or torch_npu."""

import ctypes
import importlib.util
import os
import platform
import resource
import sys
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F

from library.errors import UserError
from library.training.imports import lean


def best() -> str:
    """The kind of device to run on: npu, cuda (also ROCm), xpu, mps or cpu; ACCELERATE_USE_CPU asks for the last.

    Raises `UserError` for an Ascend NPU that is not usable: a run that was meant for it must not go to the CPU in silence.
    """
    if os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes"):
        return "cpu"
    if importlib.util.find_spec("torch_npu"):    # first, as accelerate has it: torch_npu can pass itself off as CUDA
        _check_npu()
        return "npu"
    if torch.cuda.is_available():
        return "cuda"
    if hasattr(torch, "xpu") and torch.xpu.is_available():
        return "xpu"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def _check_npu() -> None:
    try:
        import torch_npu  # noqa: F401
    except (ImportError, OSError, RuntimeError) as error:    # CANN is not installed, or its set_env.sh was not sourced
        raise UserError(f"torch_npu is installed and cannot be loaded: {error}. `source set_env.sh` of CANN first, install the "
                        f"torch_npu that belongs to torch {torch.__version__}, or `pip uninstall torch-npu`") from error
    if not torch.npu.is_available():
        raise UserError("torch_npu is installed and finds no NPU: look at `npu-smi info` and ASCEND_RT_VISIBLE_DEVICES. "
                        "ACCELERATE_USE_CPU=true runs on the CPU")


def prepare(device: str, mixed_precision: str = "no") -> None:
    """Settings of this process, once accelerate has given it a device of its own: asking an NPU takes memory of the current one.

    Raises `UserError` for an NPU without the run's precision.
    """
    if device == "npu":
        if mixed_precision == "bf16" and not torch.npu.is_bf16_supported():
            raise UserError("--mixed_precision bf16: this NPU has no bfloat16; use fp16")
        torch.npu.set_compile_mode(jit_compile=False)      # else every new shape, as each bucket has, compiles all operators
        torch.npu.config.allow_internal_format = False    # else weights change to layouts that copies and files do not know
    if importlib.util.find_spec("torch_npu"):    # diffusers calls its operators wherever it is installed, on a CPU, too
        with lean():
            from diffusers.utils import import_utils
        import_utils._torch_npu_available = device == "npu"


def check_precision(mixed_precision: str, device: str) -> None:
    """Refuse a precision the device cannot train in. Raises `UserError`."""
    if mixed_precision == "fp16" and device == "cpu":
        raise UserError("--mixed_precision fp16 needs a GPU or NPU and there is none here: use bf16, or no")
    if mixed_precision == "bf16" and device == "cuda" and not torch.cuda.is_bf16_supported():
        raise UserError("--mixed_precision bf16: this GPU has no bfloat16; use fp16")


def check_count(device: str) -> None:
    """Refuse more processes on this machine than it has devices: accelerate would give two of them one. Raises `UserError`."""
    wanted = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if device in ("cuda", "npu", "xpu") and 1 < wanted > (count := getattr(torch, device).device_count()):
        raise UserError(f"{wanted} processes were launched on this machine, and PyTorch finds {count} of its devices ({device}): "
                        f"give --nproc_per_node {count} (accelerate: --num_processes), or look at the list of visible devices")


def _flash(q, k, v, mask):
    from flash_attn import flash_attn_func
    if mask is not None:
        raise UserError("--attention_mechanism flash takes no mask, and this model has one: use default")
    return flash_attn_func(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)).transpose(1, 2)    # [B, S, N, D] there


def _xformers(q, k, v, mask):
    from xformers.ops import memory_efficient_attention
    if mask is not None:
        if mask.dtype == torch.bool:
            mask = torch.zeros_like(mask, dtype=q.dtype).masked_fill(~mask, -torch.inf)
        columns = k.shape[2]    # its kernels want rows that begin at multiples of 8 elements
        mask = F.pad(mask.to(q.dtype).expand(*q.shape[:3], columns), (0, -columns % 8))[..., :columns]
    return memory_efficient_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_bias=mask).transpose(1, 2)


class _Sage(torch.autograd.Function):
    """SageAttention forward; backward the gradient of PyTorch's attention, as SageAttention has none."""

    @staticmethod
    def forward(ctx, q, k, v):
        from sageattention import sageattn
        ctx.save_for_backward(q, k, v)
        return sageattn(q, k, v, tensor_layout="HND")

    @staticmethod
    def backward(ctx, gradient):
        with torch.enable_grad():
            given = [tensor.detach().requires_grad_(True) for tensor in ctx.saved_tensors]
            return torch.autograd.grad(F.scaled_dot_product_attention(*given), given, gradient)


def _sage(q, k, v, mask):
    if mask is not None:
        raise UserError("--attention_mechanism sageattention takes no mask, and this model has one: use default")
    return _Sage.apply(q, k, v)


def _npu(q, k, v, mask):
    import torch_npu
    if mask is not None:    # its masks are true where nothing is seen, and as large as the scores, but for the heads
        hidden = ~mask if mask.dtype == torch.bool else mask < -1000    # diffusers adds -10000 there, others -inf
        mask = hidden.expand(len(q), hidden.shape[1], q.shape[2], k.shape[2]).contiguous()
    return torch_npu.npu_fusion_attention(q, k, v, q.shape[1], "BNSD", atten_mask=mask, scale=q.shape[-1] ** -0.5)[0]


def sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """PyTorch's attention. q [B, N, S, D], k, v [B, N, T, D] -> [B, N, S, D].

    mask: None, or of a shape that fits [B, N, S, T]; true where a key is seen, or what is added to the scores.
    """
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


class Attention(NamedTuple):
    """One --attention_mechanism."""

    call: Callable                # as `sdpa`
    devices: tuple[str, ...]
    place: str                    # these in words
    package: str
    install: str
    half: bool                    # whether it takes float16 and bfloat16 alone
    also: str = ""                # another name of it


ATTENTION = {
    "xformers": Attention(_xformers, ("cuda",), "a CUDA or ROCm GPU", "xformers", "`pip install xformers`", False,
                          "enable_xformers_memory_efficient_attention"),
    "flash": Attention(_flash, ("cuda",), "a CUDA or ROCm GPU", "flash_attn", "`pip install flash-attn --no-build-isolation`",
                       True),
    "sageattention": Attention(_sage, ("cuda",), "a CUDA GPU", "sageattention", "`pip install sageattention`", True),
    "npu": Attention(_npu, ("npu",), "an Ascend NPU", "torch_npu", "torch-npu of torch's version", True,
                     "enable_npu_flash_attention")}
_DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def attention(mechanism: str) -> Callable:
    """The function of an --attention_mechanism, with the arguments of `sdpa`."""
    return sdpa if mechanism in ("default", "sdpa") else ATTENTION[mechanism].call


def check_attention(mechanism: str, mixed_precision: str, device: str) -> None:
    """Refuse an attention that this machine does not have, or not in this precision. Raises `UserError`."""
    if mechanism in ("default", "sdpa"):
        return
    wanted = ATTENTION[mechanism]
    typed = f"--attention_mechanism {mechanism}" + f" (--{wanted.also})" * bool(wanted.also)
    if device not in wanted.devices:
        raise UserError(f"{typed} needs {wanted.place} and {wanted.install}, and this run is on {device}: leave the flag out, "
                        "PyTorch's own attention is as lean")
    if not importlib.util.find_spec(wanted.package):
        raise UserError(f"{typed} needs {wanted.install}; or leave the flag out, PyTorch's own attention is as lean")
    if wanted.half and mixed_precision == "no":
        raise UserError(f"{typed} multiplies in half precision, and this run is in float32: add --mixed_precision bf16 or fp16, "
                        "or leave the flag out")


def try_attention(mechanism: str, mixed_precision: str, device: torch.device) -> None:
    """Call it once, on heads of 64 as SDXL and SD3 have. Raises `UserError` if it fails, or is not near PyTorch's."""
    if attention(mechanism) is sdpa:
        return
    draw = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 2, 77, 64, generator=draw).to(device, _DTYPES[mixed_precision]) for _ in range(3))
    try:
        with torch.no_grad():
            error = (attention(mechanism)(q, k, v, None) - sdpa(q, k, v, None)).abs().max().item()
    except Exception as fault:    # each library has its own
        raise UserError(f"--attention_mechanism {mechanism} does not run on {description(device.type)}: {fault}") from fault
    if not error < 0.1:    # about 0.01 in 8 bits; another layout than thought would be at 1
        raise UserError(f"--attention_mechanism {mechanism} is {error:.2g} away from PyTorch's attention: its version is not "
                        "known here; leave the flag out")


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


def pins_memory(device: str) -> bool:
    """Whether batches come to the device faster from main memory that stays in its place."""
    return device in ("cuda", "npu", "xpu")


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

"""A frozen base in 8, 4 or 2 bits: optimum-quanto, torchao or bitsandbytes hold the weights, PEFT's adapters train on top.

A quantised layer computes x W^T + b with W dequantised for that product alone, and again in the backward pass: the
packages' own layers keep a bf16 copy of W (torchao) or the input (quanto) until then. bitsandbytes' does not.
"""

import ctypes
import difflib
import fnmatch
import importlib.util
import mmap
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

from library.errors import UserError
from library.training import devices


@dataclass(frozen=True)
class Scheme:
    """How weights are held. dtype: as the package calls it. devices: where it runs. bits: of a weight, without its scales."""

    module: str
    package: str
    dtype: str
    bits: int
    devices: tuple[str, ...]


_ALL, _NO_FP8 = ("cpu", "cuda", "xpu", "mps"), ("cpu", "cuda", "xpu")    # Apple's GPUs have no 8-bit floating point
SCHEMES = {
    "int8-quanto": Scheme("optimum.quanto", "optimum-quanto", "qint8", 8, _ALL),
    "int4-quanto": Scheme("optimum.quanto", "optimum-quanto", "qint4", 4, _ALL),
    "int2-quanto": Scheme("optimum.quanto", "optimum-quanto", "qint2", 2, _ALL),
    "fp8-quanto": Scheme("optimum.quanto", "optimum-quanto", "qfloat8", 8, _NO_FP8),
    "int8-torchao": Scheme("torchao", "torchao", "Int8WeightOnlyConfig", 8, (*_ALL, "npu")),    # plain products: everywhere
    "fp8-torchao": Scheme("torchao", "torchao", "Float8WeightOnlyConfig", 8, _NO_FP8),
    "nf4-bnb": Scheme("bitsandbytes", "bitsandbytes", "nf4", 4, _ALL),
}
PRECISIONS = ("no_change", *SCHEMES)
# layers by name that stay as they are: embeddings of time, size, places, tokens and text, the last projection and its norm. Other
# norms have no linear layer but in SD3, whose blocks scale and shift by the noise level: a third of 3.5 Large, and as robust
SKIP = ("*embed*", "*time_emb_proj", "norm_out", "proj_out", "*text_projection")
_GROUPS = (128, 64, 32)    # weights that share a scale, in 4 and 2 bits
_BLOCK = 64    # nf4 weights that share a scale. Where a row is no whole number of them, bitsandbytes 0.50 is wrong on a CPU
_TRIM = 1 << 28    # bytes of weights after which the memory of the work is given back


def check(precision: str, device: str, flag: str) -> None:
    """Refuse what cannot run on this kind of device (cpu, cuda, npu, ...), before anything is loaded.

    flag: what messages name, such as --base_model_precision. 4 and 2 bits of quanto need a helper that is compiled at
    its first use: here. Raises `UserError`.
    """
    if precision == "no_change":
        return
    if precision not in SCHEMES:
        near = difflib.get_close_matches(precision, PRECISIONS, 1, 0.3)
        raise UserError(f"{flag} {precision} is not known; {f'did you mean {near[0]}? ' if near else ''}"
                        f"There are {', '.join(PRECISIONS)}")
    scheme = SCHEMES[precision]
    if device not in scheme.devices:
        others = [name for name, other in SCHEMES.items() if device in other.devices]
        raise UserError(f"{flag} {precision} does not run on {device}; there, use {', '.join([*others, 'no_change'])}")
    if not _installed(scheme.module):
        raise UserError(f"{flag} {precision} needs {scheme.package}: pip install {scheme.package}")
    if scheme.module == "optimum.quanto" and scheme.bits < 8:
        _compile_helper(device, f"{flag} {precision}")


def check_names(network: torch.nn.Module, patterns: list[str], flag: str) -> None:
    """Refuse shell patterns that fit no layer of the network, nor a block of them. Raises `UserError`."""
    names = [name for name, _ in network.named_modules()]
    for pattern in patterns:
        if not fnmatch.filter(names, pattern):
            near = difflib.get_close_matches(pattern, names, 1, 0.4)
            raise UserError(f"{flag} {pattern} fits no layer of this {type(network).__name__}"
                            + (f"; did you mean {near[0]}?" if near else ": a * stands for any text, as in *.norm1.*"))


def _named(name: str, patterns: tuple[str, ...]) -> bool:
    """Whether a pattern fits a layer's name, or that of a block that it lies in."""
    words = name.split(".")
    names = [".".join(words[:count]) for count in range(1, len(words) + 1)]
    return any(fnmatch.filter(names, pattern) for pattern in patterns)


def apply(network: torch.nn.Module, precision: str, device: torch.device | str | None = None,
          skip: tuple[str, ...] = SKIP) -> int:
    """Quantise the linear layers of a frozen network in place -> how many. Before adapters are added.

    One layer at a time, so the peak is the network as it was and one layer; less where its files are mapped, as they
    are on Linux: what is read of them is forgotten again. device: where each layer goes to be quantised and stays
    (None: where it is); the rest of the network is the caller's to move. skip: shell patterns of names of layers, or of
    blocks of them, to leave alone; convolutions always are, and with nf4 layers whose inputs are no multiple of 64 (SDXL
    and SD3 have none). Never cast the network afterwards.
    """
    if precision == "no_change":
        return 0
    if any(p.requires_grad for p in network.parameters()):
        raise ValueError("only a frozen network is quantised: freeze it first, add adapters afterwards")
    names = [name for name, layer in network.named_modules() if type(layer) is torch.nn.Linear
             and not _named(name, skip)
             and (precision != "nf4-bnb" or layer.in_features % _BLOCK == 0)]
    files, done = _mapped_files(), 0
    for name in names:    # the list holds no layer: each old weight is freed as it is replaced
        layer = network.get_submodule(name)
        place, size = layer.weight.data_ptr(), layer.weight.nbytes
        in_file = any(start <= place < end for start, end in files)
        parent, _, last = name.rpartition(".")
        setattr(network.get_submodule(parent), last, _quantised(layer.to(device), SCHEMES[precision]).requires_grad_(False))
        if in_file:
            _forget_pages(place, size)
        if done // _TRIM != (done := done + size) // _TRIM:
            devices.free_memory(network.get_submodule(name).weight.device.type)
    if precision == "nf4-bnb":
        network.is_loaded_in_4bit = True    # PEFT then takes its adapters for 4-bit layers
    if precision.endswith("torchao"):    # PEFT says so once a layer; nothing here merges adapters into the base
        warnings.filterwarnings("ignore", message="TorchaoLoraLinear was instantiated without")
    return len(names)


def leave_out_of_ddp(network: torch.nn.Module) -> None:
    """Keep DistributedDataParallel from sending frozen weights around. Call when adapters are added, before `prepare`.

    Every process has read the same files; and torchao's tensors cannot be sent: DDP would fail.
    """
    names = [name for name, p in network.named_parameters() if not p.requires_grad]
    names += [name for name, _ in network.named_buffers()]
    torch.nn.parallel.DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(network, names)


def bytes_of(network: torch.nn.Module) -> int:
    """Memory of all weights and buffers in bytes, with the scales of quantised ones; what is shared counts once."""
    plain = {(part.data_ptr(), part.nbytes) for tensor in [*network.parameters(), *network.buffers()] for part in _parts(tensor)}
    return sum(size for _, size in plain)


class FrozenLinear(torch.nn.Linear):
    """A linear layer whose frozen weight is a tensor that can `dequantize()`."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return _Product.apply(x.to(self.weight.dtype), self.weight, self.bias)


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.weight = weight    # not save_for_backward: nothing is to move it off the device
        return F.linear(x, _dequantised(weight), bias)

    @staticmethod
    def backward(ctx, gradient):
        return gradient @ _dequantised(ctx.weight).to(gradient.dtype), None, None


def _dequantised(weight: torch.Tensor) -> torch.Tensor:
    if hasattr(weight, "qdata"):    # torchao's own goes through float32, with the same result: three times as slow
        return weight.qdata.to(weight.dtype).mul_(weight.scale.to(weight.dtype))
    return weight.dequantize()


def _quantised(layer: torch.nn.Linear, scheme: Scheme) -> torch.nn.Module:
    if scheme.module == "bitsandbytes":
        return _linear4bit(layer)
    weight = layer.weight.detach()
    if scheme.module == "torchao":
        from torchao import quantization
        quantization.quantize_(layer, getattr(quantization, scheme.dtype)(set_inductor_config=False))    # TF32 as it was
    else:
        from optimum import quanto
        dtype, options = quanto.qtypes[scheme.dtype], {"axis": 0, "optimized": False}    # optimised ones need kernels compiled
        if scheme.bits == 8:
            options["scale"] = quanto.AbsmaxOptimizer()(weight, qtype=dtype, axis=0)
        else:
            options["group_size"] = next((size for size in _GROUPS if layer.in_features % size == 0), None)
            options["scale"], options["shift"] = quanto.MaxOptimizer()(weight, qtype=dtype, axis=0,
                                                                       group_size=options["group_size"])
        layer.weight = torch.nn.Parameter(quanto.quantize_weight(weight, dtype, **options), requires_grad=False)
    layer.__class__ = FrozenLinear
    return layer


def _linear4bit(layer: torch.nn.Linear) -> torch.nn.Module:
    """bitsandbytes' layer with nf4 weights: blocks of 64, whose scales are quantised in turn. Also on a CPU."""
    from bitsandbytes import nn
    made = nn.Linear4bit(layer.in_features, layer.out_features, layer.bias is not None, compute_dtype=layer.weight.dtype,
                         quant_type="nf4", device="meta")
    made.weight = nn.Params4bit(layer.weight.detach(), quant_type="nf4", module=made).to(layer.weight.device)
    made.bias, made.training = layer.bias, layer.training
    made.support_avx512bf16_for_cpu = False    # a layout for inference, which has no gradient: it would be cut off in silence
    return made


def _parts(tensor: torch.Tensor):
    """The plain tensors that a weight consists of."""
    if hasattr(tensor, "__tensor_flatten__"):
        for name in tensor.__tensor_flatten__()[0]:
            yield from _parts(getattr(tensor, name))
        return
    yield tensor
    state = getattr(tensor, "quant_state", None)    # bitsandbytes'
    while state is not None:
        yield from (part for part in (state.absmax, state.code, state.offset) if isinstance(part, torch.Tensor))
        state = state.state2


def _mapped_files() -> list[tuple[int, int]]:
    """Where safetensors files are mapped into this process: a weight that was loaded is a page of its file there."""
    try:
        lines = [line.split() for line in Path("/proc/self/maps").read_text().splitlines() if line.endswith(".safetensors")]
    except OSError:    # not Linux
        return []
    return [tuple(int(end, 16) for end in line[0].split("-")) for line in lines]


def _forget_pages(place: int, size: int) -> None:
    """Let the whole pages of a dead weight go: the system drops them, and would read the file again if asked."""
    first, end = -(-place // mmap.PAGESIZE) * mmap.PAGESIZE, (place + size) // mmap.PAGESIZE * mmap.PAGESIZE
    if end > first:
        ctypes.CDLL(None).madvise(ctypes.c_void_p(first), ctypes.c_size_t(end - first), mmap.MADV_DONTNEED)


def _installed(module: str) -> bool:
    """Whether it is there, without importing it."""
    parent = module.split(".")[0]
    return bool(importlib.util.find_spec(parent)) and bool(importlib.util.find_spec(module))


def _compile_helper(device: str, flag: str) -> None:
    """quanto unpacks 4 and 2 bits by a function of its own that it compiles once. Raises `UserError` where it cannot."""
    name = {"cpu": "quanto_cpp", "cuda": "quanto_hip" if torch.version.hip else "quanto_cuda", "mps": "quanto_mps"}.get(device)
    if name is None:
        return    # plain torch
    needs = {"quanto_cpp": "g++ and ninja", "quanto_mps": "Xcode's command line tools and ninja",
             "quanto_hip": "ROCm's hipcc and ninja", "quanto_cuda": "the CUDA toolkit (nvcc), g++ and ninja"}[name]
    try:
        from optimum.quanto.library.extensions import get_extension
        _ = get_extension(name).lib
    except Exception as error:    # whatever a compiler or a disk may say
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        others = [other for other in SCHEMES if device in SCHEMES[other].devices and SCHEMES[other].module != "optimum.quanto"]
        raise UserError(f"{flag}: quanto compiles a helper at its first use, which needs {needs} and the right to write to "
                        f"its folder, and that failed ({reason}); {', '.join(others)} need no compiler") from error

"""The simulated device "npu": PrivateUse1 tensors whose bytes are host memory.

DLPack names PrivateUse1 "kDLExtDev" (12) and the host "kDLCPU" (1), so writing another device into a capsule before it is
consumed gives a tensor of the other device over the same memory. One Python fallback then serves every operator: it aliases
the arguments to the host, runs the host's kernel, and aliases the results back. Autograd, DDP and torch.save are PyTorch's own.
"""

import ctypes
import functools

import torch
import torch.utils.backend_registration
from torch._C import DispatchKey, DispatchKeySet

from torch_npu import _native

_KDL_CPU, _KDL_EXT = 1, 12
_pointer = ctypes.pythonapi.PyCapsule_GetPointer
_pointer.restype, _pointer.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]


class _DLTensor(ctypes.Structure):  # the head of DLManagedTensor
    _fields_ = [("data", ctypes.c_void_p), ("type", ctypes.c_int32), ("index", ctypes.c_int32)]


def _retag(t, kind, index=0):
    capsule = torch._C._to_dlpack(t.detach())
    head = _DLTensor.from_address(_pointer(capsule, b"dltensor"))
    head.type, head.index = kind, index
    return torch._C._from_dlpack(capsule)


def host(t):
    """The host tensor over an npu tensor's memory (same sizes and strides)."""
    return _retag(t, _KDL_CPU)


def npu(t, index=0):
    """The npu tensor over a host tensor's memory."""
    return _retag(t, _KDL_EXT, index)


def is_npu(x):
    return isinstance(x, torch.Tensor) and x.device.type == "npu"


# ---------------------------------------------------------------- operators
def _map(f, x):
    if type(x) in (list, tuple):
        return type(x)([_map(f, i) for i in x])
    if type(x) is dict:
        return {k: _map(f, v) for k, v in x.items()}
    return f(x)


_MIXED_OK = {  # operators that take host tensors beside device tensors on the real device too
    "aten::index.Tensor", "aten::index_put_", "aten::_index_put_impl_", "aten::index_put",
    "aten::_copy_from", "aten::_copy_from_and_resize", "aten::copy_", "aten::_to_copy",
    "aten::_unsafe_index.Tensor", "aten::_unsafe_index_put", "aten::is_set_to", "aten::index.Tensor_out",
}


def _generator(op, args, kwargs, default):
    """For an operator that draws: the device's generator, a host one in the same state, the new arguments."""
    names = [a.name for a in op._schema.arguments]
    if "generator" not in names:
        return None
    i, args, kwargs = names.index("generator"), list(args), dict(kwargs)
    real = (args[i] if i < len(args) else kwargs.get("generator")) or default
    shadow = real
    if real.device.type == "npu":
        shadow = torch.Generator()
        shadow.set_state(real.get_state())
    if i < len(args):
        args[i] = shadow
    else:
        kwargs["generator"] = shadow
    return real, shadow, args, kwargs


def run_on_host(op, *args, **kwargs):
    """The fallback of key PrivateUse1: every operator without a kernel of its own."""
    from torch_npu import npu as module  # the current device, generators

    name = op._name if hasattr(op, "_name") else str(op)
    back, index, mixed = {}, [None], []

    def down(x):
        if isinstance(x, torch.Tensor):
            if x.device.type == "npu":
                if index[0] is None:
                    index[0] = x.device.index
                elif index[0] != x.device.index:
                    raise RuntimeError(f"{name}: tensors on npu:{index[0]} and npu:{x.device.index}")
                h = host(x)
                back[id(h)] = (x, h)
                return h
            if x.device.type == "cpu" and x.dim() > 0:
                mixed.append(x)
            return x
        if isinstance(x, torch.device) and x.type == "npu":
            index[0] = x.index if x.index is not None else module.current_device()
            return torch.device("cpu")
        return x

    # An alias cannot be resized and kernels do resize out=: give them a tensor that can be.
    outs = {a.name: kwargs[a.name] for a in op._schema.arguments if a.is_out and is_npu(kwargs.get(a.name))}
    args, kwargs = _map(down, args), _map(down, kwargs)
    for key, x in outs.items():
        h = torch.empty(0, dtype=x.dtype) if x.is_contiguous() else torch.empty_strided(
            x.shape, x.stride(), dtype=x.dtype)
        kwargs[key] = h
        back[id(h)] = (x, h)
    if mixed and back and name not in _MIXED_OK and name.split(".")[0] not in _MIXED_OK:
        raise RuntimeError(f"Expected all tensors to be on the same device, but found at least two "
                           f"devices, npu:{index[0]} and cpu! (operator {name})")
    dev = index[0] if index[0] is not None else module.current_device()
    generator = _generator(op, args, kwargs, module.default_generators[dev])
    if generator is not None:
        args, kwargs = generator[2:]
    if kwargs.get("pin_memory"):
        kwargs = dict(kwargs, pin_memory=False)
    out = op(*args, **kwargs)
    if generator is not None and generator[0] is not generator[1]:
        generator[0].set_state(generator[1].get_state())

    def up(x):
        if not isinstance(x, torch.Tensor) or x.device.type != "cpu":
            return x
        if id(x) in back:
            return back[id(x)][0]
        return npu(x, dev)

    for original, h in back.values():  # an out= that was sized, a squeeze_, a transpose_
        if h.shape != original.shape or h.stride() != original.stride():
            original.data = npu(h, dev)
        elif h.numel() and h.data_ptr() != original.data_ptr():
            host(original).copy_(h)
    return _map(up, out)


def _copy_from(src, dst, non_blocking=False):
    to = host(dst) if is_npu(dst) else dst
    to.copy_(host(src) if is_npu(src) else src)
    return dst


def _copy_from_and_resize(src, dst):
    to = host(dst) if is_npu(dst) else dst
    if to.shape != src.shape:
        dst.resize_(src.shape)
        to = host(dst) if is_npu(dst) else dst
    to.copy_(host(src) if is_npu(src) else src)
    return dst


def _compatible(self, other):
    # module.to("npu") then keeps each Parameter and swaps its data, as on the real device: an
    # optimizer made before the move (accelerate's prepare) goes on pointing at the right tensors
    return True


def _convolution(x, weight, bias, stride, padding, dilation, transposed, output_padding, groups):
    return run_on_host(torch.ops.aten.convolution.default, x, weight, bias, stride, padding, dilation,
                       transposed, output_padding, groups)


def _convolution_backward(grad, x, weight, stride, padding, dilation, transposed, output_padding, groups,
                          output_mask):
    mask = list(output_mask)
    gx, gw, gb = run_on_host(torch.ops.aten.convolution_backward.default, grad, x, weight,
                             [weight.shape[1] * groups if transposed else weight.shape[0]], stride, padding,
                             dilation, transposed, output_padding, groups, mask)
    return gx, gw, gb


# ---------------------------------------------------------------- autocast
# The two lists of torch/csrc's autocast_mode.h that matter to this kind of model.
_LOWER = ("conv1d conv2d conv3d conv_transpose1d conv_transpose2d.input matmul mm mv linear addmm addmv addr "
          "bmm baddbmm addbmm chain_matmul einsum scaled_dot_product_attention prelu").split()
_FP32 = ("exp log log2 log10 log1p pow.Tensor_Scalar pow.Tensor_Tensor pow.Scalar reciprocal rsqrt softplus "
         "layer_norm native_layer_norm group_norm cosine_similarity mse_loss huber_loss smooth_l1_loss l1_loss "
         "nll_loss cumsum cumprod dist renorm norm.Scalar softmax.int log_softmax.int prod sum").split()
_AUTOCAST = DispatchKeySet(DispatchKey.AutocastPrivateUse1)


def _overload(name):
    packet, _, overload = name.partition(".")
    return getattr(getattr(torch.ops.aten, packet), overload or "default")


def _autocast(lib, name, fp32):
    op = _overload(name)

    def kernel(*args, **kwargs):
        to = torch.float32 if fp32 else torch.get_autocast_dtype("npu")

        def cast(x):
            ok = isinstance(x, torch.Tensor) and x.is_floating_point() and x.device.type == "npu" \
                and x.dtype is not torch.float64
            return x.to(to) if ok and x.dtype is not to else x

        with torch._C._ExcludeDispatchKeyGuard(_AUTOCAST):
            return op(*_map(cast, args), **_map(cast, kwargs))

    lib.impl(name, kernel, "AutocastPrivateUse1")


_keep = []


def install(module):
    module._library = _native.load()
    torch.utils.rename_privateuse1_backend("npu")
    torch.utils.generate_methods_for_privateuse1_backend()
    torch._register_device_module("npu", module)
    module.default_generators = [torch.Generator(torch.device("npu", i)) for i in range(module._COUNT)]
    everything, aten = torch.library.Library("_", "IMPL"), torch.library.Library("aten", "IMPL")
    everything.fallback(run_on_host, "PrivateUse1")
    everything.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")
    kernels = {"_copy_from": _copy_from, "_copy_from_and_resize": _copy_from_and_resize,
               "_has_compatible_shallow_copy_type": _compatible, "record_stream": lambda self, stream: None,
               "convolution_overrideable": _convolution, "convolution_backward_overrideable": _convolution_backward}
    for name in ("native_group_norm", "native_group_norm_backward", "native_layer_norm", "native_layer_norm_backward"):
        # PyTorch would take them apart, into views that tensors in channels_last do not allow
        kernels[name] = functools.partial(run_on_host, getattr(torch.ops.aten, name).default)
    for name, kernel in kernels.items():
        aten.impl(name, kernel, "PrivateUse1")
    for names, fp32 in ((_LOWER, False), (_FP32, True)):
        for name in names:
            _autocast(aten, name, fp32)
    torch.utils.backend_registration._generate_storage_methods_for_privateuse1_backend("npu")
    _keep.extend([everything, aten])    # a Library that is collected takes its kernels with it

"""Activations kept in main memory between the forward and the backward pass."""

import contextlib

import torch

from library.errors import UserError
from library.training import devices

SMALL = 1 << 16    # bytes: a smaller tensor stays where it is, for it costs more time to send than it frees memory


def check(offload: bool, device: str) -> None:
    """Refuse --offload_activations where it frees nothing. Raises `UserError`."""
    if offload and device == "cpu":
        raise UserError("--offload_activations: activations are in main memory already on a CPU; leave the flag out")
    if offload and device == "mps":
        raise UserError("--offload_activations: on Apple's chips the GPU's memory is main memory; use --gradient_checkpointing")


def activations(offload: bool, network: torch.nn.Module, device: str):
    """The context for a forward pass whose activations wait in main memory for the backward pass.

    Weights stay on the device: autograd saves them, too, and sending them would cost more than the activations.
    With gradient checkpointing only the inputs of blocks are activations: a saving on top of that. Does nothing where
    offload is False or the device is a CPU. Pinned memory is used where it is sent faster.
    """
    if not offload or device == "cpu":
        return contextlib.nullcontext()
    return to_main_memory(network, pin=devices.pins_memory(device))


def to_main_memory(network: torch.nn.Module, pin: bool):
    """The same without looking at the device: a context manager of `torch.autograd.graph`."""
    weights = {p.untyped_storage().data_ptr() for p in network.parameters() if _is_plain(p)}

    def pack(tensor):
        if not _is_plain(tensor) or tensor.nbytes < SMALL or tensor.untyped_storage().data_ptr() in weights:
            return None, tensor
        kept = torch.empty(tensor.size(), dtype=tensor.dtype, layout=tensor.layout, pin_memory=pin)
        return tensor.device, kept.copy_(tensor)

    def unpack(packed):
        device, tensor = packed
        return tensor if device is None else tensor.to(device, non_blocking=pin, copy=True)

    return torch.autograd.graph.saved_tensors_hooks(pack, unpack)


def _is_plain(tensor: torch.Tensor) -> bool:
    """A tensor with a storage of its own: no quantised or sharded one."""
    return type(tensor) in (torch.Tensor, torch.nn.Parameter)

"""Exponential moving average of weights, with the warm-up of diffusers' `EMAModel`."""

import contextlib

import torch


class EMA:
    """float32 averages of a network's trained parameters by name, on their device.

    After n updates the decay was min(most, (1 + s) / (10 + s)) with s = n - 1, so that the first update copies.
    """

    def __init__(self, network: torch.nn.Module, most: float):
        self.most, self.updates = most, 0
        self.averages = {name: p.detach().clone().float() for name, p in _trained(network)}
        for name, p in _trained(network):
            if hasattr(p, "ds_shape"):
                self.averages[name].ds_shape = p.ds_shape

    def decay(self) -> float:
        """Decay of the latest update."""
        step = max(self.updates - 1, 0)
        return 0.0 if step == 0 else min(self.most, (1 + step) / (10 + step))

    @torch.no_grad()
    def update(self, network: torch.nn.Module) -> None:
        self.updates += 1
        now = [p.detach().float() for _, p in _trained(network)]
        torch._foreach_lerp_(list(self.averages.values()), now, 1 - self.decay())

    @torch.no_grad()
    def load(self, averages: dict[str, torch.Tensor], updates: int) -> None:
        self.updates = updates
        for name, average in self.averages.items():
            average.copy_(averages[name])

    @contextlib.contextmanager
    def applied(self, network: torch.nn.Module):
        """Within this context the network holds the averages."""
        own = {name: p.detach().clone() for name, p in _trained(network)}
        _copy(self.averages, network)
        try:
            yield
        finally:
            _copy(own, network)


@torch.no_grad()
def _copy(values: dict[str, torch.Tensor], network: torch.nn.Module) -> None:
    for name, parameter in _trained(network):
        parameter.copy_(values[name])


def _trained(network: torch.nn.Module):
    """(name, parameter) of what a gradient changes; of DeepSpeed's ZeRO 3, the part of it that this process holds."""
    return ((name, getattr(p, "ds_tensor", p)) for name, p in network.named_parameters() if p.requires_grad)

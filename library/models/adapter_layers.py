"""What PEFT's LoRA layers lack: kohya's dropouts, pissa and olora that leave the base alone, DoRA's norms in float32."""

import functools
import types

import torch
from peft.tuners.lora.layer import LoraVariant
from peft.utils.integrations import dequantize_module_weight
from torch import nn


class ScaledWithin(LoraVariant):
    """Plain LoRA, scaled between its matrices, at `rank` numbers a token. PEFT scales what comes out, at the full width."""

    @staticmethod
    def forward(module, active_adapter, x, result, **_):
        down, up = module.lora_A[active_adapter], module.lora_B[active_adapter]
        return result + up(down(module.lora_dropout[active_adapter](x)) * module.scaling[active_adapter])


def full_weight(layer: nn.Module) -> torch.Tensor:
    """A layer's weight in float32, also where it is held quantised (bitsandbytes, torchao, optimum-quanto)."""
    weight = dequantize_module_weight(layer).detach()
    return (weight if type(weight) is torch.Tensor else weight.dequantize()).float()


def drop_ranks_and_modules(layer, name: str, rank_dropout: float, module_dropout: float) -> None:
    """kohya's: ranks are dropped a sample and the rest is scaled up; the whole update is dropped by one draw a call."""
    layer.lora_A[name].register_forward_hook(functools.partial(_drop_ranks, rank_dropout))
    layer.lora_B[name].register_forward_hook(functools.partial(_drop_module, module_dropout))


def _drop_ranks(p: float, module, inputs, output):
    """[B, r, h, w] of a convolution, [B, ..., r] of a linear layer."""
    if not p or not module.training:
        return output
    conv = isinstance(module, nn.Conv2d)
    kept = torch.rand(len(output), module.weight.shape[0], device=output.device) > p
    shape = (*kept.shape, 1, 1) if conv else (len(output), *[1] * (output.ndim - 2), -1)
    return output * kept.view(shape) / (1 - p)


def _drop_module(p: float, module, inputs, output):
    return output * 0 if p and module.training and torch.rand(1) < p else output


class _Down(nn.Linear):
    """The down matrix, and beside it the one it started from."""

    def forward(self, x):
        return nn.functional.linear(x, self.weight), nn.functional.linear(x, self.initial)


class _Up(nn.Linear):
    """The update less what it was at the start: 0 there, to the last bit."""

    def forward(self, both):
        return nn.functional.linear(both[0], self.weight) - nn.functional.linear(both[1], self.initial)


def start_from_weight(layer, name: str, init: str) -> None:
    """pissa, olora: factors of the weight itself. PEFT takes them out of the weight; here they are taken off the update.

    The same function and the same gradients, with a base that stays as it was (also where it is quantised).
    """
    base, down, up = layer.get_base_layer(), layer.lora_A[name], layer.lora_B[name]
    kept = base.weight
    base.weight = nn.Parameter(full_weight(base).clone(), requires_grad=False)
    if init == "pissa":
        layer.pissa_init(name, "pissa")
    else:
        layer.olora_init(name)
    base.weight = kept
    for module, kind in ((down, _Down), (up, _Up)):
        module.weight.data = module.weight.data.contiguous()
        module.register_parameter("initial", nn.Parameter(module.weight.detach().clone(), requires_grad=False))
        module.__class__ = kind


class _FloatNorm:
    """DoRA's norms in float32: PEFT has them in the precision of the base or of autocast, too coarse for a division."""

    def forward(self, x, *, base_layer, **options):
        if type(base_layer.weight.data) is not torch.Tensor:    # PEFT does not know quanto's
            base_layer = types.SimpleNamespace(weight=full_weight(base_layer), bias=base_layer.bias)
        return super().forward(x, base_layer=base_layer, **options)

    def get_lora_weight(self, lora_A, lora_B, adapter_name=None):    # noqa: N803
        with torch.autocast(lora_A.weight.device.type, enabled=False):
            return super().get_lora_weight(lora_A, lora_B, adapter_name=adapter_name)

    def get_weight_norm(self, weight, lora_weight, scaling, adapter_name=None):
        with torch.autocast(weight.device.type, enabled=False):
            return super().get_weight_norm(weight.float(), lora_weight.float(), scaling, adapter_name=adapter_name)


def measure_magnitude(layer, name: str) -> None:
    """Set DoRA's magnitude to the norms of the weight as it is, measured as the forward pass does."""
    dora, down, up = layer.lora_magnitude_vector[name], layer.lora_A[name], layer.lora_B[name]
    dora.__class__ = _with_float_norm(type(dora))
    with torch.no_grad():
        weight = full_weight(layer.get_base_layer())
        dora.weight.data = dora.get_weight_norm(weight, dora.get_lora_weight(down, up).reshape(weight.shape), layer.scaling[name])


@functools.cache
def _with_float_norm(kind: type) -> type:
    return type(kind.__name__, (_FloatNorm, kind), {})


def lora_weights(layer, name: str) -> dict[str, torch.Tensor]:
    """A LoRA layer's tensors by kohya's names: the update is up @ down * alpha / rank."""
    down, up = layer.lora_A[name], layer.lora_B[name]
    tensors = {"lora_down.weight": down.weight.detach(), "lora_up.weight": up.weight.detach()}
    if isinstance(down, _Down):
        tensors = {"lora_down.weight": torch.cat([down.weight, down.initial]).detach(),
                   "lora_up.weight": torch.cat([up.weight, -up.initial], dim=1).detach()}
    tensors["alpha"] = torch.tensor(layer.scaling[name] * len(tensors["lora_down.weight"]))
    if name in layer.lora_magnitude_vector:
        scale = layer.lora_magnitude_vector[name].weight.detach()    # [out], or [1, out, 1, 1] of a convolution
        tensors["dora_scale"] = scale.transpose(0, 1) if scale.ndim == 4 else scale.reshape(-1, 1)
    return tensors

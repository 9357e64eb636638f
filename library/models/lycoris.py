"""LyCORIS on a network: made from its configuration or from saved weights, in float32 whatever the base's precision.

The adapter is the submodule `network.lycoris`, so it moves, trains and is wrapped with the network.
"""

import contextlib
import functools
import importlib.util
import logging
import re

import torch
from torch import Tensor, nn

from library.errors import UserError
from library.models.adapter_layers import full_weight
from library.models.adapter_settings import Settings, nearest

ALGORITHMS = ("lora", "locon", "loha", "lokr", "glora", "full", "diag-oft")
OPTIONS = ("algo", "multiplier", "linear_dim", "linear_alpha", "conv_dim", "conv_alpha", "dropout", "rank_dropout",
           "module_dropout", "use_tucker", "use_cp", "use_conv_cp", "disable_conv_cp", "use_scalar", "block_size", "train_norm",
           "constraint", "rescaled", "dora_wd", "wd_on_output", "full_matrix", "bypass_mode", "unbalanced_factorization",
           "decompose_both", "factor", "preset", "apply_preset")
PREFIX = "lycoris"


def add(network: nn.Module, settings: Settings, modules: dict[str, tuple[int, float]] | None) -> None:
    """Put LyCORIS on a frozen network: as `settings.lycoris_config` says, or OFT on `modules`. Raises `UserError`."""
    with _quiet() as wrapper:
        if modules is not None:
            named = dict(network.named_modules())
            _attach(network, wrapper, [wrapper.DiagOFTModule(_key(name), named[name], 1.0, lora_dim=rank,
                                                             module_dropout=settings.module_dropout)
                                       for name, (rank, _) in modules.items()], 1.0)
            return
        config = check(settings.lycoris_config)
        preset = config.pop("apply_preset", None) or _named_preset(network, config.pop("preset", None))
        try:
            with _preset(wrapper, preset) as name:
                made = wrapper.create_lycoris(network, config.pop("multiplier", 1.0), config.pop("linear_dim", 4),
                                              config.pop("linear_alpha", 1), preset=name, **config)
        except (ValueError, KeyError, TypeError, AssertionError, RuntimeError, re.error) as error:
            raise UserError(f"lycoris_config: LyCORIS cannot be put on this {type(network).__name__}: {error!s:.200}") from error
        if not made.loras:
            kinds = sorted({type(module).__name__ for module in network.modules()})
            raise UserError(f"lycoris_config: apply_preset fits nothing in this {type(network).__name__}; its modules are of the "
                            f"classes {', '.join(kinds)}")
        for lora in made.loras:
            if lora.name == "full" and type(lora.org_module[0].weight.data) is not Tensor:
                raise UserError("lycoris_config: algo full trains the weights themselves, and these are quantised: use a base in "
                                "bf16, or another algo")
            if getattr(lora, "wd", False):    # its forward adds eps to the norm: then the quotient is 1 at the start
                lora.dora_scale.data += torch.finfo(torch.float32).eps
        _attach(network, wrapper, made.loras, made.multiplier)


def check(config: dict) -> dict:
    """A copy of the configuration, refused where LyCORIS would pass over a key or cannot train. Raises `UserError`."""
    if unknown := sorted(config.keys() - set(OPTIONS)):
        raise UserError(f"lycoris_config: {unknown[0]} is not known{nearest(unknown[0], OPTIONS)} (known: {', '.join(OPTIONS)})")
    if config.get("apply_preset") and config.get("preset"):
        raise UserError("lycoris_config: preset and apply_preset both say which modules get an adapter: leave one out")
    maps = [config.get("apply_preset", {}).get(name, {}) for name in ("module_algo_map", "name_algo_map")]
    for own in [config, *(own for each in maps for own in each.values())]:
        algo = own.get("algo", "lora")
        if own.get("wd_on_output") in (False, "false", "False"):
            raise UserError("lycoris_config: with wd_on_output false, LyCORIS could not read its own file back: leave it out")
        if algo not in ALGORITHMS:
            raise UserError(f"lycoris_config: algo {algo!r} is not one of {', '.join(ALGORITHMS)}: what else LyCORIS has could "
                            "not be trained, or not be read back")
        for name in ("linear_dim", "linear_alpha", "conv_dim", "conv_alpha", "dim", "alpha"):
            if name in own and not (isinstance(own[name], (int, float)) and own[name] > 0):
                raise UserError(f"lycoris_config: {name} is {own[name]!r}: a number above 0 is needed")
            if name.endswith("dim") and own.get(name, 0) != int(own.get(name, 0)):
                raise UserError(f"lycoris_config: {name} is {own[name]}: a rank is a whole number")
    return dict(config)


def rebuild(network: nn.Module, modules: dict[str, dict[str, Tensor]], multiplier: float = 1.0) -> None:
    """Put LyCORIS on a frozen network with these weights: name of the module -> LyCORIS' tensors. Raises `UserError`."""
    with _quiet() as wrapper:
        loras, named = [], dict(network.named_modules())
        for name, tensors in modules.items():
            state = {f"{_key(name)}.{key}": tensor for key, tensor in tensors.items()}
            kind, weights = wrapper.get_module(state, _key(name))
            try:
                loras.append(wrapper.make_module(kind, weights, _key(name), named[name]))
            except (AttributeError, RuntimeError, TypeError, ValueError) as error:
                raise UserError(f"the adapter's tensors for {name} ({', '.join(tensors)}) do not fit it: {error}") from error
            if "alpha" in tensors:    # whole LoKr matrices have none that counts, and LyCORIS makes it 1
                loras[-1].alpha.copy_(tensors["alpha"])
        _attach(network, wrapper, loras, multiplier)


def modules(network: nn.Module) -> dict[str, dict[str, Tensor]]:
    """Name of each adapted module -> LyCORIS' tensors, as it saves them; nothing for a network without LyCORIS."""
    if not hasattr(network, "lycoris"):
        return {}
    names = {id(module): name for name, module in network.named_modules()}
    return {names[id(lora.org_module[0])]: {key: tensor.detach() for key, tensor in lora.state_dict().items()}
            for lora in network.lycoris.loras}


@contextlib.contextmanager
def without(network: nn.Module):
    """Within this context the modules compute without LyCORIS. Its multiplier would not do: 0 leaves DoRA's direction."""
    loras = network.lycoris.loras if hasattr(network, "lycoris") else []
    multipliers = [lora.multiplier for lora in loras]
    try:
        for lora in loras:
            if hasattr(lora.org_module[0], "weight"):
                lora.org_module[0].forward = lora.org_forward
            else:
                lora.multiplier = 0.0    # "full" took the weight off the module: at 0 it computes with the one it kept
        yield
    finally:
        for lora, multiplier in zip(loras, multipliers, strict=True):
            lora.org_module[0].forward, lora.multiplier = lora.forward, multiplier


def module_of(network: nn.Module, parameter: str) -> str:
    """The module that an adapter's parameter belongs to, by name."""
    if not parameter.startswith("lycoris."):
        return parameter.partition(".lora_")[0].partition(".hada_")[0].partition(".lokr_")[0]
    if not hasattr(network.lycoris, "names"):
        network.lycoris.names = {_key(name): name for name, _ in network.named_modules()}
    return network.lycoris.names[parameter.split(".")[1]]


def _key(name: str) -> str:
    return f"{PREFIX}_{name}".replace(".", "_")


def _attach(network, wrapper, loras: list, multiplier: float) -> None:
    made = wrapper.LycorisNetwork(network, init_only=True)
    made.loras, made.multiplier = loras, multiplier
    for lora in loras:
        lora.multiplier = multiplier
        lora.float()    # "full" is made in the base's precision
        if not lora.is_quant:
            lora.op = functools.partial(_in_precision_of_input, lora.op)
            if hasattr(lora.org_module[0], "weight") and lora.name != "full":
                lora.__class__ = _with_float_weight(type(lora))
    made.apply_to()
    network.lycoris = made.to(next(network.parameters()).device).requires_grad_(True)


@functools.cache
def _with_float_weight(kind: type) -> type:
    """LyCORIS adds the update to the weight and takes the weight off again: in bf16, that rounds a small update to nothing."""
    return type(kind.__name__, (kind,), {"org_weight": property(lambda lora: full_weight(lora.org_module[0])),
                                         "_current_weight": lambda lora: full_weight(lora.org_module[0])})


def _in_precision_of_input(op, x, weight, bias=None, **options):
    return op(x, weight=weight.to(x.dtype), bias=None if bias is None else bias.to(x.dtype), **options)


@contextlib.contextmanager
def _quiet():
    """LyCORIS' wrapper module, while its logger says only what is wrong."""
    if not importlib.util.find_spec("lycoris"):
        raise UserError("this adapter needs LyCORIS: pip install lycoris-lora")
    from lycoris import wrapper
    level = wrapper.logger.level
    wrapper.logger.setLevel(logging.ERROR)
    try:
        yield wrapper
    finally:
        wrapper.logger.setLevel(level)


@contextlib.contextmanager
def _preset(wrapper, preset: dict | None):
    """A preset under a name, for this context alone: LyCORIS keeps presets in attributes of a class, one run into the next."""
    network, name = wrapper.LycorisNetwork, "of this run"
    kept = {key: value for key, value in vars(network).items() if key.isupper()}
    wrapper.PRESET[name] = {"enable_conv": True, **(preset or {})}
    try:
        yield name
    finally:
        del wrapper.PRESET[name]
        for key, value in kept.items():
            setattr(network, key, value)


def _named_preset(network, name: str | None) -> dict | None:
    """LyCORIS' own presets ("full", "attn-mlp", ...): what they say for this kind of network."""
    if name is None:
        return None
    from lycoris.config import PRESET
    if name not in PRESET:
        raise UserError(f"lycoris_config: there is no preset {name!r}{nearest(str(name), PRESET)} (known: {', '.join(PRESET)})")
    kind = "text_encoder" if type(network).__name__.startswith(("CLIP", "T5")) else "unet"
    preset = {key.removeprefix(f"{kind}_"): value for key, value in PRESET[name].items()}
    return {key: value for key, value in preset.items() if not key.startswith(("unet_", "text_encoder_"))}



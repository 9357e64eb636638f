"""Adapters that exist: merged into a model, put on one, and trained further."""

import collections
import dataclasses
import json
import warnings

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from library.errors import UserError
from library.models import adapters, lycoris
from library.models.adapter_delta import delta
from library.models.adapter_files import SD3, SETTINGS_KEY, Adapter, float_of, rank_of
from library.models.adapter_settings import Settings, nearest


def merge(adapter: Adapter, networks: dict[str, nn.Module], weight: float = 1.0) -> None:
    """Add the adapter, times `weight`, to the networks' own weights: computed in float32, kept in their precision.

    DoRA, OFT and GLoRA depend on the weights they find, so the order of several matters. Raises `UserError`: before anything
    is changed for a module that is not there or of another shape and for a quantised one, else for a sum that is not finite.
    """
    places = _places(adapter, networks)
    for module, _, key in places:
        if not module.weight.is_floating_point() or type(module.weight.data) is not Tensor:
            raise UserError(f"{key} is quantised, and an adapter of kind {adapter.kind} cannot be added to it: use the base in "
                            "bf16, or a LoRA, which is computed beside the weights")
    for module, own, key in places:
        added, bias = delta(own, module.weight)
        module.weight.data = _sum(module.weight, weight * added, key)
        if bias is not None:
            module.bias.data = _sum(module.bias, weight * bias, key)


def _sum(tensor: Tensor, added: Tensor, key: str) -> Tensor:
    new = (tensor.detach().float() + added).to(tensor.dtype)
    if not new.isfinite().all():
        raise UserError(f"{key} with the adapter is not finite in {tensor.dtype}: use a smaller weight, or copy the file again")
    return new


def check_fits(adapter: Adapter, networks: dict[str, nn.Module]) -> None:
    """Refuse an adapter that was made for other networks (which may be on the meta device). Raises `UserError`.

    Of a network that is None, nothing is looked at.
    """
    parts = [part for part, network in networks.items() if network is not None]
    modules = {key: own for key, own in adapter.modules.items() if key.partition(".")[0] in parts}
    _places(dataclasses.replace(adapter, modules=modules), networks)


def _places(adapter: Adapter, networks: dict[str, nn.Module]):
    """(the module, its tensors, its full name) of all of an adapter. Raises `UserError` before the first."""
    found, modules = [], {part: dict(network.named_modules()) for part, network in networks.items() if network is not None}
    for key, own in adapter.modules.items():
        part, _, name = key.partition(".")
        if part not in modules:
            raise UserError(f"the adapter also changes the {part}, which is not loaded here ({key}): load it, too")
        module = modules[part].get(name) or modules[part].get(name.removeprefix("text_model."))
        if isinstance(module, BaseTunerLayer):
            module = module.get_base_layer()
        if module is None or not hasattr(module, "weight"):
            raise UserError(f"the adapter was made for another model: this {part} has no {name}{nearest(name, modules[part])}")
        if not _fits(own, module):
            shapes = ", ".join(f"{kind} {tuple(tensor.shape)}" for kind, tensor in own.items() if tensor.ndim)
            raise UserError(f"the adapter was made for another model: {key} is {tuple(module.weight.shape)} here, in the adapter "
                            f"{shapes}")
        found.append((module, own, key))
    return found


def _fits(own: dict[str, Tensor], module: nn.Module) -> bool:
    conv = isinstance(module, nn.Conv2d)
    out = module.out_channels if conv else getattr(module, "out_features", module.weight.shape[0])
    into = module.in_channels if conv else getattr(module, "in_features", 1)
    kernel = module.kernel_size if conv else ()
    shape = (out, into, *kernel)
    if "lora_down.weight" in own:
        down, up, mid = own["lora_down.weight"], own["lora_up.weight"], own.get("lora_mid.weight", own["lora_down.weight"])
        ranks = up.shape[1] == mid.shape[0] and down.shape[0] == mid.shape[1 if "lora_mid.weight" in own else 0]
        return up.shape[0] == out and down.shape[1] == into and ranks and tuple(mid.shape[2:]) in (kernel, (1, 1))
    if "oft_blocks" in own:
        return own["oft_blocks"].ndim != 3 or own["oft_blocks"].shape[0] * own["oft_blocks"].shape[1] == out
    try:
        return delta({name: tensor.to("meta") if tensor.ndim else tensor for name, tensor in own.items()},
                     torch.empty(shape, device="meta"))[0].numel() == torch.Size(shape).numel()
    except RuntimeError:
        return False


def runs_beside(adapter: Adapter) -> bool:
    """Whether `apply` computes this adapter beside the weights: then it sees them as they are, whatever the order."""
    return adapter.kind == "lora" and not any("lora_mid.weight" in own for own in adapter.modules.values())


def apply(adapter: Adapter, networks: dict[str, nn.Module], weight: float = 1.0) -> None:
    """Have the networks compute with an adapter: a LoRA beside the frozen weights, by PEFT; any other kind merged into them.

    weight: how much of it, on top of LyCORIS' own multiplier. May be called again for another adapter. Raises `UserError`.
    """
    weight = weight * adapter.multiplier
    if not runs_beside(adapter):
        return merge(adapter, networks, weight)
    _places(adapter, networks)
    for part, network in networks.items():
        if own := _named_as_in(network, adapter.part(part)):
            name = f"adapter_{len(getattr(network, 'peft_config', {}))}"
            sizes = {module: (rank_of(tensors), float_of(tensors["alpha"])) for module, tensors in own.items()}
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="Already found a `peft_config`")    # several is what is meant
                adapters.add_peft(network, Settings("lora"), sizes, name)
            _load_peft(network, own, name)
            for layer in adapters.layers_of(network, name).values():
                layer.set_scale(name, weight)
            network.set_adapter(list(network.peft_config))    # all of them
            network.requires_grad_(False)


def _named_as_in(network: nn.Module, modules: dict[str, dict[str, Tensor]]) -> dict[str, dict[str, Tensor]]:
    known = {name for name, _ in network.named_modules()}
    return {name if name in known else name.removeprefix("text_model."): own for name, own in modules.items()}


def start_from(adapter: Adapter, unet, text_encoders: list, settings: Settings, te_settings: Settings | None = None,
               seed: int = 0) -> Settings:
    """`adapters.add` with the kind, modules, ranks, alphas and values of an adapter that exists -> the settings then.

    settings, te_settings: their dropouts count, and all of them for a text encoder that the adapter does not have. Raises
    `UserError` where the adapter changes a network that is not trained here, or was made for another model.
    """
    denoiser = "transformer" if adapter.family == SD3 else "unet"
    parts = dict(zip((denoiser, "text_encoder", "text_encoder_2", "text_encoder_3"), (unet, *text_encoders), strict=False))
    networks = {part: network for part, network in parts.items() if network is not None}
    _places(adapter, networks)
    used = settings
    for part, network in networks.items():
        own = _named_as_in(network, adapter.part(part))
        place = (network, []) if part == denoiser else (None, [network])
        if not own:
            adapters.add(*place, settings, te_settings, seed)
            continue
        taken = _settings_of(adapter, own, settings)
        used = taken if part == denoiser else used
        if adapter.kind in ("lycoris", "oft") or adapter.multiplier != 1:
            if taken.dropout or taken.rank_dropout or taken.module_dropout:
                raise UserError(f"an adapter of kind {adapter.kind} that exists is trained on without dropout: leave it out")
            adapters.targets(network, Settings(targets="all-linear"))    # refuses a second adapter
            network.requires_grad_(False)
            lycoris.rebuild(network, own, adapter.multiplier)
            adapters.freeze_idle(network)
        else:
            adapters.add(*place, taken, taken, seed)
            _load_peft(network, own, adapters.NAME)
    return used


def _settings_of(adapter: Adapter, own: dict[str, dict[str, Tensor]], settings: Settings) -> Settings:
    config = None
    if adapter.kind == "lycoris" or adapter.multiplier != 1:
        config = json.loads(adapter.metadata.get(SETTINGS_KEY, "{}")).get("lycoris_config") or {}
    sizes = {name: (rank_of(tensors) or 1, float_of(tensors["alpha"]) if "alpha" in tensors else 1.0)
             for name, tensors in own.items()}
    (rank, alpha), _ = collections.Counter(sizes.values()).most_common(1)[0]
    return dataclasses.replace(
        settings, kind=adapter.kind if config is None else "lycoris", rank=rank, targets=tuple(own), rslora=False, init="kaiming",
        alpha=None if adapter.kind == "oft" else alpha, conv_rank=None, conv_alpha=None, factor=-1, lycoris_config=config,
        rank_pattern={name: size[0] for name, size in sizes.items() if size[0] != rank},
        alpha_pattern={name: size[1] for name, size in sizes.items() if size[1] != alpha and adapter.kind != "oft"})


def _load_peft(network: nn.Module, modules: dict[str, dict[str, Tensor]], name: str) -> None:
    for module, layer in adapters.layers_of(network, name).items():
        own, device = modules[module], layer.get_base_layer().weight.device
        alpha = float_of(own["alpha"]) if "alpha" in own else 1.0
        rank = rank_of(own) or alpha    # of LoKr's whole matrices there is none: they count as they are
        layer.r[name], layer.scaling[name] = rank, alpha / rank
        if hasattr(layer, "lora_A"):
            layer.lora_alpha[name] = alpha
            pairs = [(layer.lora_A[name].weight, own["lora_down.weight"]), (layer.lora_B[name].weight, own["lora_up.weight"])]
            if "dora_scale" in own:
                pairs.append((layer.lora_magnitude_vector[name].weight, own["dora_scale"]))
            for parameter, tensor in pairs:
                parameter.data.copy_(tensor.reshape(parameter.shape))
            continue
        layer.alpha[name] = alpha
        for kind in layer.adapter_layer_names:    # of LoKr, which matrices are whole is the file's choice
            parameters = getattr(layer, kind)
            if kind in own:
                parameters[name] = nn.Parameter(own[kind].to(device, torch.float32, copy=True))
            elif name in parameters:
                del parameters[name]

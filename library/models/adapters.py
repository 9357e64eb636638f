"""Adapters on frozen networks: put on, trained, switched off, saved for an exact restart. PEFT and LyCORIS do the work.

Networks come as {"unet": ..., "text_encoder": ..., "text_encoder_2": ...}, of SD3 with "transformer" and "text_encoder_3".
Import this before diffusers: it looks for PEFT once.
"""

import collections
import contextlib
import dataclasses
import re

import torch
from torch import Tensor, nn

from library.errors import UserError
from library.training.imports import alone

with alone("peft"):
    import peft
    from peft.tuners.tuners_utils import BaseTunerLayer

from library.models import adapter_layers, lycoris
from library.models.adapter_settings import Rates, Settings, block_of, check, nearest

NAME = "default"    # PEFT's name for the adapter that is trained
# of diffusers' networks (SD3's second stream is add_*, ff_context), of CLIP and of T5
SUFFIXES = {"attention": ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out", "q_proj",
                          "k_proj", "v_proj", "out_proj", *(f"SelfAttention.{name}" for name in "qkvo"))}
SUFFIXES["attention-ff"] = (*SUFFIXES["attention"], "ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2",
                            "fc1", "fc2", "DenseReluDense.wi_0", "DenseReluDense.wi_1", "DenseReluDense.wo")
SUFFIXES["convolutions"] = (*SUFFIXES["attention-ff"], "proj_in", "proj_out", "conv1", "conv2", "conv_shortcut",
                            "downsamplers.0.conv", "upsamplers.0.conv")
KOHYA_CLASSES = {"Transformer2DModel", "JointTransformerBlock", "CLIPAttention", "CLIPSdpaAttention", "CLIPMLP", "T5Attention",
                 "T5DenseGatedActDense"}
KOHYA_CONV_CLASSES = {"ResnetBlock2D", "Downsample2D", "Upsample2D"}
_BLOCK = re.compile(r"transformer_blocks\.(\d+)\.")    # of SD3, by its number


def add(unet, text_encoders: list, settings: Settings, te_settings: Settings | None = None, seed: int = 0) -> None:
    """Put an adapter on each network, in place, with initial values drawn from `seed` alone.

    Adapter weights are float32 whatever the network's precision, all else is frozen, and the output is as it was.
    te_settings: of the text encoders; None is as `settings`, at the layers of the same preset ("attention" where modules are
    named). Of SDXL's first text encoder the last layer is not read: its adapter stays as it starts. Nothing is changed
    where a `UserError` is raised: for settings that cannot be, a module that is not there, an adapter put on before.
    """
    if te_settings is None:
        preset = settings.targets if isinstance(settings.targets, str) else "attention"
        te_settings = dataclasses.replace(settings, targets=preset, rank_pattern={}, alpha_pattern={}, conv_rank=None,
                                          conv_alpha=None, blocks=None)
    wanted = [(network, own) for network, own in [(unet, settings), *((te, te_settings) for te in text_encoders)]
              if network is not None]
    for own in {id(own): own for _, own in wanted}.values():
        check(own)
    chosen = [None if own.kind == "lycoris" else targets(network, own) for network, own in wanted]
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)    # new weights are drawn on the CPU, wherever they go
        for (network, own), modules in zip(wanted, chosen, strict=True):
            network.requires_grad_(False)
            if own.kind in ("lycoris", "oft"):
                lycoris.add(network, own, modules)
            else:
                add_peft(network, own, modules)
            freeze_idle(network)


def targets(network: nn.Module, settings: Settings) -> dict[str, tuple[int, float]]:
    """The modules that get an adapter: name -> rank and alpha. Raises `UserError` naming the nearest module there is."""
    modules = dict(network.named_modules())
    if any(isinstance(module, BaseTunerLayer) for module in modules.values()) or hasattr(network, "lycoris"):
        raise UserError(f"this {type(network).__name__} has an adapter already: merge it, or load the network anew")
    layers = {name: module for name, module in modules.items() if isinstance(module, (nn.Linear, nn.Conv2d))}
    given = settings.targets
    if given == "all-linear":
        names = [name for name, layer in layers.items() if isinstance(layer, nn.Linear)]
    elif given == "kohya":
        kinds = KOHYA_CLASSES | (KOHYA_CONV_CLASSES if settings.conv_rank else set())
        heads = tuple(name + "." for name, module in modules.items() if type(module).__name__ in kinds)
        names = [name for name, layer in layers.items() if name.startswith(heads) and not _large(layer)]
    else:
        words = SUFFIXES[given] if isinstance(given, str) else tuple(given)
        fits = {word: [name for name in layers if name == word or name.endswith("." + word)] for word in words}
        for word in words if not isinstance(given, str) else ():
            if not fits[word]:
                known = {".".join(name.split(".")[-n:]) for name in layers for n in (1, 2, 3)} | layers.keys()
                raise UserError(f"no linear layer or convolution of this {type(network).__name__} is named {word}"
                                f"{nearest(word, known)}")
        found = {name for each in fits.values() for name in each}
        names = [name for name in layers if name in found]
    if settings.conv_rank and isinstance(given, str):
        heads = tuple(name + "." for name, module in modules.items() if type(module).__name__ in KOHYA_CONV_CLASSES)
        names += [name for name, layer in layers.items() if name.startswith(heads) and _large(layer) and name not in names]
    elif settings.conv_rank and not any(_large(layers[name]) for name in names):
        raise UserError(f"conv_rank {settings.conv_rank} has no effect: no convolution larger than 1x1 is named")
    if settings.blocks is not None:
        there = {int(block[1]) for name in layers if (block := _BLOCK.match(name))}
        if wrong := [number for number in settings.blocks if number not in there]:
            raise UserError(f"this {type(network).__name__} has no block {wrong[0]}, only 0 to {max(there, default=-1)}")
        names = [name for name in names if (block := _BLOCK.match(name)) and int(block[1]) in settings.blocks]
    chosen = {name: _rank_of(name, layers[name], settings) for name in names}
    if not (chosen := {name: both for name, both in chosen.items() if both[0]}):
        raise UserError(f"these settings leave no layer of this {type(network).__name__} with an adapter: check the targets and "
                        "the rank_pattern")
    for name, (rank, _) in chosen.items() if settings.init in ("pissa", "olora") else ():
        if not isinstance(layers[name], nn.Linear) or rank > min(layers[name].weight.shape):
            raise UserError(f"init {settings.init} takes factors of a linear layer's weight, at most as many as it has: {name} "
                            f"is {tuple(layers[name].weight.shape)}, rank {rank}; name other targets or use init kaiming")
    return chosen


def _large(layer: nn.Module) -> bool:
    return isinstance(layer, nn.Conv2d) and layer.kernel_size != (1, 1)


def _rank_of(name: str, layer: nn.Module, s: Settings) -> tuple[int, float]:
    rank, alpha = s.rank, s.alpha
    if _large(layer) and s.conv_rank:
        rank, alpha = s.conv_rank, s.conv_alpha
    for pattern, of_pattern in s.rank_pattern.items() if name not in s.rank_pattern else [(name, s.rank_pattern[name])]:
        if name == pattern or re.search(rf"(^|\.)({pattern})(\.|$)", name):
            rank = of_pattern
            break
    for pattern, of_pattern in s.alpha_pattern.items() if name not in s.alpha_pattern else [(name, s.alpha_pattern[name])]:
        if name == pattern or re.search(rf"(^|\.)({pattern})(\.|$)", name):
            alpha = of_pattern
            break
    return rank, float(rank) if alpha is None else float(alpha)


def add_peft(network: nn.Module, s: Settings, modules: dict[str, tuple[int, float]], adapter: str = NAME) -> None:
    """Put a PEFT adapter of this name on these modules (name -> rank and alpha)."""
    (rank, alpha), _ = collections.Counter(modules.values()).most_common(1)[0]
    by_rank, by_alpha = collections.defaultdict(list), collections.defaultdict(list)
    for name, (own_rank, own_alpha) in modules.items():
        by_rank[own_rank].append(re.escape(name))
        by_alpha[own_alpha].append(re.escape(name))
    common = {"r": rank, "target_modules": list(modules),    # one pattern a rank: PEFT tries them in turn for every module
              "rank_pattern": {"|".join(names): each for each, names in by_rank.items() if each != rank},
              "alpha_pattern": {"|".join(names): each for each, names in by_alpha.items() if each != alpha}}
    if s.kind in ("lora", "dora"):
        start = s.init if s.init == "gaussian" else True
        config = peft.LoraConfig(lora_alpha=alpha, lora_dropout=s.dropout, use_rslora=s.rslora, use_dora=s.kind == "dora",
                                 init_lora_weights=start, **common)
    elif s.kind == "loha":
        config = peft.LoHaConfig(alpha=alpha, rank_dropout=s.rank_dropout, module_dropout=s.module_dropout, **common)
    else:
        config = peft.LoKrConfig(alpha=alpha, rank_dropout=s.rank_dropout, module_dropout=s.module_dropout,
                                 decompose_factor=s.factor, **common)
    with alone():    # of the packages that hold weights in few bits, PEFT asks those that are in use
        network.add_adapter(config, adapter_name=adapter)
    for layer in layers_of(network, adapter).values():
        for name, tensor in layer.named_parameters():
            if adapter in name.split("."):
                tensor.data = tensor.data.float()
        if s.kind == "dora":
            adapter_layers.measure_magnitude(layer, adapter)
        if s.init in ("pissa", "olora"):
            adapter_layers.start_from_weight(layer, adapter, s.init)
        elif s.kind == "lora":
            layer.lora_variant[adapter] = adapter_layers.ScaledWithin()
        if s.kind == "lokr" and adapter in layer.lokr_w1 and adapter in layer.lokr_w2:    # both whole: as LyCORIS has it
            layer.alpha[adapter], layer.scaling[adapter] = float(layer.r[adapter]), 1.0
        if s.kind == "lora" and (s.rank_dropout or s.module_dropout):
            adapter_layers.drop_ranks_and_modules(layer, adapter, s.rank_dropout, s.module_dropout)


def leave_casts_to_autocast(network: nn.Module) -> None:
    """For runs in mixed precision, where every call is under autocast: the same bits with fewer casts.

    PEFT brings each input to the float32 of the adapter's weights, and autocast brings both back. DoRA is left as it is: it
    also divides by norms of float32.
    """
    for layer in layers_of(network).values():
        layer.cast_input_dtype_enabled = bool(getattr(layer, "lora_magnitude_vector", None))


def layers_of(network: nn.Module, adapter: str = NAME) -> dict[str, BaseTunerLayer]:
    """The layers that carry the PEFT adapter, by the name of the layer they stand in for."""
    return {name: module for name, module in network.named_modules()
            if isinstance(module, BaseTunerLayer) and adapter in module._get_available_adapters()}


def weights(network: nn.Module) -> dict[str, dict[str, Tensor]]:
    """The trained adapter: name of the module -> its tensors by kohya's and LyCORIS' names, as `adapter_files` has them.

    rslora is told by an alpha that gives the same scale; pissa and olora as factors of twice the rank, for the base as it was.
    """
    modules = lycoris.modules(network)
    for name, layer in layers_of(network).items():
        if hasattr(layer, "lora_A"):
            modules[name] = adapter_layers.lora_weights(layer, NAME)
        else:
            kinds = [kind for kind in layer.adapter_layer_names if NAME in getattr(layer, kind)]
            modules[name] = {kind: getattr(layer, kind)[NAME].detach() for kind in kinds}
            modules[name]["alpha"] = torch.tensor(layer.scaling[NAME] * layer.r[NAME])
    return modules


def freeze_idle(network) -> None:
    """SDXL reads the hidden states before the last layer of CLIPTextModel: what lies behind has no gradient."""
    if type(network).__name__ == "CLIPTextModel":
        last = network.config.num_hidden_layers - 1
        for name, tensor in network.named_parameters():
            if f"layers.{last}." in name or f"layers_{last}_" in name:
                tensor.requires_grad_(False)


def trained(network: nn.Module) -> dict[str, nn.Parameter]:
    """What is trained of a network with an adapter, by names that stay the same from run to run."""
    return {name: tensor for name, tensor in network.named_parameters() if tensor.requires_grad}


def state_dict(network: nn.Module) -> dict[str, Tensor]:
    """The adapter's own tensors (not copies: take them once the network is on its device), trained or not, for a restart."""
    return {name: getattr(tensor, "ds_tensor", tensor.detach()) for name, tensor in network.named_parameters()    # ZeRO 3's part
            if name.startswith("lycoris.") or (NAME in name.split(".") and ".base_layer." not in name)}


def load_state_dict(network: nn.Module, state: dict[str, Tensor]) -> None:
    """Put the values of `state_dict` back, bit for bit. Raises `UserError` where they are of another adapter."""
    own = state_dict(network)
    if wrong := sorted(name for name in own.keys() | state.keys()
                       if name not in own or name not in state or own[name].shape != state[name].shape):
        raise UserError(f"the saved adapter is another one than this run's ({len(wrong)} tensors differ, first {wrong[0]}): give "
                        "the flags it was made with, or start anew in another --output_dir")
    for name, tensor in own.items():
        tensor.copy_(state[name])


def describe(networks: dict[str, nn.Module], kind: str) -> str:
    """One line on what is trained: "lora: 23.2 M parameters (93 MB) on 560 layers of the unet"."""
    parts, count = [], 0
    for part, network in networks.items():
        own = trained(network)
        layers = {lycoris.module_of(network, name) for name in own}
        count += sum(tensor.numel() for tensor in own.values())
        parts.append(f"{len(layers)} layers of the {part}")
    return f"{kind}: {count / 1e6:.3g} M parameters ({4 * count / 1e6:.3g} MB) on {', '.join(parts)}"


@contextlib.contextmanager
def without(network: nn.Module):
    """Within this context the network computes what it did before it had an adapter, bit for bit (a prior, for instance).

    `network` is the bare one, not its DDP wrapper.
    """
    wanted = {tensor: tensor.requires_grad for tensor in network.parameters()}    # PEFT's switch sets it as it likes
    layers = [module for module in network.modules() if isinstance(module, BaseTunerLayer)]
    try:
        for layer in layers:
            layer.enable_adapters(False)
        with lycoris.without(network):
            yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)
        for tensor, flag in wanted.items():
            tensor.requires_grad_(flag)


def parameter_groups(networks: dict[str, nn.Module], learning_rates: dict[str, float], rates: Rates = Rates()) -> list[dict]:    # noqa: B008
    """Groups for a torch optimizer, each with "params", "lr" and a "name" such as "unet 4 up" (network, block, LoRA+).

    A network whose rate is 0 and a block whose factor is 0 are frozen. Raises `UserError` where nothing is left, for
    LoRA+ on an adapter without an up matrix, and for factors of another number of blocks.
    """
    groups = {}
    for part, network in networks.items():
        ratio = rates.loraplus_text_encoder if part.startswith("text_encoder") else rates.loraplus_unet
        ups = 0
        for name, tensor in trained(network).items():
            up = ratio != 1 and (f"lora_B.{NAME}." in name or ".lora_up." in name)
            ups += up
            lr, label = learning_rates[part] * (ratio if up else 1), part
            if part == "unet" and rates.blocks:
                block = block_of(lycoris.module_of(network, name), network.config)
                if block is None or block >= len(rates.blocks):
                    raise UserError(f"the block rates are for {len(rates.blocks)} blocks, and {name} lies in none of them")
                lr, label = lr * rates.blocks[block], f"{part} {block}"
            if lr == 0:
                tensor.requires_grad_(False)
                continue
            label += " up" if up else ""
            groups.setdefault(label, {"params": [], "lr": lr, "name": label})["params"].append(tensor)
        if ratio != 1 and not ups:
            raise UserError("LoRA+ (loraplus_lr_ratio) gives up matrices a rate of their own: lora, dora and locon have them, "
                            "this adapter has none")
    if not groups:
        raise UserError("all learning rates of the adapter are 0: nothing would be trained")
    return list(groups.values())

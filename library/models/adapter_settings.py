"""What an adapter is to be: kind, rank, alpha, where, dropout; and kohya's names for the same."""

import difflib
import json
import math
import re
from dataclasses import dataclass, field

import numpy as np

from library.errors import UserError
from library.models import single_file

KINDS = ("lora", "dora", "loha", "lokr", "oft", "lycoris")
PRESETS = ("attention", "attention-ff", "convolutions", "kohya", "all-linear")
INITS = ("kaiming", "gaussian", "pissa", "olora")
# of SDXL's UNet, what is not diffusers' default
SDXL_UNET = {"layers_per_block": 2, "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
             "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"), "block_out_channels": (320, 640, 1280),
             "transformer_layers_per_block": (1, 2, 10), "attention_head_dim": (5, 10, 20), "cross_attention_dim": 2048,
             "use_linear_projection": True, "addition_embed_type": "text_time", "addition_time_embed_dim": 256,
             "projection_class_embeddings_input_dim": 2816, "sample_size": 128}
KOHYA_ARGS = ("conv_dim", "conv_alpha", "block_dims", "block_alphas", "conv_block_dims", "conv_block_alphas", "rank_dropout",
              "module_dropout", "down_lr_weight", "mid_lr_weight", "up_lr_weight", "block_lr_zero_threshold",
              "loraplus_lr_ratio", "loraplus_unet_lr_ratio", "loraplus_text_encoder_lr_ratio")
RATE_ARGS = KOHYA_ARGS[8:]


@dataclass(frozen=True)
class Settings:
    """An adapter on one network.

    rank: of the factors; for "oft" the size of its blocks. alpha: the update is scaled by alpha / rank (rslora: by
    alpha / sqrt(rank)); None is the rank. targets: a preset, or the names of modules ("to_q", "mid_block.attentions.0.proj_in").
    conv_rank, conv_alpha: of convolutions larger than 1x1, which every preset then has, too (with "kohya" also the small
    layers beside them); None is as the rest.
    rank_pattern, alpha_pattern: part of a module's name (a regular expression of whole words between dots) -> its rank or
    alpha; the first that fits counts, rank 0 leaves the module out. dropout: of the input; rank_dropout: of ranks;
    module_dropout: of the whole update, one draw a call. factor: LoKr's (-1: near the square root). blocks: of a transformer,
    the only ones with an adapter; None: all.
    """

    kind: str = "lora"
    rank: int = 16
    alpha: float | None = None
    targets: str | tuple[str, ...] = "attention"
    dropout: float = 0.0
    rank_dropout: float = 0.0
    module_dropout: float = 0.0
    rslora: bool = False
    init: str = "kaiming"
    conv_rank: int | None = None
    conv_alpha: float | None = None
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    factor: int = -1
    blocks: tuple[int, ...] | None = None
    lycoris_config: dict | None = None


@dataclass(frozen=True)
class Rates:
    """Learning rates within a network. loraplus: how many times the rate the up matrices have (LoRA+), a network each.

    blocks: a factor a block of the UNet, as `block_rates` makes them; None is 1 for all.
    """

    loraplus_unet: float = 1.0
    loraplus_text_encoder: float = 1.0
    blocks: tuple[float, ...] | None = None


def float_of(alpha) -> float:
    """A float32 tensor as the shortest number that means it: 0.7, not 0.699999988."""
    return float(str(np.float32(alpha.item())))


def nearest(word: str, words) -> str:
    """", did you mean X?" or nothing."""
    found = difflib.get_close_matches(word, list(words), n=1, cutoff=0.5)
    return f"; did you mean {found[0]}?" if found else ""


def check(settings: Settings) -> None:
    """Refuse what no adapter can be. Raises `UserError` naming the knob and what to do."""
    s = settings
    for what, value, known in (("kind", s.kind, KINDS), ("initial value", s.init, INITS),
                               *([("target preset", s.targets, PRESETS)] if isinstance(s.targets, str) else [])):
        if value not in known:
            raise UserError(f"there is no adapter {what} {value!r}{nearest(value, known)} (there are {', '.join(known)})")
    for name in ("rank", "conv_rank"):
        if getattr(s, name) is not None and getattr(s, name) < 1:
            raise UserError(f"the adapter's {name} is {getattr(s, name)}: it must be 1 or more (16 is usual)")
    for name, alpha in (("alpha", s.alpha), ("conv_alpha", s.conv_alpha), *s.alpha_pattern.items()):
        if alpha is not None and not (alpha > 0 and math.isfinite(alpha)):
            raise UserError(f"the adapter's {name} is {alpha}: the update is multiplied by it, so it must be above 0; leave it "
                            "out to have the rank")
    for name in ("dropout", "rank_dropout", "module_dropout"):
        if not 0 <= getattr(s, name) < 1:
            raise UserError(f"the adapter's {name} is {getattr(s, name)}: it is a probability, 0 or more and below 1")
    if (s.kind == "lycoris") != (s.lycoris_config is not None):
        raise UserError("a lycoris adapter and its lycoris_config come together: give both (--lora_type lycoris "
                        "--lycoris_config config/lycoris_config.json) or neither")
    from_weights = s.init in ("pissa", "olora")
    for given, right, why in (
            (s.dropout, s.kind in ("lora", "dora") and not from_weights, "dropout is for lora and dora, not with pissa or olora"),
            (s.rank_dropout, s.kind in ("lora", "loha", "lokr") and not from_weights,
             "rank_dropout is for lora, loha and lokr, not with pissa or olora"),
            (s.module_dropout, s.kind not in ("dora", "lycoris") and not from_weights,
             "module_dropout is for lora, loha, lokr and oft, not with pissa or olora"),
            (s.rslora, s.kind in ("lora", "dora"), "rank stabilisation (rslora) is for lora and dora"),
            (s.init != "kaiming", s.kind == "lora" or (s.kind == "dora" and not from_weights),
             "pissa and olora are for lora, gaussian for lora and dora: the others have initial values of their own"),
            (s.alpha is not None, s.kind != "oft", "programs disagree on what alpha means for oft: leave it out"),
            (s.factor != -1, s.kind == "lokr", "factor is for lokr"),
            (s.blocks is not None, s.kind != "lycoris", "blocks are named in its lycoris_config")):
        if given and not right:
            kind = f"{s.kind} with init {s.init}" if from_weights else s.kind
            raise UserError(f"an adapter of kind {kind} cannot have this: {why}")


def block_of(module: str, unet_config) -> int | None:
    """The block of the UNet that a module lies in, counted as kohya counts: 0 the embeddings, input blocks from 1, ...

    SDXL has 23: 0, 1-9 input, 10-12 middle, 13-21 output, 22 out. None: not a module of the UNet.
    """
    names = single_file.UNET_NAMES | single_file.unet_blocks(unet_config)
    found = next((names[head] for head in names if module == head or module.startswith(head + ".")), None)
    if found is None:
        return None
    first, inputs = found.split(".")[0], _counts(unet_config)[0]
    if first in ("time_embed", "label_emb"):
        return 0
    if first == "out":
        return sum(_counts(unet_config)) + 1
    return {"input_blocks": 1, "middle_block": 1 + inputs, "output_blocks": 4 + inputs}[first] + int(found.split(".")[1])


def _counts(unet_config) -> tuple[int, int, int]:
    """Numbers of input, middle and output blocks: 9, 3, 9 for SDXL."""
    layers, levels = unet_config["layers_per_block"], len(unet_config["down_block_types"])
    layers = sum([layers] * levels if isinstance(layers, int) else layers)
    return layers + levels, 3, layers + levels    # with conv_in, and each downsampling but the last that there is not


def block_rates(down: str | None, mid: str | None, up: str | None, zero_threshold: float = 0.0,
                unet_config=SDXL_UNET) -> tuple[float, ...] | None:
    """kohya's down_lr_weight, mid_lr_weight, up_lr_weight -> a factor a block, for `Rates.blocks`.

    Each is "0.5,1,..." (9, 3 and 9 numbers for SDXL) or, for down and up, a shape: cosine, sine, linear, reverse_linear,
    zeros, with "+0.25" to add. What is not given is 1; a factor of at most zero_threshold is 0, which freezes the block.
    Raises `UserError` for a wrong count or an unknown shape.
    """
    if down is None and mid is None and up is None:
        return None
    factors = [1.0]
    for name, given, count in zip(("down_lr_weight", "mid_lr_weight", "up_lr_weight"), (down, mid, up), _counts(unet_config),
                                  strict=True):
        values = [1.0] * count if given is None else _shape(name, str(given), count)
        factors += [value if given is None or value > zero_threshold else 0.0 for value in values]
    return (*factors, 1.0)


def _shape(name: str, text: str, count: int) -> list[float]:
    ramp = [i / (count - 1) for i in range(count)]
    shapes = {"sine": [math.sin(math.pi * x / 2) for x in ramp], "linear": ramp, "zeros": [0.0] * count}
    shapes |= {"cosine": shapes["sine"][::-1], "reverse_linear": ramp[::-1]}
    word, _, added = text.partition("+")
    try:
        if name != "mid_lr_weight" and word.strip() in shapes:
            return [value + (float(added) if added else 0.0) for value in shapes[word.strip()]]
        values = [float(value) for value in text.split(",")]
    except ValueError:
        known = "" if name == "mid_lr_weight" else f", or one of {', '.join(shapes)}, such as cosine+0.25"
        raise UserError(f"{name}={text} is not {count} numbers with commas{known}{nearest(word, shapes)}") from None
    if len(values) != count or min(values) < 0:
        raise UserError(f"{name}={text}: {count} numbers of 0 or more are needed, one a block, not {len(values)}")
    return values


def from_kohya(network_module: str, dim: int | None, alpha: float | None, args: dict[str, str],
               dropout: float | None = None, unet_config=SDXL_UNET) -> tuple[Settings, Rates]:
    """kohya's --network_module, --network_dim (4), --network_alpha (1), --network_args and --network_dropout.

    networks.lora is the preset "kohya" (with conv_dim also the larger convolutions); lycoris.kohya is LyCORIS with its
    arguments. Raises `UserError` for another module, an unknown argument, or a list of the wrong length.
    """
    dim, alpha, args = dim or 4, 1.0 if alpha is None else alpha, {key: str(value) for key, value in args.items()}
    rates = _rates(args, unet_config)
    if network_module == "lycoris.kohya":
        config = {"linear_dim": dim, "linear_alpha": alpha, "preset": "full"}
        config |= {name: _plain(value) for name, value in args.items() if name not in RATE_ARGS}
        config |= {"dropout": dropout} if dropout else {}
        return Settings("lycoris", rank=dim, lycoris_config=config), rates
    if network_module != "networks.lora":
        raise UserError(f"--network_module {network_module} is not known: there are networks.lora and lycoris.kohya (for OFT use "
                        "--lora_type oft)")
    if unknown := sorted(args.keys() - set(KOHYA_ARGS)):
        raise UserError(f"--network_args {unknown[0]} is not known to networks.lora{nearest(unknown[0], KOHYA_ARGS)}")
    conv_dim = _number("conv_dim", args.get("conv_dim"), int)
    conv_alpha = _number("conv_alpha", args.get("conv_alpha", 1.0), float)
    ranks, alphas = {}, {}
    total = sum(_counts(unet_config)) + 2
    lists = {name: [_number(name, value, kind) for value in args[name].split(",")] if name in args else None for name, kind in (
        ("block_dims", int), ("block_alphas", float), ("conv_block_dims", int), ("conv_block_alphas", float))}
    for name, values in lists.items():
        if values is not None and len(values) != total:
            raise UserError(f"--network_args {name} has {len(values)} numbers: {total} are needed, one a block")
    if any(values is not None for values in lists.values()):
        heads = _heads(unet_config)
        conv_dims = lists["conv_block_dims"] or [conv_dim or 0] * total
        conv_dim = max(conv_dims) or None
        for dims, a, large in ((conv_dims, lists["conv_block_alphas"] or [conv_alpha] * total, r"(?=.*\.conv[12]?$)"),
                               (lists["block_dims"] or [dim] * total, lists["block_alphas"] or [alpha] * total, "")):
            for number, head in [(number, head) for number, names in heads.items() for head in names]:
                ranks[large + re.escape(head)], alphas[large + re.escape(head)] = dims[number], a[number]
    if rates.blocks:    # kohya makes no modules in a block without a rate
        frozen = [head for number, names in _heads(unet_config).items() if rates.blocks[number] == 0 for head in names]
        ranks = {re.escape(head): 0 for head in frozen} | ranks
    alphas = {name: value for name, value in alphas.items() if ranks[name]}
    dropouts = {name: _number(name, args.get(name, 0.0), float) for name in ("rank_dropout", "module_dropout")}
    return Settings("lora", dim, alpha, "kohya", dropout or 0.0, **dropouts, conv_rank=conv_dim,
                    conv_alpha=conv_alpha if conv_dim else None, rank_pattern=ranks, alpha_pattern=alphas), rates


def _rates(args: dict[str, str], unet_config) -> Rates:
    both = args.get("loraplus_lr_ratio", 1.0)
    ratios = [_number(name, args.get(name, both), float) for name in RATE_ARGS[-2:]]
    blocks = block_rates(*(args.get(name) for name in RATE_ARGS[:3]),
                         _number(RATE_ARGS[3], args.get(RATE_ARGS[3], 0.0), float), unet_config)
    return Rates(*ratios, blocks)


def _heads(unet_config) -> dict[int, list[str]]:
    """Number of a block -> the diffusers names of what lies in it."""
    heads = {number: [] for number in range(sum(_counts(unet_config)) + 2)}
    for name in single_file.unet_blocks(unet_config) | single_file.UNET_NAMES:
        heads[block_of(name, unet_config)].append(name)
    return heads


def _plain(text: str):
    """"True", "8", "0.5" as what they are; other words as they are."""
    try:
        return json.loads(text.lower())
    except ValueError:
        return text


def _number(name: str, value, kind):
    try:
        return None if value is None else kind(value)
    except ValueError:
        raise UserError(f"--network_args {name}={value} is not {'a whole number' if kind is int else 'a number'}") from None

"""Adapters of SD3 in kohya's terms: the names of Stability's blocks, where q, k and v are one layer, and networks.lora_sd3."""

import re

import torch
from torch import Tensor

from library.errors import UserError
from library.models.adapter_names import PARTS_SD3, to_lycoris
from library.models.adapter_settings import RATE_ARGS, Rates, Settings, float_of, nearest
from library.models.sd3_file import BLOCK, OUTSIDE

_PLACES = {ours: (theirs, place) for theirs, names in BLOCK.items() for place, ours in enumerate(names)}
_BY_ROW = ("lora_up.weight", "dora_scale", "hada_w1_a", "hada_w2_a", "diff", "diff_b")    # one row an output of the layer
_SHARED = ("lora_down.weight", "alpha", "hada_w1_b", "hada_w2_b")
# networks.lora_sd3's ranks of kinds of layers
_DIMS = {"x_attn_dim": r"attn2?\.(to_[qkv]|to_out\.0)", "context_attn_dim": r"attn\.(add_[qkv]_proj|to_add_out)",
         "x_mlp_dim": r"ff\.net\.(0\.proj|2)", "context_mlp_dim": r"ff_context\.net\.(0\.proj|2)",
         "x_mod_dim": r"norm1\.linear", "context_mod_dim": r"norm1_context\.linear"}
_ELSEWHERE = {"emb_dims": "name layers outside of the blocks by --lora_targets", "train_t5xxl": "give T5 --learning_rate_te3"}
_ARGS = (*_DIMS, "train_block_indices", "split_qkv", "rank_dropout", "module_dropout", *RATE_ARGS[-3:])


def to_kohya(modules: dict[str, dict[str, Tensor]], fused: bool) -> dict[str, dict[str, Tensor]]:
    """An adapter by diffusers' names -> by kohya's, as ComfyUI reads it.

    fused: of a LoRA or DoRA, the factors of q, k and v become those of the one layer that Stability has: down matrices below
    each other, up matrices along a diagonal, which is the same update. Of other kinds that is no adapter of the same kind:
    the transformer keeps diffusers' names, as LyCORIS and SimpleTuner write them. Raises `UserError` for a DoRA of only some
    of q, k and v, as the one layer's has the sizes of all.
    """
    named, together = {}, {}
    for key, own in modules.items():
        part, _, module = key.partition(".")
        block = re.fullmatch(r"transformer_blocks\.(\d+)\.(.+)", module)
        if part != "transformer":
            named[PARTS_SD3[part] + module.replace(".", "_")] = own
        elif not fused:
            named[to_lycoris(key)] = own
        elif block:
            theirs, place = _PLACES[block[2]]
            together.setdefault(f"joint_blocks.{block[1]}.{theirs}", {})[place] = own
        else:
            together[next(theirs for theirs, ours in OUTSIDE.items() if ours == [module])] = {0: own}
    for module, places in together.items():
        fits = BLOCK.get(module.split(".", 2)[-1], ("",))
        own = places[0] if len(fits) == 1 else _fused(module, [places.get(place) for place in range(len(fits))])
        named[PARTS_SD3["transformer"] + module.replace(".", "_")] = _turned(module, own)
    return named


def to_diffusers(modules: dict[str, dict[str, Tensor]]) -> dict[str, dict[str, Tensor]]:
    """The same back: what has Stability's names gets diffusers'; each module has its alpha.

    What one layer has for q, k and v is divided by outputs: exactly, for the same update. Ranks that only one of the three
    uses go to that one alone. Raises `UserError` for a layer that is not SD3's, and for factors that cannot be divided.
    """
    named = {}
    for key, own in modules.items():
        part, _, module = key.partition(".")
        block = re.fullmatch(r"joint_blocks\.(\d+)\.(.+)", module)
        if part != "transformer" or not (block or module in OUTSIDE):
            named[key] = own
        elif block and block[2] not in BLOCK:
            raise UserError(f"the adapter is for a layer that SD3 does not have: {module}{nearest(block[2], BLOCK)}")
        else:
            names = [f"transformer_blocks.{block[1]}.{name}" for name in BLOCK[block[2]]] if block else OUTSIDE[module]
            own = _turned(module, own)
            each = [own] if len(names) == 1 else _divided(module, own)
            named |= {f"{part}.{name}": its for name, its in zip(names, each, strict=True) if its}
    return named


def _fused(module: str, each: list[dict[str, Tensor] | None]) -> dict[str, Tensor]:
    there = [own for own in each if own]
    rows, ranks = len(there[0]["lora_up.weight"]), [own["lora_up.weight"].shape[1] if own else 0 for own in each]
    scales = {float_of(own["alpha"]) / len(own["lora_down.weight"]) for own in there}
    scale = scales.pop() if len(scales) == 1 else 1.0    # else it goes into the up matrices
    ups = [own["lora_up.weight"].float() * (float_of(own["alpha"]) / rank / scale) if own else torch.zeros(rows, 0)
           for own, rank in zip(each, ranks, strict=True)]
    fused = {"lora_down.weight": torch.cat([own["lora_down.weight"] for own in there]),
             "lora_up.weight": torch.block_diag(*ups).to(there[0]["lora_up.weight"].dtype),
             "alpha": torch.tensor(scale * sum(ranks))}
    if any("dora_scale" in own for own in there):
        if len(there) < len(each):
            raise UserError(f"kohya's layout has one DoRA for q, k and v, and this adapter has none for some of them ({module}): "
                            "write it with --lora_format diffusers")
        fused["dora_scale"] = torch.cat([own["dora_scale"] for own in there])
    return fused


def _divided(module: str, own: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    """The tensors of q, k and v; nothing for one that is not changed."""
    _check_rows(module, own)
    each = [{name: tensor.chunk(3)[place] if name in _BY_ROW else tensor for name, tensor in own.items()} for place in range(3)]
    if "lora_up.weight" not in own or "lora_mid.weight" in own:
        return each
    rank = own["lora_up.weight"].shape[1]
    used = torch.stack([its["lora_up.weight"].ne(0).any(0) for its in each])                   # [3, rank]
    thirds = torch.arange(rank) * 3 // rank
    if rank % 3 == 0 and not (used & (thirds != torch.arange(3)[:, None])).any():
        owner = thirds
    elif used.sum(0).max() == 1:
        owner = used.int().argmax(0).where(used.any(0), -1)
    else:
        return each    # a rank that is shared
    for place, its in enumerate(each):
        own_ranks = owner == place
        its["lora_down.weight"], its["lora_up.weight"] = its["lora_down.weight"][own_ranks], its["lora_up.weight"][:, own_ranks]
        its["alpha"] = torch.tensor(float_of(its["alpha"]) * int(own_ranks.sum()) / rank)
    return [its if len(its["lora_down.weight"]) or "dora_scale" in its else {} for its in each]


def _turned(module: str, own: dict[str, Tensor]) -> dict[str, Tensor]:
    """Stability's last modulations say shift and scale, diffusers' scale and shift: both ways, the halves change places.

    Those are the final layer's, and that of the text in the last block: it has but these two.
    """
    if not module.endswith("adaLN_modulation.1"):
        return own
    outputs = next((len(own[name]) for name in _BY_ROW if name in own), 0)
    inputs = next((own[name].shape[1] for name in ("lora_down.weight", "hada_w1_b", "diff") if name in own), 0)
    if not module.startswith("final_layer") and not ("context_block" in module and (not inputs or outputs == 2 * inputs)):
        return own
    _check_rows(module, own)
    return {name: torch.cat(tensor.chunk(2)[::-1]) if name in _BY_ROW else tensor for name, tensor in own.items()}


def _check_rows(module: str, own: dict[str, Tensor]) -> None:
    wrong = [name for name in own if name not in _BY_ROW + _SHARED]
    if "dora_scale" in own and "lora_up.weight" in own and len(own["dora_scale"]) != len(own["lora_up.weight"]):
        wrong.append("dora_scale of inputs")
    if wrong:
        raise UserError(f"the adapter has {wrong[0]} for {module}, which diffusers' SD3 has in other parts: this cannot be "
                        "divided exactly. Use a LoRA, DoRA or LoHa, or an adapter with diffusers' names of blocks")


def from_kohya(dim: int | None, alpha: float | None, args: dict[str, str],
               dropout: float | None = None) -> tuple[Settings, Rates]:
    """networks.lora_sd3's --network_dim (4), --network_alpha (1), --network_args and --network_dropout. Raises `UserError`.

    Every linear layer of the blocks, but those whose rank is 0; train_block_indices is "0-5,8". q, k and v are always trained
    apart, as its split_qkv=True has it.
    """
    for name in args.keys() & _ELSEWHERE.keys():
        raise UserError(f"--network_args {name}: here, {_ELSEWHERE[name]}")
    if unknown := sorted(args.keys() - set(_ARGS)):
        raise UserError(f"--network_args {unknown[0]} is not known to networks.lora_sd3{nearest(unknown[0], _ARGS)}")
    if args.get("split_qkv", "True").lower() not in ("true", "1"):
        raise UserError("--network_args split_qkv=False: q, k and v are trained apart here, as diffusers has them; leave it out")
    dim, numbers = dim or 4, {}
    for name in args.keys() - {"train_block_indices", "split_qkv"}:
        try:
            numbers[name] = int(args[name]) if name in _DIMS else float(args[name])
        except ValueError:
            raise UserError(f"--network_args {name}={args[name]} is not a {'whole ' if name in _DIMS else ''}number") from None
    both = numbers.get("loraplus_lr_ratio", 1.0)
    rates = Rates(numbers.get("loraplus_unet_lr_ratio", both), numbers.get("loraplus_text_encoder_lr_ratio", both))
    ranks = {pattern: numbers[name] for name, pattern in _DIMS.items() if name in numbers}
    blocks = args.get("train_block_indices")
    blocks = None if blocks is None else blocks_of(blocks, "--network_args train_block_indices")
    return Settings("lora", dim, 1.0 if alpha is None else alpha, "kohya", dropout or 0.0, numbers.get("rank_dropout", 0.0),
                    numbers.get("module_dropout", 0.0), rank_pattern=ranks, blocks=blocks), rates


def blocks_of(text: str, flag: str) -> tuple[int, ...]:
    """"0-5,8" -> the numbers of these blocks. Raises `UserError`."""
    found = []
    for word in text.replace(" ", "").split(","):
        ends = re.fullmatch(r"(\d+)(?:-(\d+))?", word)
        if not ends or ends[2] and int(ends[2]) < int(ends[1]):
            raise UserError(f"{flag} {text} is not like 12,13 or 0-5,8: numbers of blocks, counted from 0")
        found += range(int(ends[1]), int(ends[2] or ends[1]) + 1)
    return tuple(dict.fromkeys(found))

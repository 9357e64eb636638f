"""Adapters by singular value decomposition: brought to a rank, summed into one, extracted from two full models."""

import collections
import json
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn
from tqdm import tqdm

from library.errors import UserError
from library.models.adapter_delta import delta, needs_base, shape_of
from library.models.adapter_files import SETTINGS_KEY, Adapter, float_of, kind_of, rank_of, text_name
from library.models.adapter_names import PARTS_SD3

_OF_THE_KIND = ("ss_network_module", "ss_network_args", SETTINGS_KEY)    # of a header: untrue once the kind is another


@dataclass
class Kept:
    """How much of an update, as sums of squares over the modules of one network, an adapter holds; and its ranks."""

    kept: float = 0.0
    total: float = 0.0
    ranks: list[int] = field(default_factory=list)
    clamped: int = 0    # modules that have no rank as high as was asked for
    turned: int = 0     # modules of another kind that are LoRA now

    @property
    def share(self) -> float:
        return self.kept / self.total if self.total else 1.0


def svd(update: Tensor | tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Thin SVD, U [m, k], S [k] descending, Vh [k, n], of a matrix [m, n] or of a product up [m, r] @ down [r, n].

    The product is never multiplied out: its two thin QR decompositions leave a matrix of at most r x r.
    """
    if isinstance(update, Tensor):
        return torch.linalg.svd(update, full_matrices=False)
    (q, r), (p, t) = torch.linalg.qr(update[0]), torch.linalg.qr(update[1].T)
    u, s, vh = torch.linalg.svd(r @ t.T, full_matrices=False)
    return q @ u, s, vh @ p.T


def choose_rank(s: Tensor, rank: int | None, energy: float | None) -> int:
    """The least rank whose squared singular values sum to `energy` (0..1) of all, at least 1 and at most `rank`."""
    most = min(rank or len(s), len(s))
    if energy is None:
        return most
    sums = s.double().square().cumsum(0)
    return max(1, min(most, int((sums < energy * sums[-1]).sum()) + 1))


def factors(update, scale: float, shape, rank: int | None, energy: float | None, kept: Kept) -> dict[str, Tensor]:
    """The best LoRA (Eckart and Young 1936) for scale * update, with alpha = scale * rank; what it holds is added to `kept`.

    update: as for `svd`. shape: of the weight, [out, in] or [out, in, h, w]. Both factors get the root of each singular value.
    """
    u, s, vh = svd(update)
    chosen, squares = choose_rank(s, rank, energy), (scale * s.double()).square()
    kept.kept, kept.total = kept.kept + squares[:chosen].sum().item(), kept.total + squares.sum().item()
    kept.ranks.append(chosen)
    kept.clamped += energy is None and len(s) < (rank or 0)
    root = s[:chosen].sqrt()
    up, down = (u[:, :chosen] * root).cpu(), (root[:, None] * vh[:chosen]).cpu()
    return {"lora_down.weight": down.reshape(chosen, *shape[1:]).contiguous(), "alpha": torch.tensor(float(scale * chosen)),
            "lora_up.weight": up.reshape(*up.shape, *[1] * (len(shape) - 2)).contiguous()}


def is_lora(own: dict[str, Tensor]) -> bool:
    """Whether a module has two factors and no more (but for DoRA's scale)."""
    return "lora_down.weight" in own and "lora_mid.weight" not in own


def update_of(key: str, own: dict[str, Tensor], device="cpu"):
    """What a module's tensors add, DoRA's scale apart -> (matrix [m, n], or up and down, in float32; its factor; the shape)."""
    if any(name in own for name in ("oft_blocks", "a1.weight")):
        raise UserError(f"{key} depends on the base's weights (OFT, GLoRA): `merge --base MODEL --rank N` makes it a LoRA")
    _refuse_biases(key, own)
    own = {name: tensor for name, tensor in own.items() if name != "dora_scale"}
    shape = shape_of(key, own)
    if is_lora(own):
        update = tuple(own[name].to(device, torch.float32).flatten(1) for name in ("lora_up.weight", "lora_down.weight"))
        factor = own["alpha"].item() / rank_of(own)
    else:
        update, factor = delta(own, torch.zeros(shape, device=device))[0].flatten(1), 1.0
    if not all(tensor.isfinite().all() for tensor in (update if is_lora(own) else (update,))):
        raise UserError(f"{key} holds NaN or infinite values: the file is of a run that went wrong, or damaged")
    return update, factor, shape


def _refuse_biases(key: str, own: dict[str, Tensor]) -> None:
    if "w_norm" in own or "diff_b" in own:
        raise UserError(f"{key} trains a norm or a bias, which no LoRA holds: merge this adapter into a model (--into)")


def norm(key: str, own: dict[str, Tensor]) -> float | None:
    """Frobenius norm of what a module's tensors add to its weight and bias; None where the base is needed to tell."""
    if needs_base(own):
        return None
    if is_lora(own):
        update, factor, _ = update_of(key, own)
        return abs(factor) * _squares(update)**0.5
    added, bias = delta(own, torch.zeros(own["w_norm"].shape if "w_norm" in own else shape_of(key, own)))
    return (_squares(added) + (0.0 if bias is None else _squares(bias)))**0.5


def _squares(update: Tensor | tuple[Tensor, Tensor]) -> float:
    """Sum of squares of a matrix or a product."""
    if isinstance(update, Tensor):
        return update.double().square().sum().item()
    up, down = update[0].double(), update[1].double()
    return ((up.T @ up) * (down @ down.T)).sum().clamp(min=0).item()


def resize(adapter: Adapter, rank: int | None, energy: float | None = None, device="cpu") -> tuple[Adapter, dict[str, Kept]]:
    """The adapter with at most this rank (or this share of its sum of squares) in every module -> it, and what each network kept.

    A LoRA of no higher rank stays bit for bit; a truncated one keeps alpha / rank. LoHa, LoKr, Tucker factors and LyCORIS'
    full matrices become LoRA. DoRA keeps its scale: that is the size of each output of the result, whatever the rank. Norms
    stay. Raises `UserError` for what a LoRA cannot be without the base.
    """
    modules, kept = {}, collections.defaultdict(Kept)
    for key, own in adapter.modules.items():
        if "w_norm" in own:
            modules[key] = own
            continue
        each = kept[key.partition(".")[0]]
        made = factors(*update_of(key, own, device), rank, energy, each)
        if is_lora(own) and (each.ranks[-1] == rank_of(own) or (energy is None and rank_of(own) <= rank)):
            each.ranks[-1], made = rank_of(own), own
        each.turned += not is_lora(own)
        modules[key] = made | {name: tensor for name, tensor in own.items() if name == "dora_scale"}
    return replace(adapter, kind=kind_of(modules), modules=modules, metadata=_header(adapter, kind_of(modules))), dict(kept)


def _header(adapter: Adapter, kind: str) -> dict[str, str]:
    """The header, without what said of which kind and rank the adapter was; LyCORIS' multiplier stays."""
    gone = _OF_THE_KIND if kind != adapter.kind else (SETTINGS_KEY,)
    left = {name: value for name, value in adapter.metadata.items() if name not in gone}
    return left | ({SETTINGS_KEY: json.dumps({"lycoris_config": {"multiplier": adapter.multiplier}})}
                   if adapter.multiplier != 1 else {})


def combine(weighted: list[tuple[Adapter, float]], rank: int | None = None, energy: float | None = None, base=None,
            device="cpu") -> tuple[Adapter, dict[str, Kept]]:
    """One adapter that adds what all do, each times its weight -> it, and what each network kept.

    With neither rank nor energy, LoRAs are put side by side: exact, and ranks add up. Else the sum is brought to the rank. base:
    a function, full name of a module -> its weight, for DoRA, OFT and GLoRA, each of which counts on the base as it is.
    Raises `UserError`.
    """
    exact = rank is None and energy is None
    modules, kept, found = {}, collections.defaultdict(Kept), collections.defaultdict(list)
    for adapter, weight in weighted:
        for key, own in adapter.modules.items():
            found[key].append((own, weight * adapter.multiplier))
    for key, terms in tqdm(found.items(), desc="merge", unit="module", disable=exact):
        each = kept[key.partition(".")[0]]
        if all(is_lora(own) and "dora_scale" not in own for own, _ in terms):
            update, shape = _side_by_side(key, terms, device)
            if exact or (energy is None and len(update[1]) <= rank):
                up, down = (tensor.cpu() for tensor in update)
                modules[key] = {"lora_down.weight": down.reshape(len(down), *shape[1:]), "alpha": torch.tensor(float(len(down))),
                                "lora_up.weight": up.reshape(*up.shape, *[1] * (len(shape) - 2))}
                each.ranks.append(len(down))
                each.kept, each.total = each.kept + (squares := _squares(update)), each.total + squares
                continue
        elif exact:
            raise UserError(f"only LoRAs add up exactly, and {key} is none in one of these: give --rank N or --energy SHARE, "
                            "which bring the sum to a LoRA")
        else:
            update, shape = _sum(key, terms, base, device)
        each.turned += not all(is_lora(own) for own, _ in terms)
        modules[key] = factors(update, 1.0, shape, rank, energy, each)
    metadata = {name: value for name, value in weighted[0][0].metadata.items() if name not in _OF_THE_KIND}
    return Adapter(kind_of(modules), modules, metadata if len(weighted) == 1 else {}, family=weighted[0][0].family), dict(kept)


def _side_by_side(key: str, terms, device):
    """LoRAs of one module -> ups [m, sum of ranks], times weight and scale, and downs [sum of ranks, n]; the shape."""
    parts = [(*update_of(key, own, device), weight) for own, weight in terms]
    ups = [up * (factor * weight) for (up, _), factor, _, weight in parts]
    if len({(len(up), down.shape[1]) for (up, down), *_ in parts}) > 1:
        raise UserError(f"these adapters were made for different models: {key} changes weights of the shapes "
                        f"{' and '.join(str(part[2]) for part in parts)}")
    return (torch.cat(ups, dim=1), torch.cat([down for (_, down), *_ in parts])), parts[0][2]


def _sum(key: str, terms, base, device) -> tuple[Tensor, torch.Size]:
    if base is None and any(needs_base(own) for own, _ in terms):
        raise UserError(f"what {key} adds depends on the weights it is added to (DoRA, OFT, GLoRA): give the model, too, with "
                        "--base MODEL")
    total = None
    for own, weight in terms:
        _refuse_biases(key, own)
        on = base(key).to(device, torch.float32) if base else torch.zeros(shape_of(key, own), device=device)
        try:
            added, _ = delta(own, on)
        except RuntimeError:
            raise UserError(f"the adapter was made for another model: {key} is {tuple(on.shape)} in --base") from None
        if not added.isfinite().all():
            raise UserError(f"{key} holds NaN or infinite values: the file is of a run that went wrong, or damaged")
        if total is not None and total.shape != added.shape:
            raise UserError(f"these adapters were made for different models: {key} changes weights of the shapes "
                            f"{tuple(total.shape)} and {tuple(added.shape)}")
        total = weight * added if total is None else total + weight * added
    return total.flatten(1), total.shape


def extract(part: str, network: nn.Module, base, tuned, ranks: dict[str, int], energy: float | None = None, device="cpu"):
    """The LoRA of one network that leads from one model to another -> its modules by full name, what it kept, the whole change.

    network: on the meta device. base, tuned: of `stored.open_part`. ranks: name of a module -> its (largest) rank. A module
    that does not differ is left out. The whole change is the sum of squares over all parameters. Raises `UserError` for NaN.
    """
    modules, kept, whole = {}, Kept(), 0.0
    for name, _ in tqdm(list(network.named_parameters()), desc=f"extract {part}", unit="tensor"):
        change = tuned(name).to(device, torch.float32) - base(name).to(device, torch.float32)
        if not change.isfinite().all():
            raise UserError(f"{part}.{name} holds NaN or infinite values in one of the models: it is damaged")
        whole += change.double().square().sum().item()
        module, _, kind = name.rpartition(".")
        if kind == "weight" and module in ranks and change.any():
            key, shape = text_name(f"{part}.{module}"), change.shape
            modules[key] = factors(change.flatten(1), 1.0, shape, ranks[module], energy, kept)
    return modules, kept, whole


def describe(adapter: Adapter) -> dict:
    """What an adapter holds, for JSON: kind, family, format, dtype, header; a network each the modules, ranks, alphas and norm.

    ranks, alphas: value -> number of modules. norm: Frobenius, of all that is added; None where the base is needed to tell.
    """
    networks = {}
    for part in ("unet", *PARTS_SD3):
        if own := {f"{part}.{name}": tensors for name, tensors in adapter.part(part).items()}:
            norms = [norm(key, tensors) for key, tensors in own.items()]
            alphas = collections.Counter(float_of(tensors["alpha"]) for tensors in own.values() if "alpha" in tensors)
            networks[part] = {"modules": len(own), "ranks": dict(collections.Counter(map(rank_of, own.values()))),
                              "alphas": dict(alphas), "norm": None if None in norms else sum(each**2 for each in norms)**0.5}
    dtypes = {str(tensor.dtype).removeprefix("torch.") for own in adapter.modules.values() for name, tensor in own.items()
              if name != "alpha"}
    return {"kind": adapter.kind, "family": adapter.family, "format": adapter.format, "dtype": sorted(dtypes),
            "networks": networks, "metadata": adapter.metadata}

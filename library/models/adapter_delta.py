"""What an adapter's tensors add to the weight of one module: the formulas of LoRA, DoRA, LoHa, LoKr, OFT and GLoRA."""

import torch
from torch import Tensor

from library.errors import UserError
from library.models.adapter_files import rank_of

_CONVOLUTIONS = {"conv_in": 3, "conv_out": 3, "conv1": 3, "conv2": 3, "conv": 3, "conv_shortcut": 1}    # SDXL's, by name


def delta(own: dict[str, Tensor], weight: Tensor) -> tuple[Tensor, Tensor | None]:
    """What an adapter adds to the weight (float32, its shape) and bias of one module at weight 1.

    own: the module's tensors, as `Adapter.modules` has them. Sources: LoRA 2106.09685, LoHa and LoKr 2108.06098 and LyCORIS
    2309.14859, DoRA 2402.09353, OFT 2306.07280, GLoRA 2306.07967 (arXiv).
    """
    weight, rank = weight.detach().float(), rank_of(own)
    alpha = own["alpha"].item() if "alpha" in own else 0.0
    scale = alpha / rank if rank and "alpha" in own else 1.0
    own = {name: tensor.to(weight.device, torch.float32) for name, tensor in own.items()}
    if "diff" in own:
        return own["diff"].reshape(weight.shape), own.get("diff_b")
    if "w_norm" in own:
        return own["w_norm"], own.get("b_norm")
    if "oft_blocks" in own:
        return _oft(own, weight, alpha * len(weight)), None
    if "lora_down.weight" in own:
        update = _product(own["lora_up.weight"], own["lora_down.weight"], own.get("lora_mid.weight"))
    elif "hada_w1_a" in own:
        update = _hadamard_factor(own, 1) * _hadamard_factor(own, 2)
    elif "a1.weight" in own:
        inner = own["a1.weight"].flatten(1) @ own["a2.weight"].flatten(1)    # [in, in]
        outer = _product(own["b1.weight"], own["b2.weight"], own.get("bm.weight"))
        update = torch.einsum("oi...,ij->oj...", weight, inner) + outer.reshape(weight.shape)
    else:
        first = own["lokr_w1"] if "lokr_w1" in own else own["lokr_w1_a"] @ own["lokr_w1_b"]
        if "lokr_w2" in own:
            second = own["lokr_w2"]
        elif "lokr_t2" in own:
            second = torch.einsum("ij...,jr,ip->pr...", own["lokr_t2"], own["lokr_w2_b"], own["lokr_w2_a"])
        else:
            second = own["lokr_w2_a"] @ own["lokr_w2_b"]
        if weight.ndim == 4 and second.ndim == 2:    # the kernel lies in the last axis
            second = second.reshape(len(second), -1, *weight.shape[2:])
        update = torch.kron(first.reshape(*first.shape, *[1] * (second.ndim - 2)), second)
    update = update.reshape(weight.shape) * scale
    return (_decomposed(weight + update, own["dora_scale"]) - weight if "dora_scale" in own else update), None


def _product(up: Tensor, down: Tensor, mid: Tensor | None) -> Tensor:
    if mid is None:
        return up.flatten(1) @ down.flatten(1)
    return torch.einsum("mn...,im,nj->ij...", mid, up.flatten(1), down.flatten(1))


def _hadamard_factor(own: dict[str, Tensor], number: int) -> Tensor:
    a, b, core = own[f"hada_w{number}_a"], own[f"hada_w{number}_b"], own.get(f"hada_t{number}")
    return a @ b if core is None else torch.einsum("ij...,jr,ip->pr...", core, b, a)


def _decomposed(weight: Tensor, magnitude: Tensor) -> Tensor:
    """DoRA: the direction of each output's weights (or each input's, by the magnitude's shape), times its magnitude."""
    axes = [axis for axis in range(weight.ndim) if magnitude.shape[axis] == 1]
    return weight * magnitude / torch.linalg.vector_norm(weight, dim=axes, keepdim=True)


def _oft(own: dict[str, Tensor], weight: Tensor, limit: float) -> Tensor:
    """Each block of outputs turned by the Cayley transform of its skew-symmetric matrix, then rescaled."""
    blocks = own["oft_blocks"]                                                    # [blocks, size, size]
    if blocks.ndim != 3:
        raise UserError("this adapter is a butterfly OFT (boft), which cannot be merged here: use the program it was made with")
    skew = blocks - blocks.mT
    if limit > 0 and (norm := skew.norm() + 1e-8) > limit:
        skew = skew * limit / norm
    eye = torch.eye(blocks.shape[-1], device=weight.device)
    turn = (eye + skew) @ torch.linalg.inv(eye - skew)
    turned = torch.einsum("knm,kn...->km...", turn, weight.reshape(*blocks.shape[:2], *weight.shape[1:])).reshape(weight.shape)
    return turned * own.get("rescale", torch.ones((), device=weight.device)) - weight


def needs_base(own: dict[str, Tensor]) -> bool:
    """Whether what these tensors add depends on the weight they are added to, so that it is not known without a base."""
    return any(name in own for name in ("dora_scale", "oft_blocks", "a1.weight"))


def shape_of(key: str, own: dict[str, Tensor]) -> tuple[int, ...]:
    """Shape of the weight of a module that does not need its base: [out, in] or [out, in, h, w].

    LoHa and LoKr may hold a kernel as part of their columns: then its size is that of SDXL's layer of this name.
    """
    if "diff" in own:
        return tuple(own["diff"].shape)
    if "lora_down.weight" in own:
        down = own["lora_down.weight"]
        return len(own["lora_up.weight"]), down.shape[1], *own.get("lora_mid.weight", down).shape[2:]
    size = 2 if key.endswith("pos_embed.proj") else _CONVOLUTIONS.get(key.rpartition(".")[2])    # SD3 has this one
    kernel = (size, size) if size else ()
    if "hada_t1" in own:
        return own["hada_w1_a"].shape[1], own["hada_w1_b"].shape[1], *own["hada_t1"].shape[2:]
    if "hada_w1_a" in own:
        return len(own["hada_w1_a"]), own["hada_w1_b"].shape[1] // (size or 1)**2, *kernel
    first = own["lokr_w1"].shape if "lokr_w1" in own else (len(own["lokr_w1_a"]), own["lokr_w1_b"].shape[1])
    if "lokr_t2" in own:
        second = (own["lokr_w2_a"].shape[1], own["lokr_w2_b"].shape[1], *own["lokr_t2"].shape[2:])
    else:
        second = own["lokr_w2"].shape if "lokr_w2" in own else (len(own["lokr_w2_a"]), own["lokr_w2_b"].shape[1])
    if len(second) == 2:
        second = (second[0], second[1] // (size or 1)**2, *kernel)
    return first[0] * second[0], first[1] * second[1], *second[2:]

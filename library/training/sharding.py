"""Networks that are spread over processes, in words that do not ask which engine spread them.

DDP keeps all on every process, and so do one process and --optimizer_sharding (whose optimizer alone is shared out: see
optimizer_state.py). FSDP2 gives each process a share of every tensor, a `DTensor`. What gathers or spreads is called by every
process, as all of them take part in it; what it gathers is on the main process alone.
"""

import contextlib
import os

import torch

from library.errors import UserError
from library.training import deepspeed_engine, processes

FSDP_OPTIMIZERS = ("adamw", "adamw_fused", "adamw_bf16", "sgd", "lion", "ademamix", "adamw-schedulefree", "radam-schedulefree",
                   "sgd-schedulefree", "optimi-")    # tried: their steps on shares are those on the whole
_ASKED = {"FSDP": "ACCELERATE_USE_FSDP", "DEEPSPEED": "ACCELERATE_USE_DEEPSPEED", "MEGATRON_LM": "ACCELERATE_USE_MEGATRON_LM"}


def engine(accelerator) -> str:
    """accelerate's name of what joins the processes: NO, MULTI_CPU, MULTI_GPU, FSDP, DEEPSPEED, ..."""
    return getattr(accelerator.distributed_type, "value", "NO")


def check(accelerator, args) -> None:
    """Compare the engine that was asked for with the one that accelerate gave. Raises `UserError` where they differ.

    Accelerate leaves FSDP and DeepSpeed out without a word on a CPU and for one process.
    """
    given = engine(accelerator)
    asked = [each for each, name in _ASKED.items() if os.environ.get(name, "false").lower() in ("1", "true")]
    for each in asked:
        if each == "MEGATRON_LM":
            raise UserError("the config of accelerate asks for Megatron-LM, which trains no diffusion model: use ddp_8.yaml or "
                            "fsdp2.yaml of config/accelerate")
        if given != each:
            where = "on a CPU" if accelerator.device.type == "cpu" else f"for {accelerator.num_processes} process(es)"
            raise UserError(f"the config of accelerate asks for {each}, which accelerate leaves out {where}, and every process "
                            f"would hold everything: choose another config (config/accelerate), or set {_ASKED[each]}=false")
    if (theirs := accelerator.gradient_accumulation_steps) != args.gradient_accumulation_steps:
        raise UserError(f"the config of accelerate sets gradient_accumulation_steps to {theirs}, and the flag says "
                        f"{args.gradient_accumulation_steps}: give both the same value")
    if given in ("FSDP", "DEEPSPEED") and getattr(args, "train_text_encoder", False):
        raise UserError(f"--train_text_encoder: accelerate's {given} takes one network; use DDP, with --optimizer_sharding zero1")
    if given in ("FSDP", "DEEPSPEED") and getattr(args, "offload_activations", False):
        raise UserError(f"--offload_activations: with {given} gathered weights would be sent, too; use --gradient_checkpointing")
    if given in ("FSDP", "DEEPSPEED") and shares_optimizer(args):
        raise UserError(f"--optimizer_sharding zero1 (--optimizer oss) is for DDP: {given} shares the optimizer out itself")
    if given == "FSDP":
        _check_fsdp(accelerator, args)
    elif given == "DEEPSPEED":
        deepspeed_engine.check(accelerator, args)


def prepare(accelerator, args) -> None:
    """Have `accelerator.prepare` share out as the flags say: for DeepSpeed, which has settings of its own."""
    if engine(accelerator) == "DEEPSPEED":
        deepspeed_engine.prepare(accelerator, args)


def _check_fsdp(accelerator, args) -> None:
    plugin = accelerator.state.fsdp_plugin
    if plugin.fsdp_version != 2:
        raise UserError("the config of accelerate asks for FSDP 1, which cannot be resumed exactly: write fsdp_version: 2 in it")
    if plugin.activation_checkpointing:
        raise UserError("fsdp_activation_checkpointing renames the network's parts: write false in the config of accelerate, and "
                        "use --gradient_checkpointing")
    if plugin.cpu_ram_efficient_loading:
        raise UserError("fsdp_cpu_ram_efficient_loading fails for networks with buffers, such as SD 3's: write false in the "
                        "config of accelerate")
    if not args.optimizer.startswith("optimi-") and args.optimizer not in FSDP_OPTIMIZERS or args.use_8bit_adam:
        raise UserError(f"--optimizer {args.optimizer}{' --use_8bit_adam' * args.use_8bit_adam} cannot step on FSDP's shares; "
                        f"{', '.join(FSDP_OPTIMIZERS[:-1])} and optimi- ones can")
    if accelerator.mixed_precision == "fp16":
        raise UserError("--mixed_precision fp16 with FSDP has not been tried: use bf16, or DDP with --optimizer_sharding zero1")
    if getattr(args, "base_model_precision", "no_change") != "no_change":
        raise UserError("--base_model_precision: a quantised base cannot be cut into FSDP's shares; use DDP, or leave it out")


def shares_optimizer(args) -> bool:
    """Whether --optimizer oss or --optimizer_sharding zero1 is given."""
    return getattr(args, "optimizer", "") == "oss" or getattr(args, "optimizer_sharding", "none") != "none"


def is_share(tensor) -> bool:
    """Whether a tensor is this process's share of a larger one."""
    return hasattr(tensor, "full_tensor") or hasattr(tensor, "ds_shape")


def numel(tensor: torch.Tensor) -> int:
    """How many elements the whole of a tensor has."""
    return getattr(tensor, "ds_shape", tensor.shape).numel()


def whole(tensor):
    """A tensor whose share each process holds, on the CPU of the main process and None on others; any other value as it is."""
    if not is_share(tensor):
        return tensor
    full = _full(tensor)
    return full.cpu() if processes.is_main() else None


def _full(share: torch.Tensor) -> torch.Tensor:
    """A whole tensor on every process's device: what was sent to main memory comes back for it."""
    if hasattr(share, "ds_shape"):
        return deepspeed_engine.whole(share)
    return share.detach().to(share.device_mesh.device_type).full_tensor()


def like(value: torch.Tensor, own) -> torch.Tensor:
    """A whole tensor, which every process has, cut into shares as `own` is; as it is if `own` is whole."""
    if not is_share(own):
        return value
    if hasattr(own, "ds_shape"):
        return deepspeed_engine.like(value, own)
    from torch.distributed.tensor import distribute_tensor
    mesh = own.device_mesh
    return distribute_tensor(value.to(mesh.device_type), mesh, own.placements, src_data_rank=None).to(own.device)


def gather(values: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Whole tensors by name, as of `whole`."""
    return {name: whole(value) for name, value in values.items()}


def state_dict(network: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The whole state_dict of a bare network, on the main process."""
    state = network.state_dict(keep_vars=True)    # detached, a share would not know its whole
    return gather({name: value if is_share(value) else value.detach() for name, value in state.items()})


def whole_network(network: torch.nn.Module):
    """A network to be saved, on the main process: a bare one itself, or a twin of it on the CPU whose weights are whole."""
    if not is_spread(network):
        return network
    state = state_dict(network)
    return with_weights(network, state) if processes.is_main() else None


def with_weights(network: torch.nn.Module, state: dict[str, torch.Tensor], dtype: torch.dtype | None = None):
    """A network of the same kind on the CPU that holds `state`; without a copy where it is there already."""
    kind = kind_of(network)
    with torch.device("meta"):
        twin = kind(network.config) if hasattr(network.config, "to_dict") else kind.from_config(network.config)
    state = {name: tensor.detach().to("cpu", dtype if tensor.is_floating_point() else None) for name, tensor in state.items()}
    twin.load_state_dict(state, assign=True)
    return twin


def is_spread(network: torch.nn.Module) -> bool:
    return any(is_share(p) for p in network.parameters())


def kind_of(network: torch.nn.Module) -> type:
    """The class of a network: FSDP2 puts one of its own in front of it."""
    return next(kind for kind in type(network).__mro__ if not kind.__name__.startswith("FSDP"))


def clip_grad_norm(accelerator, parameters: list[torch.nn.Parameter], most: float) -> torch.Tensor:
    """Scale the gradients (of fp16, unscaled before) down to a norm of `most` -> the norm before, over all processes' shares."""
    if engine(accelerator) == "DEEPSPEED":
        norm = deepspeed_engine.norm_of(accelerator)
    elif not any(is_share(p) for p in parameters):
        norm = accelerator.clip_grad_norm_(parameters, most)
    else:    # accelerate's own compares lists of shares, element by element where their order differs
        accelerator.unscale_gradients()
        norm = torch.nn.utils.clip_grad_norm_(parameters, most)
    return norm.full_tensor() if is_share(norm) else norm


@contextlib.contextmanager
def callable_alone(network: torch.nn.Module):
    """Within this context a process may call a bare network that others do not call, or as often as it likes.

    Of FSDP2: every process holds all weights meanwhile, in the precision of the forward pass.
    """
    if any(hasattr(p, "ds_shape") for p in network.parameters()):
        with deepspeed_engine.callable_alone(network):
            yield
        return
    parts = [module for module in network.modules() if hasattr(module, "unshard")]
    for part in parts:
        part.set_reshard_after_forward(False, recurse=False)
        part.unshard()
    try:
        yield
    finally:
        for part in parts:
            part.reshard()
            part.set_reshard_after_forward(part is not network, recurse=False)


@contextlib.contextmanager
def whole_weights(network: torch.nn.Module, names: set[str]):
    """Within this context the parameters of these names are whole, on every process: to be read, not to be trained."""
    cut = []
    for path, module in network.named_modules():
        for name, parameter in module._parameters.items():
            if f"{path}.{name}" in names and is_share(parameter):
                cut.append((module, name, parameter))
    for module, name, parameter in cut:
        module._parameters[name] = torch.nn.Parameter(_full(parameter), requires_grad=parameter.requires_grad)
    try:
        yield
    finally:
        for module, name, parameter in cut:
            module._parameters[name] = parameter

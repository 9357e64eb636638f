"""DeepSpeed's ZeRO in the words of `sharding` and `optimizer_state`, through which the scripts use it.

Weights stay float32. ZeRO 1 and 2 leave the network whole on every process. ZeRO 3 leaves a process the part `ds_tensor` of
each parameter, one after another in the order of ranks, whose whole has the shape `ds_shape`. What is stepped lies in flat
tensors, of which each process has a part, with their moments. A checkpoint has all of it by parameter, as any engine writes it.
"""

import contextlib
import functools
import importlib.metadata
import importlib.util
import os

import torch
import torch.distributed as dist
from tqdm import tqdm

from library.errors import UserError
from library.training import processes

TRIED = "0.19.8"
OPTIMIZERS = ("adamw", "adamw_fused", "sgd", "lion", "ademamix")    # their steps go element by element
_KEYS = {"": {"train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping",
              "zero_optimization", "steps_per_print", "fp16", "bf16"},
         "zero_optimization.": {"stage", "offload_optimizer", "offload_param", "overlap_comm", "contiguous_gradients",
                                "reduce_scatter", "reduce_bucket_size", "allgather_partitions", "allgather_bucket_size",
                                "sub_group_size", "stage3_max_live_parameters", "stage3_max_reuse_distance",
                                "stage3_prefetch_bucket_size", "stage3_param_persistence_threshold",
                                "stage3_gather_16bit_weights_on_model_save", "memory_efficient_linear"}}


def check_installed(device: str) -> None:
    """Refuse a run that asks for DeepSpeed where it cannot be imported, before it is. Raises `UserError`."""
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() not in ("1", "true") or device == "cpu":
        return
    if not importlib.util.find_spec("deepspeed"):
        raise UserError(f"the config of accelerate asks for DeepSpeed, which is not installed: pip install deepspeed=={TRIED}")
    if device == "npu" and "ASCEND_HOME_PATH" not in os.environ:
        raise UserError("DeepSpeed looks for CANN in ASCEND_HOME_PATH, which is not set: source CANN's set_env.sh")


def check(accelerator, args) -> None:
    """Refuse what DeepSpeed cannot do here as the other engines do it. Raises `UserError`."""
    plugin, world = accelerator.state.deepspeed_plugin, accelerator.num_processes
    config, zero = plugin.deepspeed_config, plugin.deepspeed_config["zero_optimization"]
    if plugin.zero_stage not in (1, 2, 3):
        raise UserError(f"zero_stage {plugin.zero_stage} in the config of accelerate shares out nothing: write 1, 2 or 3")
    if plugin.zero3_init_flag:
        raise UserError("zero3_init_flag: models are read whole before they are shared out: write false in accelerate's config")
    for part, given in (("", config), ("zero_optimization.", zero)):
        if unknown := sorted(given.keys() - _KEYS[part]):
            raise UserError(f"{part}{unknown[0]} in DeepSpeed's config: a flag of the script decides that, or it has not been "
                            f"tried; leave it out. Known are {', '.join(sorted(_KEYS[part]))}")
    if args.use_8bit_adam or args.optimizer not in OPTIMIZERS:
        raise UserError(f"--optimizer {args.optimizer}{' --use_8bit_adam' * args.use_8bit_adam} cannot step on DeepSpeed's flat "
                        f"parts; {', '.join(OPTIMIZERS)} can")
    for flag, given in (("--mixed_precision fp16", accelerator.mixed_precision == "fp16"),
                        ("--spike_guard", getattr(args, "spike_guard", "off") != "off"),
                        ("--layer_statistics", args.layer_statistics),
                        ("--base_model_precision", getattr(args, "base_model_precision", "no_change") != "no_change")):
        if given:
            raise UserError(f"{flag} does not go with DeepSpeed: use DDP, with --optimizer_sharding zero1, or leave it out")
    for part in ("offload_optimizer", "offload_param"):
        if (device := (zero.get(part) or {}).get("device")) not in (None, "none", "cpu"):
            raise UserError(f"{part} to {device} has not been tried with DeepSpeed: write cpu or none in the config")
    for key, value in _counts(args, world).items():
        if (theirs := config.get(key, "auto")) not in ("auto", value):
            raise UserError(f"{key} is {theirs} in DeepSpeed's config, and by the flags it is {value}: write auto there")


def _counts(args, world: int) -> dict:
    """What the flags say of what DeepSpeed would have in its config."""
    batch, steps = args.train_batch_size, args.gradient_accumulation_steps
    return {"train_micro_batch_size_per_gpu": batch, "gradient_accumulation_steps": steps,
            "train_batch_size": batch * steps * world, "gradient_clipping": float(args.max_grad_norm or 0)}


def prepare(accelerator, args) -> None:
    """Have accelerate make an engine whose weights are float32, and which clips, autocasts and counts as the flags say."""
    from transformers.integrations import unset_hf_deepspeed_config
    if (found := importlib.metadata.version("deepspeed")) != TRIED and processes.is_main():
        tqdm.write(f"DeepSpeed is {found} here; {TRIED} is what was tried")
    config, mixed = accelerator.state.deepspeed_plugin.deepspeed_config, accelerator.mixed_precision == "bf16"
    config |= _counts(args, accelerator.num_processes) | {
        "zero_force_ds_cpu_optimizer": False,
        "torch_autocast": {"enabled": mixed, "dtype": "bfloat16", "lower_precision_safe_modules": []}}
    unset_hf_deepspeed_config()    # by which transformers would share out text encoders
    made = accelerator._prepare_deepspeed

    def as_said(network, optimizer):
        config["bf16"]["enabled"] = False    # else the weights would become bfloat16
        engine, optimizer = made(network, optimizer)
        config["bf16"]["enabled"] = mixed    # by which accelerate tells the precision of the run
        engine.step = functools.partial(_step, engine, engine.step)
        for p in network.parameters():
            if hasattr(p, "ds_tensor"):
                p.ds_tensor.ds_shape = p.ds_shape    # so that it can be told from a tensor that is whole
        return engine, optimizer
    accelerator._prepare_deepspeed = as_said
    if mixed:    # accelerate's own does nothing with DeepSpeed
        accelerator.autocast = functools.partial(torch.autocast, accelerator.device.type, torch.bfloat16)


def _step(engine, step) -> None:
    step()
    if not engine.was_step_applied() and processes.is_main():
        tqdm.write("the gradient is not finite: DeepSpeed leaves this step out")


def norm_of(accelerator) -> torch.Tensor:
    """The gradient's norm before clipping, of the step that `accelerator.backward` has made."""
    norm = accelerator.deepspeed_engine_wrapped.get_global_grad_norm()
    return torch.tensor(norm, dtype=torch.float32, device=accelerator.device)


def whole(share: torch.Tensor) -> torch.Tensor:
    """What all processes hold of a tensor put together, on every process's device."""
    from deepspeed.accelerator import get_accelerator
    own = getattr(share, "ds_tensor", share).detach().to(get_accelerator().current_device_name())
    parts = torch.empty(own.numel() * processes.world(), dtype=own.dtype, device=own.device)
    dist.all_gather_into_tensor(parts, own.contiguous())
    return parts[:share.ds_shape.numel()].view(share.ds_shape)


def like(value: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
    """The part of a whole tensor that belongs where `own` is: the last ranks' may end in zeros."""
    part, begin = torch.zeros_like(own), processes.rank() * own.numel()
    mine = value.flatten()[begin:begin + own.numel()]
    part[:len(mine)] = mine
    return part


@contextlib.contextmanager
def callable_alone(network: torch.nn.Module):
    """Within this context every process holds all weights, as its parts say, and calls the network without DeepSpeed's hooks."""
    parameters = [p for p in network.parameters() if hasattr(p, "ds_tensor")]
    hooks = [(module, name, getattr(module, name)) for module in network.modules()
             for name in ("_forward_hooks", "_forward_pre_hooks")]
    _let_go(parameters)
    parameters[0].all_gather(parameters)
    for module, name, own in hooks:
        setattr(module, name, type(own)())
    try:
        yield
    finally:
        for module, name, own in hooks:
            setattr(module, name, own)
        _let_go(parameters)


def _let_go(parameters) -> None:
    """Forget what was gathered of small parameters, which DeepSpeed keeps from step to step: the parts may have changed."""
    for p in parameters:
        if hasattr(p, "ds_tensor") and p.ds_status.name == "AVAILABLE":
            p.partition()


def shares(optimizer) -> bool:
    """Whether a bare optimizer is DeepSpeed's, around that of the flags."""
    return hasattr(optimizer, "single_partition_of_fp32_groups") or hasattr(optimizer, "fp32_partitioned_groups_flat")


def take_weights(optimizer) -> None:
    """After weights were loaded: what is stepped becomes what the network holds."""
    if shares(zero := getattr(optimizer, "optimizer", optimizer)):
        _let_go(p for flats in _groups(zero) for _, own in flats for p in own)
        zero.refresh_fp32_params()


@contextlib.contextmanager
def stepped(zero):
    """Within this context the groups of DeepSpeed's optimizer name its flat tensors, as they do while it steps."""
    before = [group["params"] for group in zero.optimizer.param_groups] if shares(zero) else []
    for number in range(len(before)):
        zero.optimizer.param_groups[number]["params"] = [flat for flat, _ in _groups(zero)[number]]
    yield
    for number, own in enumerate(before):    # in other dicts, maybe
        zero.optimizer.param_groups[number]["params"] = own


def gather_state(zero) -> dict:
    """The state_dict of the optimizer as it would be if nothing were shared out: on the main process; every process calls."""
    state, groups, number = {}, [], 0
    for group, flats in zip(zero.optimizer.param_groups, _groups(zero), strict=True):
        first = number
        for flat, p in ((flat, p) for flat, own in flats for p in own):
            moments = {name: _gather(zero, p, flat, value) for name, value in zero.optimizer.state.get(flat, {}).items()}
            state |= {number: moments} if moments and processes.is_main() else {}
            number += 1
        groups.append(group | {"params": list(range(first, number))})
    return {"state": state, "param_groups": groups}


def part_of_state(zero, saved: dict) -> dict:
    """What of a whole state_dict belongs to this process's flat tensors, numbered as within `stepped`.

    Raises ValueError where `saved` is of other parameters, or of parameters that have made unlike numbers of steps.
    """
    groups, state, numbered, place = _groups(zero), {}, [], 0
    sizes = [len(group["params"]) for group in saved["param_groups"]]
    if sizes != [sum(len(own) for _, own in flats) for flats in groups]:
        raise ValueError(f"its optimizer has groups of {sizes} parameters, not those of this run")
    for given, flats, group in zip(saved["param_groups"], groups, zero.optimizer.param_groups, strict=True):
        numbers = iter(given["params"])
        ours = {name: group[name] for name in ("fused", "capturable") if name in group}    # by them torch places "step"
        numbered.append(given | ours | {"params": list(range(place, place + len(flats)))})
        for flat, own in flats:
            found = [saved["state"].get(next(numbers), {}) for _ in own]
            if len({tuple(moments) for moments in found}) > 1:
                raise ValueError("some of its parameters have moments that others lack, and DeepSpeed keeps the same for all")
            state[place] = {name: _cut(zero, name, [each[name] for each in found], own, flat) for name in found[0]}
            place += 1
    return {"state": {place: moments for place, moments in state.items() if moments}, "param_groups": numbered}


def _groups(zero) -> list[list[tuple]]:
    """For each parameter group: its flat tensors, each with the parameters that lie in it, in the optimizer's order."""
    if hasattr(zero, "single_partition_of_fp32_groups"):
        return [[each] for each in zip(zero.single_partition_of_fp32_groups, zero.bit16_groups, strict=True)]
    groups = [[] for _ in zero.optimizer.param_groups]
    for number, each in enumerate(zip(zero.fp32_partitioned_groups_flat, zero.fp16_groups, strict=True)):
        groups[zero.sub_group_to_group_id[number]].append(each)
    return groups


def _place(zero, p: torch.Tensor) -> tuple[slice, slice]:
    """Where this process's part lies: in the parameter, and in its flat tensor."""
    if hasattr(p, "ds_tensor"):
        _, start, size = zero.grad_position[zero.get_param_id(p)]
        begin, end = (min((processes.rank() + more) * size, p.ds_numel) for more in (0, 1))
        return slice(begin, end), slice(start, start + end - begin)
    if not p._hp_mapping:    # nothing of it is here
        return slice(0, 0), slice(0, 0)
    return tuple(slice(each.start, each.start + each.numel)
                 for each in (p._hp_mapping.lp_fragment_address, p._hp_mapping.hp_fragment_address))


def _gather(zero, p: torch.Tensor, flat: torch.Tensor, value):
    """A parameter's moment, put together from all processes' parts, on the CPU of the main process; a count as it is."""
    if not isinstance(value, torch.Tensor) or value.shape != flat.shape:
        return value.detach().cpu().clone() if isinstance(value, torch.Tensor) else value
    shape, (here, there) = getattr(p, "ds_shape", p.shape), _place(zero, p)
    moment = torch.zeros(shape.numel(), dtype=value.dtype, device=p.device)
    moment[here] = value[there].to(p.device)
    dist.all_reduce(moment)
    return moment.view(shape).cpu() if processes.is_main() else None


def _cut(zero, name: str, values: list, own: list[torch.Tensor], flat: torch.Tensor):
    """This process's flat part of a moment of all parameters; of a count of steps, the one that they share."""
    if not all(isinstance(value, torch.Tensor) and value.shape == getattr(p, "ds_shape", p.shape)
               for p, value in zip(own, values, strict=True)):
        if len(kinds := {float(value) for value in values}) > 1:
            raise ValueError(f"its parameters have unlike {name}: {', '.join(map(str, sorted(kinds)))}, and DeepSpeed has one")
        return values[0]
    part = torch.zeros(flat.shape, dtype=values[0].dtype)
    for p, value in zip(own, values, strict=True):
        here, there = _place(zero, p)
        part[there] = value.flatten()[here]
    return part

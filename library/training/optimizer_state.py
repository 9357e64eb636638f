"""What optimizers keep from step to step: shared out over processes, gathered for a checkpoint, reloaded from one, and
exchanged for what is to be evaluated.

A checkpoint has what an optimizer that is not shared out would have, so that it goes on with any --optimizer_sharding, engine
and number of processes.
"""

import contextlib
import functools
import inspect

import torch
import torch.distributed as dist

from library.training import deepspeed_engine, processes, sharding


def share_out(kind: str, optimizer_class: type, groups: list[dict], keywords: dict) -> torch.optim.Optimizer:
    """An optimizer of which each process makes the steps of some parameters, and sends them to the others.

    kind: "zero1" is torch's ZeroRedundancyOptimizer, "oss" is fairscale's. To be used with plain DDP, whose gradients every
    process has: fairscale's ShardedDDP trains on gradients that are not averaged once they were set to None.
    """
    if kind == "zero1":
        from torch.distributed.optim import ZeroRedundancyOptimizer
        return ZeroRedundancyOptimizer(groups, optimizer_class=optimizer_class, **keywords)
    from fairscale.optim import OSS
    return OSS(groups, optim=optimizer_class, **keywords)


def bare(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """An optimizer without accelerate's wrapper."""
    return getattr(optimizer, "optimizer", optimizer)


def part_of(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """The optimizer that this process steps: of its part of the parameters where they are shared out, else of all."""
    inner = bare(optimizer)
    return inner.optimizer if deepspeed_engine.shares(inner) else getattr(inner, "optim", inner)


def gather_state(optimizer: torch.optim.Optimizer) -> dict:
    """The state_dict of the optimizer as it would be if nothing were shared out: on the main process; every process calls.

    Moments go to the main process one parameter at a time, over main memory.
    """
    inner, part = bare(optimizer), part_of(optimizer)
    if deepspeed_engine.shares(inner):
        return deepspeed_engine.gather_state(inner)
    saved = part.state_dict()
    if part is inner:
        return saved | {"state": {number: {name: sharding.whole(value) for name, value in moments.items()}
                                  for number, moments in saved["state"].items()}}
    place = {id(p): number for number, p in enumerate(_parameters(inner))}
    own = {place[id(p)]: saved["state"][number] for number, p in enumerate(_parameters(part)) if number in saved["state"]}
    packed = torch.optim.Optimizer.state_dict(inner)["param_groups"]
    # the schedule sets the rate of those that are shown; the part is told of it at its next step
    groups = [shown | {name: value for name, value in group.items() if name not in ("params", "lr")}
              for shown, group in zip(packed, saved["param_groups"], strict=True)]
    owners = processes.gather([(number, processes.rank()) for number in own])
    for number, rank in sorted(owners):
        if rank and rank == processes.rank():
            dist.send_object_list([_on_cpu(own[number])], dst=0, group=_hosts())
        elif rank and processes.is_main():
            received = [None]
            dist.recv_object_list(received, src=rank, group=_hosts())
            own[number] = received[0]
    return {"state": dict(sorted(own.items())), "param_groups": groups}


def load_state(optimizer: torch.optim.Optimizer, saved: dict) -> None:
    """Moments and everything else that steps have found are those of `saved`, a whole state_dict; settings are this run's.

    Each process keeps its part. Some optimizers keep what they have found in the groups, beside the settings: Prodigy its
    distance, schedule-free ones their weights' sum. A setting is what the class takes as a keyword; where it is None the
    optimizer decided, and that decision stays. Raises ValueError where `saved` is of other parameters.
    """
    inner, part = bare(optimizer), part_of(optimizer)
    names = inspect.signature(type(part)).parameters.keys() | {"initial_lr", "betas", "beta1", "beta2", "beta3", "eps"}
    own = [{name: value for name, value in group.items() if name in names - {"params"} and value is not None}
           for group in part.param_groups]
    with deepspeed_engine.stepped(inner):
        part.load_state_dict(_part_of_state(inner, part, saved))
        device = next(_parameters(inner)).device
    for group, settings, shown in zip(part.param_groups, own, inner.param_groups, strict=True):
        group.update({name: value.to(device) for name, value in group.items()
                      if isinstance(value, torch.Tensor) and value.is_floating_point()} | settings)
        shown.update({name: value for name, value in group.items() if name != "params"})    # the same group where none is shared


def _part_of_state(inner: torch.optim.Optimizer, part: torch.optim.Optimizer, saved: dict) -> dict:
    """What of a whole state_dict belongs to the parameters of `part`, in its numbering and, of FSDP2, in shares.

    fairscale's and torch's own load_state_dict keep a second copy of the moments.
    """
    if deepspeed_engine.shares(inner):
        return deepspeed_engine.part_of_state(inner, saved)
    sizes = [len(group["params"]) for group in saved["param_groups"]]
    if sizes != [len(group["params"]) for group in inner.param_groups]:
        raise ValueError(f"its optimizer has groups of {sizes} parameters, not those of this run")
    place = {id(p): number for number, p in enumerate(_parameters(inner))}
    state, groups, number = {}, [], 0
    for given, group in zip(saved["param_groups"], part.param_groups, strict=True):
        ours = {name: group[name] for name in ("fused", "capturable") if name in group}    # by them torch places "step"
        groups.append(given | ours | {"params": list(range(number, number + len(group["params"])))})
        for p in group["params"]:
            if place[id(p)] in saved["state"]:
                moments = saved["state"][place[id(p)]]
                state[number] = {name: _spread(value, p) for name, value in moments.items()}
            number += 1
    return {"state": state, "param_groups": groups}


def _spread(value, parameter: torch.Tensor):
    """A moment as its parameter is; of one without shares, and what is no moment, as it is."""
    alike = isinstance(value, torch.Tensor) and value.shape == parameter.shape and value.ndim > 0
    return sharding.like(value, parameter) if alike else value


def _parameters(optimizer: torch.optim.Optimizer):
    return (p for group in optimizer.param_groups for p in group["params"])


def _on_cpu(moments: dict) -> dict:
    return {name: value.detach().cpu() if isinstance(value, torch.Tensor) else value for name, value in moments.items()}


@functools.cache
def _hosts():
    """The processes' group between hosts. Made at the first checkpoint, by all of them."""
    return dist.new_group(backend="gloo")


@contextlib.contextmanager
def evaluated(optimizer: torch.optim.Optimizer):
    """Within this context the weights are those that a schedule-free optimizer averages; others leave them alone.

    Afterwards the weights are bit by bit what they were: to compute them back would round them.
    """
    inner = bare(optimizer)
    if not hasattr(inner, "eval"):
        yield
        return
    parameters = [p for group in inner.param_groups for p in group["params"]]
    own = [p.detach().clone() for p in parameters]
    inner.eval()
    try:
        yield
    finally:
        inner.train()
        with torch.no_grad():
            torch._foreach_copy_(parameters, own)

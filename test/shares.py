"""Checks of what processes share out, run by each of them, for test_sharding.py and test_third_patch.py.

`torch.distributed.run test/shares.py shares`, or `patches`.
"""

import copy
import itertools
import json
import sys
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from library.diffusion import ema
from library.training import optimizer_state, optimizers, sharding

SHARED = ("adamw", "adamw_8bit", "adamw_bf16", "adafactor", "lion", "muon")
CUT = ("adamw", "adamw_fused", "sgd", "lion", "ademamix", "adamw_bf16", "adamw-schedulefree", "optimi-stableadamw")


class Net(torch.nn.Module):
    config = {}

    def __init__(self):
        super().__init__()
        self.conv, self.norm = torch.nn.Conv2d(4, 16, 3, padding=1), torch.nn.LayerNorm(64)
        self.inner, self.wide, self.out = torch.nn.Linear(256, 64), torch.nn.Linear(64, 256), torch.nn.Linear(256, 10)
        self.frozen = torch.nn.Parameter(torch.ones(3), requires_grad=False)

    def forward(self, x):
        return self.out(self.wide(self.norm(self.inner(self.conv(x).flatten(1)))))


def made(name: str, kind: str):
    """(network, called network, optimizer); kind: none, zero1, oss or fsdp2."""
    torch.manual_seed(0)
    net = Net()
    if kind == "fsdp2":
        fully_shard(net.inner)
        fully_shard(net)
    trained = [p for p in net.parameters() if p.requires_grad]
    groups = [{"params": [p for p in trained if (p.ndim == 1) == vectors], "lr": 1e-3 + 1e-3 * vectors} for vectors in (0, 1)]
    args = SimpleNamespace(optimizer=name, use_8bit_adam=False, optimizer_args=[], adam_beta1=None, adam_beta2=None,
                           adam_weight_decay=None, adam_epsilon=None, optimizer_sharding="none" if kind == "fsdp2" else kind)
    optimizer = optimizers.from_groups(args, groups, "cpu")
    return net, net if kind == "fsdp2" else DistributedDataParallel(net), optimizer


def train(net, optimizer, first: int, steps: int, most: float = 0.5) -> list[dict]:
    """Steps on data that differ from process to process -> whole gradients of each, after clipping."""
    gradients, accelerator = [], SimpleNamespace(
        distributed_type="NO", unscale_gradients=lambda: None, clip_grad_norm_=torch.nn.utils.clip_grad_norm_)
    for step in range(first, first + steps):
        draw = torch.Generator().manual_seed(10 * step + dist.get_rank())
        x, y = torch.randn(8, 4, 4, 4, generator=draw), torch.randn(8, 10, generator=draw)
        (net(x) - y).square().mean().backward()
        norm = sharding.clip_grad_norm(accelerator, [p for p in net.parameters() if p.requires_grad], most)
        assert norm > most and not sharding.is_share(norm)
        gradients.append({name.removeprefix("module."): full(p.grad) for name, p in net.named_parameters() if p.grad is not None})
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return gradients


def full(tensor):
    return (tensor.full_tensor() if sharding.is_share(tensor) else tensor).detach().clone()


def weights(net) -> dict:
    return {name: full(p) for name, p in net.named_parameters()}


def moments(optimizer) -> dict:
    part = optimizer_state.part_of(optimizer)
    return copy.deepcopy({number: part.state.get(p, {}) for number, p in enumerate(itertools.chain(
        *(group["params"] for group in part.param_groups)))})


def same(ours, theirs, atol=0.0) -> bool:
    if isinstance(theirs, dict):
        return ours.keys() == theirs.keys() and all(same(ours[name], theirs[name], atol) for name in theirs)
    if isinstance(theirs, torch.Tensor):
        ours, theirs = (each.to_local() if sharding.is_share(each) else each for each in (ours, theirs))
        return ours.shape == theirs.shape and bool((ours.float() - theirs.float()).abs().max() <= atol if ours.numel() else True)
    return ours == theirs


def values(state) -> int:
    return sum(value.to_local().numel() if sharding.is_share(value) else value.numel()
               for each in state.values() for value in each.values() if isinstance(value, torch.Tensor))


def check(name: str, kind: str) -> None:
    reference, called, plain = made("adamw" if name == "oss" else name, "none")
    gradients = train(called, plain, 0, 3)
    net, called, optimizer = made(name, kind)
    mine = train(called, optimizer, 0, 3)
    assert all(same(ours, theirs, 1e-6) for ours, theirs in zip(mine, gradients, strict=True)), "gradients are not DDP's"
    assert same(weights(net), weights(reference), 1e-6)

    held, total = values(moments(optimizer)), values(moments(plain))
    assert 0.3 * total < held < 0.7 * total, f"holds {held} of {total} values"
    saved = copy.deepcopy(optimizer_state.gather_state(optimizer))
    if dist.get_rank() == 0:
        whole = plain.state_dict()
        assert same(saved["state"], whole["state"], 1e-6), "the saved state is not that of an optimizer that is not shared out"
        assert [group["params"] for group in saved["param_groups"]] == [group["params"] for group in whole["param_groups"]]
        for ours, theirs in zip(saved["param_groups"], whole["param_groups"], strict=True):
            assert all(ours[key] == value for key, value in theirs.items())
    box = [saved]
    dist.broadcast_object_list(box)    # as every process reads the file

    again, called_again, other = made(name, kind)
    with torch.no_grad():
        for p, own in zip(again.parameters(), net.parameters(), strict=True):
            p.copy_(own)
    optimizer_state.load_state(other, box[0])
    assert same(moments(other), moments(optimizer)), "moments after loading are not those before saving"
    train(called, optimizer, 3, 2)
    train(called_again, other, 3, 2)
    assert same(weights(again), weights(net)) and same(moments(other), moments(optimizer)), "it does not go on to the bit"
    if dist.get_rank() == 0:
        print(f"{name} by {kind}: {held} of {total}", flush=True)


def check_words_of_fsdp() -> None:
    """What is read, called and averaged of a network in shares."""
    net, _, optimizer = made("adamw", "fsdp2")
    reference, called, plain = made("adamw", "none")
    averages = [ema.EMA(each, 0.9) for each in (net, reference)]
    for step in range(3):
        train(net, optimizer, step, 1)
        train(called, plain, step, 1)
        averages[0].update(net)
        averages[1].update(reference)
    assert same({name: full(value) for name, value in averages[0].averages.items()}, averages[1].averages, 1e-6)
    assert sharding.kind_of(net) is Net and type(net) is not Net and sharding.is_spread(net) and not sharding.is_spread(reference)
    state = sharding.state_dict(net)
    assert same(state, dict(reference.state_dict()), 1e-6) if dist.get_rank() == 0 else not any(
        isinstance(value, torch.Tensor) for value in state.values())

    x = torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(dist.get_rank()))
    with torch.no_grad(), averages[0].applied(net), averages[1].applied(reference), sharding.callable_alone(net):
        for _ in range(1 + 2 * dist.get_rank()):    # not equally often
            assert same(net(x), reference(x), 1e-6)
    assert same(weights(net), weights(reference), 1e-6)
    before = dict(net.named_parameters())
    with sharding.whole_weights(net, {"inner.weight"}):
        assert same(net.inner.weight.detach(), reference.inner.weight.detach(), 1e-6) and sharding.is_share(net.out.weight)
    assert all(p is before[name] for name, p in net.named_parameters())
    train(net, optimizer, 3, 1)
    train(called, plain, 3, 1)
    assert same(weights(net), weights(reference), 1e-6)


def check_shares() -> None:
    for each in SHARED:
        check(each, "zero1")
    check("oss", "oss")
    for each in CUT:
        check(each, "fsdp2")
    check_words_of_fsdp()


def check_patches() -> None:
    """A network trained through accelerate by an optimizer that is shared out: as it comes, with one patch, and with both."""
    from accelerate import Accelerator

    import third_patch
    accelerator = Accelerator(cpu=True)

    def apart(kind: str):
        """How far the processes' weights are from one another after three steps, or the error at the start."""
        torch.manual_seed(0)
        net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Linear(8, 8), torch.nn.Linear(8, 2))
        groups = [{"params": list(net.parameters()), "lr": 0.1}]
        try:
            called, optimizer = accelerator.prepare(net, optimizer_state.share_out(
                kind, torch.optim.SGD, groups, {"lr": 0.1, "momentum": 0.9}))
        except RuntimeError as error:
            return str(error)
        for _ in range(3):
            accelerator.backward(called(torch.ones(2, 4)).square().mean())
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        ranks = accelerator.gather(torch.cat([p.detach().flatten() for p in net.parameters()])[None])
        return (ranks[0] - ranks[1]).abs().max().item()

    found = {"zero1": apart("zero1"), "oss": apart("oss")}
    found["applied"] = [third_patch.apply(), third_patch.apply()]
    found |= {"zero1 patched": apart("zero1"), "oss moved": apart("oss")}
    found["applied"] += [third_patch.apply(oss=True), third_patch.apply(oss=True)]
    found["oss patched"] = apart("oss")
    if accelerator.is_main_process:
        print("found", json.dumps(found), flush=True)


def parse_args(argv: list[str]) -> str:
    return argv[0]


def main(what: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    {"shares": check_shares, "patches": check_patches}[what]()
    if dist.get_rank() == 0:
        print("all is well", flush=True)
    dist.barrier()


if __name__ == "__main__":
    main(parse_args(sys.argv[1:]))

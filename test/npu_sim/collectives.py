"""Check of the stand-in's process group, run by two processes that have one: what a collective gives, and what it leaves alone.

One of the runs of several.py, for test_sharding.py.
"""

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as functional
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor


def parse_args(argv: list[str]) -> None:
    return None


def main(args: None) -> None:
    rank, group, average = dist.get_rank(), dist.group.WORLD, dist.ReduceOp.AVG
    own, mean = torch.arange(4.0) + 10 * rank, torch.arange(4.0) + 5
    x, out, part = own.to("npu"), torch.zeros(2, device="npu"), mean.chunk(2)[rank]

    dist.reduce_scatter_single(out, x, op=average)
    assert torch.equal(out.cpu(), part)
    dist.reduce_scatter_single(out, x, op=average, async_op=True).wait()
    assert torch.equal(out.cpu(), part)
    dist.reduce_scatter(out, list(x.chunk(2)), op=average)
    assert torch.equal(out.cpu(), part)
    assert torch.equal(functional.reduce_scatter_single(x, "avg", 0, group).cpu(), part)
    some = functional.reduce_scatter_single_coalesced([x, x + 1], "avg", [0, 0], group)
    assert all(torch.equal(each.cpu(), part + more) for more, each in enumerate(some))

    given = x.clone()
    dist.all_reduce(given, op=average)
    assert torch.equal(given.cpu(), mean)
    given = x.clone()
    dist.reduce(given, 0, op=average)
    assert torch.equal(given.cpu(), own if rank else mean)
    some = functional.all_reduce_coalesced([x, x + 1], "avg", group)
    assert all(torch.equal(each.cpu(), mean + more) for more, each in enumerate(some))
    assert torch.equal(x.cpu(), own)

    before = torch.npu.memory_allocated()
    share = torch.nn.Parameter(distribute_tensor(torch.ones(2**20, device="npu"), init_device_mesh("npu", (2,)), [Shard(0)]))
    assert share.shape == (2**20,) and 2**21 <= torch.npu.memory_allocated() - before < 2**22    # half of 4 MiB

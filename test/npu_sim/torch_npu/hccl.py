"""The backend "hccl" of torch.distributed over gloo.

Each collective runs on the host tensors over the npu tensors' memory: in place, without copies. Like the real one it takes npu
tensors only.
"""

import torch
import torch.distributed as dist

from torch_npu._device import host


class _Work(dist._Work if hasattr(dist, "_Work") else dist.Work):
    def __init__(self, work, result):
        super().__init__()
        self._work, self._future = work, torch.futures.Future()
        self._result = result

    def wait(self, timeout=None):
        if self._work is not None:    # once: gloo's reduce_scatter copies its result again each time, over what became of it
            self._work.wait() if timeout is None else self._work.wait(timeout)
            self._work = None
        return True

    def is_completed(self):
        return self._work is None or self._work.is_completed()

    def get_future(self):
        self.wait()
        if not self._future.done():
            self._future.set_result(self._result)
        return self._future

    def result(self):
        return self._result


def _host(x):
    if isinstance(x, (list, tuple)):
        return [_host(i) for i in x]
    if isinstance(x, torch.Tensor):
        if x.device.type != "npu":
            raise RuntimeError(f"HCCL: tensors must be on npu, got {x.device}")
        return host(x)
    return x


class ProcessGroupHCCL(dist.ProcessGroup):
    def __init__(self, store, rank, size, timeout):
        super().__init__(rank, size)
        self._gloo = dist.ProcessGroupGloo(store, rank, size, timeout)
        # so that the group can hold a name (device meshes ask); collectives never go this way
        self._register_backend(torch.device("npu"), dist.ProcessGroup.BackendType.CUSTOM, self._gloo)

    def getBackendName(self):
        return "hccl"

    def _run(self, name, first, *rest):
        # the first argument is the output, and what the future gives
        flat = (lambda x: _host(x).view(-1)) if name.endswith("_base") else _host  # gloo minds the shape there
        given = [flat(r) if isinstance(r, torch.Tensor) else _host(r) for r in (first, *rest)]
        out = first if isinstance(first, (list, tuple)) else [first]
        return _Work(getattr(self._gloo, name)(*given), out)

    def _reduced(self, name, out, *rest):
        """A reduction: AVG, which HCCL has and gloo has not, is SUM and a division."""
        opts = rest[-1]
        average = opts.reduceOp == dist.ReduceOp.AVG
        if average:
            opts.reduceOp = dist.ReduceOp.SUM
        work = self._run(name, out, *rest)
        if average:
            work.wait()
            for t in out if isinstance(out, (list, tuple)) else [out]:
                host(t).div_(self.size())
        return work

    def allgather_into_tensor_coalesced(self, outs, ins, opts=None):  # gloo has only the single one
        for out, x in zip(outs, ins, strict=True):
            self._run("_allgather_base", out, x).wait()
        return _Work(None, list(outs))

    def reduce_scatter_tensor_coalesced(self, outs, ins, opts):
        for out, x in zip(outs, ins, strict=True):
            one = dist.ReduceScatterOptions()
            one.reduceOp = opts.reduceOp
            self._reduced("_reduce_scatter_base", out, x, one).wait()
        return _Work(None, list(outs))

    def reduce(self, tensors, opts):
        """gloo's leaves partial sums in the tensors of those that are not the root."""
        given = tensors if opts.rootRank == self.rank() else [t.clone() for t in tensors]
        return self._reduced("reduce", given, opts)

    def barrier(self, opts):
        return _Work(self._gloo.barrier(), [])

    def alltoall_base(self, out, inp, out_splits, in_splits, opts):
        return _Work(self._gloo.alltoall_base(_host(out), _host(inp), out_splits, in_splits, opts), [out])


def _forward(name, through="_run"):
    def method(self, *args):
        return getattr(self, through)(name, *args)
    method.__name__ = name
    return method


for _name in ("broadcast", "allgather", "_allgather_base", "allgather_coalesced", "gather", "scatter", "alltoall",
              "send", "recv"):
    setattr(ProcessGroupHCCL, _name, _forward(_name))
for _name in ("allreduce", "allreduce_coalesced", "reduce_scatter", "_reduce_scatter_base"):
    setattr(ProcessGroupHCCL, _name, _forward(_name, "_reduced"))
# torch 2.13's newer names, which torch.distributed now calls
for _new, _old in (("all_gather_single", "_allgather_base"), ("reduce_scatter_single", "_reduce_scatter_base"),
                   ("all_gather_single_coalesced", "allgather_into_tensor_coalesced"),
                   ("reduce_scatter_single_coalesced", "reduce_scatter_tensor_coalesced"),
                   ("all_to_all_single", "alltoall_base")):
    setattr(ProcessGroupHCCL, _new, getattr(ProcessGroupHCCL, _old))


def _create(store, rank, size, timeout):
    return ProcessGroupHCCL(store, rank, size, timeout)


def register():
    dist.Backend.register_backend("hccl", _create, devices=["npu"])

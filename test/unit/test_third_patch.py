"""The patches of third_patch: each is needed, does what it says, and is made where it is needed alone."""

import ast
import importlib
import os
import re
import subprocess
import sys
from importlib import metadata

import pytest
import torch
from forks import REPOSITORY, free_port

import third_patch
from library.errors import UserError

# What two processes do: build, move and step an optimizer that is shared out, with accelerate, without the patches and with them.
WORKER = """
import torch
from accelerate import Accelerator
from third_patch import accelerate, fairscale
from library.training import optimizer_state
accelerator = Accelerator(cpu=True)

def apart(kind):
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Linear(8, 8), torch.nn.Linear(8, 2))
    groups = [{"params": list(net.parameters()), "lr": 0.1}]
    optimizer = optimizer_state.share_out(kind, torch.optim.SGD, groups, {"lr": 0.1, "momentum": 0.9})
    try:
        model, optimizer = accelerator.prepare(net, optimizer)
    except RuntimeError as error:
        return str(error)
    for _ in range(3):
        accelerator.backward(model(torch.ones(2, 4)).square().mean())
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    ranks = accelerator.gather(torch.cat([p.detach().flatten() for p in net.parameters()])[None])
    return (ranks[0] - ranks[1]).abs().max().item()

found = [apart("zero1"), apart("oss")]
assert accelerate.apply() and not accelerate.apply()
found += [apart("zero1"), apart("oss")]
assert fairscale.apply() and not fairscale.apply()
found += [apart("oss")]
if accelerator.is_main_process:
    print("found", repr(found), flush=True)
accelerator.wait_for_everyone()
"""


def test_without_its_patch_it_fails_and_with_it_it_works(tmp_path):
    (tmp_path / "worker.py").write_text(WORKER)
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", str(free_port())]
    done = subprocess.run([sys.executable, *launcher, tmp_path / "worker.py"], text=True, capture_output=True, cwd=tmp_path,
                          env={**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"})
    told = re.search(r"found (\[.*\])", done.stdout)
    assert told, done.stdout + done.stderr
    zero1, oss, zero1_patched, oss_moved, oss_patched = ast.literal_eval(told[1])
    assert "has not been consolidated" in zero1 and "has not been consolidated" in oss
    assert zero1_patched == 0 and oss_patched == 0
    assert oss_moved > 1e-3, "each process trains its own parameters alone: the patch of fairscale is not needed any more"


def test_nothing_is_changed_where_it_is_not_needed(parse):
    """One process, or an optimizer that is not shared out: no patch is looked at, even."""
    from accelerate.optimizer import AcceleratedOptimizer

    from library.training import optimizers
    before = AcceleratedOptimizer.__init__
    for more in ((), ("--optimizer_sharding", "zero1"), ("--optimizer_type", "oss")):
        args = parse(*more)
        optimizers.check_optimizer(args, "cpu")
        made = optimizers.from_groups(args, [{"params": [torch.nn.Parameter(torch.ones(2))], "lr": 1}], "cpu")
        assert type(made) is torch.optim.AdamW
    assert AcceleratedOptimizer.__init__ is before and not hasattr(before, "patched")


def test_another_release_is_refused(monkeypatch):
    from third_patch import accelerate, fairscale
    for module, release in ((accelerate, "1.16.0"), (accelerate, "1.1"), (fairscale, "0.5.0")):
        monkeypatch.setattr(third_patch, "version", lambda package, release=release: release)
        with pytest.raises(UserError, match=f"{release} is installed"):
            module.apply()

    def absent(package):
        raise metadata.PackageNotFoundError

    monkeypatch.setattr(third_patch, "version", absent)
    with pytest.raises(UserError, match="pip install -r requirements-npu.txt"):
        fairscale.apply()


def test_every_patch_tells_its_reason_and_is_applied():
    for name in ("accelerate", "fairscale"):
        module = importlib.import_module(f"third_patch.{name}")
        tree = ast.parse((REPOSITORY / "third_patch" / f"{name}.py").read_text())
        functions = [node for node in tree.body if isinstance(node, ast.FunctionDef) and not node.name.startswith("_")]
        for node in functions[1:]:
            assert "Reason: " in ast.get_docstring(node) and node.name in module.apply.__code__.co_names

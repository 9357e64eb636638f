"""The patches of third_patch: each is needed, does what it says, and is made where it is needed alone."""

import ast
import importlib
import json
import re
from importlib import metadata

import pytest
import torch
from forks import REPOSITORY, together

import third_patch
from library.errors import UserError


def test_without_its_patch_it_fails_and_with_it_it_works(tmp_path):
    """By two processes; see shares.py."""
    going = together(["patches"], tmp_path / "log", 2, module="shares")
    assert [one.wait(300) for one in going] == [0, 0], going[0].text() + going[1].text()
    found = json.loads(re.search(r"found (\{.*\})", going[0].text())[1])
    assert "has not been consolidated" in found["zero1"] and "has not been consolidated" in found["oss"]
    assert found["zero1 patched"] == 0 and found["oss patched"] == 0
    assert found["oss moved"] > 1e-3, "each process trains its own parameters alone: the patch of fairscale is needed no more"
    assert found["applied"] == [["accelerate: AcceleratedOptimizer.__init__"], [], ["fairscale: OSS.step"], []]    # once


def test_nothing_is_changed_where_it_is_not_needed(parse, monkeypatch):
    """One process, or an optimizer that is not shared out: no patch is looked at, even. fairscale's: none but for oss."""
    from accelerate.optimizer import AcceleratedOptimizer

    from library.training import optimizers, processes
    applied = []
    monkeypatch.setattr(third_patch, "apply", lambda **which: applied.append(which))
    for world, more in ((1, ()), (1, ("--optimizer_sharding", "zero1")), (1, ("--optimizer_type", "oss")), (2, ())):
        monkeypatch.setattr(processes, "world", lambda world=world: world)
        args = parse(*more)
        optimizers.check_optimizer(args, "cpu")
        made = optimizers.from_groups(args, [{"params": [torch.nn.Parameter(torch.ones(2))], "lr": 1}], "cpu")
        assert type(made) is torch.optim.AdamW and not applied and not hasattr(AcceleratedOptimizer.__init__, "patched")
    for more in (("--optimizer_sharding", "zero1"), ("--optimizer_type", "oss")):
        optimizers.check_optimizer(parse(*more), "cpu")
    assert applied == [{"oss": False}, {"oss": True}]


def test_another_release_is_refused(monkeypatch):
    from accelerate.optimizer import AcceleratedOptimizer
    monkeypatch.setattr(AcceleratedOptimizer, "__init__", AcceleratedOptimizer.__init__)    # put back at the end
    found = {}
    monkeypatch.setattr(third_patch, "version", lambda package: found[package])
    for package, release, oss in (("accelerate", "1.16.0", False), ("accelerate", "1.1", True), ("fairscale", "0.5.0", True)):
        found |= {"accelerate": "1.15.1", "fairscale": "0.4.13"} | {package: release}
        with pytest.raises(UserError, match=f"is made for {package} .*, and {release} is installed"):
            third_patch.apply(oss=oss)

    def absent(package):
        raise metadata.PackageNotFoundError

    monkeypatch.setattr(third_patch, "version", absent)
    with pytest.raises(UserError, match="pip install -r requirements-npu.txt"):
        third_patch.apply(oss=True)


def test_every_patch_tells_its_reason_and_is_applied():
    for name in ("accelerate", "fairscale"):
        module = importlib.import_module(f"third_patch.{name}")
        tree = ast.parse((REPOSITORY / "third_patch" / f"{name}.py").read_text())
        functions = [node for node in tree.body if isinstance(node, ast.FunctionDef) and not node.name.startswith("_")]
        for node in functions[1:]:
            assert "Reason: " in ast.get_docstring(node) and node.name in module.apply.__code__.co_names

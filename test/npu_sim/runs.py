"""Whole runs of the scripts in this process, one after another: python runs.py PLAN. For test_npu.py; without the plots."""

import contextlib
import importlib
import json
import os
import sys
import traceback
from pathlib import Path

import checks
import peft  # noqa: F401    # before diffusers, which looks for it once: the full scripts hide it
import torch
import torch_npu
from accelerate.state import AcceleratorState, GradientState


def main(plan: Path) -> None:
    """Run what the plan says, one after another -> PLAN.RANK.json: {name: what it did, or its traceback}."""
    rank, told = int(os.environ.get("RANK", "0")), json.loads(plan.read_text())
    results = {}
    for check in checks.CHECKS if told["checks"] else ():
        with _told(results, check.__name__):
            check()
    for run in told["runs"]:
        torch_npu.ops.calls.clear()
        os.environ.update(run["env"])
        module = importlib.import_module(run["script"])
        module.report.write_loss_curve = lambda folder: folder
        module.report.write_report = lambda folder, **_: folder
        sys.argv = [f"{run['script']}.py", *run["flags"]]
        with _told(results, run["name"]):
            module.main(module.parse_args(run["flags"]))
            calls = torch_npu.ops.calls.get("npu_fusion_attention", [])
            results[run["name"]] = {
                "fused": len(calls), "types": sorted({str(dtype) for _, dtype, _ in calls}),
                "lengths": sorted({shape[2] for shape, *_ in calls}), "device": str(AcceleratorState().device),
                "backend": torch.distributed.is_initialized() and torch.distributed.get_backend()}
        AcceleratorState._reset_state(reset_partial_state=True)    # the process group stays: it is that of the next run, too
        GradientState._reset_state()
        for name in run["env"]:
            del os.environ[name]
    plan.with_suffix(f".{rank}.json").write_text(json.dumps(results))


@contextlib.contextmanager
def _told(results: dict, name: str):
    try:
        results[name] = None
        yield
    except BaseException:
        results[name] = traceback.format_exc()


if __name__ == "__main__":
    main(Path(sys.argv[1]))

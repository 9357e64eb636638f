"""Several runs of training scripts, one after another in the same processes: `torch.distributed.run test/several.py RUNS.json`.

RUNS.json: a list of {"script", "flags", "env"}, and "loss_scale" to begin fp16 with another one than usual. Imports, the process
group and the stand-in for an NPU are set up once.
"""

import contextlib
import importlib
import json
import os
import sys
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


def parse_args(argv: list[str]) -> Path:
    return Path(argv[0])


def main(plan: Path) -> None:
    from accelerate.state import AcceleratorState, GradientState
    for run in json.loads(plan.read_text()):
        sys.argv = [f"{run['script']}.py", *run["flags"]]
        module = importlib.import_module(run["script"])
        from library import errors
        from library.training import devices
        from library.validation import report
        with contextlib.ExitStack() as changed:
            changed.enter_context(errors.exit_on_user_error(run["script"]))
            changed.enter_context(mock.patch.dict(os.environ, run["env"]))
            # half of the time of so short a run; the stand-in's count of memory looks at every object there is
            changed.enter_context(mock.patch.multiple(report, write_loss_curve=lambda folder: folder,
                                                      write_report=lambda folder, **_: folder))
            changed.enter_context(mock.patch.object(devices, "peak_memory", lambda device: 0.0))
            if "loss_scale" in run:
                import torch
                init = torch.npu.amp.GradScaler.__init__
                changed.enter_context(mock.patch.object(init, "__defaults__", (run["loss_scale"], *init.__defaults__[1:])))
            module.main(module.parse_args(run["flags"]))
        AcceleratorState._reset_state(reset_partial_state=True)    # the process group stays: it is that of the next run, too
        GradientState._reset_state()


if __name__ == "__main__":
    import peft  # noqa: F401    # before diffusers, which looks for it once: the full scripts hide it
    main(parse_args(sys.argv[1:]))

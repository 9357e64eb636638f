"""Several runs of training scripts, one after another in the same processes: `accelerate launch test/several.py RUNS.json`.

RUNS.json: a list of {"script", "flags", "env"}. Imports, the process group and the stand-in for an NPU are set up once.
"""

import importlib
import json
import os
import sys
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


def main():
    runs = json.loads(Path(sys.argv[1]).read_text())
    for number, run in enumerate(runs):
        sys.argv = [f"{run['script']}.py", *run["flags"]]
        import peft  # noqa: F401    # before diffusers, which looks for it once: the full scripts hide it
        module = importlib.import_module(run["script"])
        args = module.parse_args(run["flags"])
        from accelerate.state import AcceleratorState, GradientState

        from library import errors
        from library.training import devices
        if number:
            AcceleratorState._reset_state(reset_partial_state=True)
            GradientState._reset_state()
        module.report.write_loss_curve = lambda folder: folder    # half of the time of so short a run
        module.report.write_report = lambda folder, **_: folder
        with mock.patch.dict(os.environ, run.get("env", {})), errors.exit_on_user_error(run["script"]):
            # the stand-in's count looks at every object there is
            with mock.patch.object(devices, "peak_memory", lambda device: 0.0):
                module.main(args)


if __name__ == "__main__":
    main()

"""Run a training script and leave at the end of its first optimizer step. Launched by first_step.py:

    accelerate launch until_first_step.py SCRIPT --flags
"""

import os
import runpy
import sys


def leave(*_) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def main() -> None:
    sys.argv = sys.argv[1:]
    sys.path[0] = os.path.dirname(os.path.abspath(sys.argv[0]))
    from torch.optim.optimizer import register_optimizer_step_post_hook  # the script imports torch anyway
    register_optimizer_step_post_hook(leave)
    runpy.run_path(sys.argv[0], run_name="__main__")
    sys.exit("until_first_step.py: error: the script ended without an optimizer step")


if __name__ == "__main__":
    main()

"""Being asked to stop: SIGTERM and SIGINT finish the step, save, and leave with status 0.

Where a step cannot be finished, since another process is dead, `watch` ends this one.
"""

import multiprocessing.util
import os
import signal
import time

import torch
import torch.distributed as dist

from library.training import processes


class StopRequest:
    """Whether any process of the run was asked to stop; all processes learn it after the same step.

    The answer travels while the next step computes (an all-reduce between hosts, never of the device), so asking costs
    nothing and comes one step late. A launcher that dies without passing the signal on counts as a request, too.
    """

    def __init__(self):
        self._asked, self._pending = False, None
        self._launcher = os.getppid() if "ACCELERATE_MIXED_PRECISION" in os.environ else None
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._note)
        self._group = dist.new_group(backend="gloo") if processes.world() > 1 else None

    def _note(self, number, frame) -> None:
        if self._asked and number == signal.SIGINT:    # a second Ctrl-C: at once
            raise KeyboardInterrupt
        self._asked = True

    def _wait_for_own(self, seconds: float = 10) -> None:
        """Launchers of several machines stop their processes one after another, to start them anew; one that sees its own end
        with status 0 before that takes the run for finished."""
        end = time.monotonic() + seconds
        while not self._asked and time.monotonic() < end:
            time.sleep(0.05)

    def after_step(self) -> bool:
        """Ask once an optimizer step, on every process."""
        asked = self._asked or (self._launcher is not None and os.getppid() != self._launcher)
        if self._group is None:
            return asked
        answer = False
        if self._pending is not None:
            flag, work = self._pending
            work.wait()
            answer = bool(flag.item())
            if answer and not asked and int(os.environ.get("GROUP_WORLD_SIZE", "1")) > 1:
                multiprocessing.util.Finalize(None, self._wait_for_own, exitpriority=200)
        flag = torch.tensor([int(asked)])
        self._pending = (flag, dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=self._group, async_op=True))
        return answer

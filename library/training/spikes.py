"""A guard against loss spikes: one bad gradient can undo a run of SD 3.5 Large."""

import json
import math
import statistics
from collections import deque
from pathlib import Path

from library.data.cache import write_whole
from library.training import processes
from library.training.accelerator import say

NAME = "spikes.jsonl"
WINDOW = 100    # norms that the median is of
LEAST = 20      # norms before it is asked: the first ones are no measure


class SpikeGuard:
    """Judges the gradient's norm at each optimizer step by the norms before, so that a restart judges the same.

    mode: off, skip or stop. run: a checkpoints.State, whose `unlogged` has what `state` gave to a checkpoint. Processes share the
    gradient, and so its norm and what follows from it. scaler: of fp16, which leaves out gradients that are not finite by
    itself, and learns from them. counts: of the log; its "spikes" is kept up to date.
    """

    def __init__(self, mode: str, factor: float, run, scaler, output_dir: Path, counts: dict[str, int]):
        self.mode, self.factor, self.scaler, self.path, self.counts = mode, factor, scaler, output_dir / NAME, counts
        self.norms = deque(run.unlogged.get("guarded_norms", []), maxlen=WINDOW)
        self.told = ""    # of the latest spike
        if self.on:
            counts["spikes"] = int(run.unlogged.get("spikes", [0])[0])
        if processes.is_main() and self.path.exists():    # steps that a restart runs again
            _write(self.path, run.step + 1)

    @property
    def on(self) -> bool:
        return self.mode != "off"

    @property
    def stops(self) -> bool:
        """Whether the run is to save and end."""
        return self.mode == "stop" and bool(self.told)

    def refuses(self, norm, step: int) -> bool:
        """Whether the gradient of optimizer step number `step` is not to be applied. Waits for the device: it must know."""
        if not self.on:
            return False
        norm, seen = float(norm), len(self.norms)
        finite, median = math.isfinite(norm), statistics.median(self.norms) if seen >= LEAST else None
        if finite:
            self.norms.append(norm)    # a spike, too: a level that lasts becomes the usual one
        if not median and finite or finite and norm <= self.factor * median or not finite and self.scaler:
            return False
        if self.scaler:
            self.scaler.update()    # what it does after a step
        self.counts["spikes"] += 1
        usual = f", {norm / median:.1f} times the median of the last {seen}" if finite else ""
        self.told = (f"step {step}: the gradient's norm is {norm:.3g}{usual}; it is not applied, nor is its loss in the mean "
                     f"(spike {self.counts['spikes']})")
        say(self.told)
        if processes.is_main():
            _write(self.path, step, {"step": step, "grad_norm": norm if finite else str(norm), "median": median})
        return True

    def state(self) -> dict[str, list[float]]:
        """What a checkpoint keeps."""
        return {"guarded_norms": list(self.norms), "spikes": [float(self.counts["spikes"])]} if self.on else {}

    def notes(self) -> list[str]:
        """For the report."""
        count = self.counts.get("spikes", 0)
        return [f"--spike_guard {self.mode}: {count} gradients were not applied, see {NAME}"] if count else []


def _write(path: Path, step: int, *lines: dict) -> None:
    """Put lines in the place of those of this step or later ones."""
    kept = [text for text in path.read_text().splitlines() if json.loads(text)["step"] < step] if path.exists() else []
    write_whole(path, "".join(text + "\n" for text in (*kept, *map(json.dumps, lines))).encode())

"""Loss, speed and the share of time that is spent waiting for data. Nothing here makes the device wait in a step."""

import contextlib
import json
import os
import time
from pathlib import Path

import torch
from tqdm import tqdm

from library.training import devices, processes, watch


class Meter:
    """Counts a run. `metrics.jsonl` in `folder` gets a line every `every` optimizer steps, and the bar shows it.

    layers: a layer_statistics.Recorder, which is told of every micro step and step, or None.
    """

    def __init__(self, folder: Path, trackers, state, steps: int, every: int, device: str, layers=None):
        self.path, self.trackers, self.every, self.device = folder / "metrics.jsonl", trackers, every, device
        # of a line of the log that was begun before a restart
        self._losses, self._norms = ([torch.tensor(value, device=device) for value in state.unlogged.get(name, [])]
                                     for name in ("losses", "norms"))
        self._before = len(self._losses)    # those of optimizer steps that are done
        self._images, self._waited, self._seconds_before = 0, 0.0, _forget_after(self.path, state.step)
        self._step = state.step
        self.counts: dict[str, int] = {}    # of what others count since the run began; each line of the log has them
        self._bar = tqdm(initial=state.step, total=steps, desc="train", unit="step", disable=not processes.is_main())
        self._begin = self._since = time.perf_counter()
        self._layers = layers
        if layers:
            layers.start(folder, state, device)

    def waiting(self, batches):
        """Pass batches through, adding up the time until each is there."""
        batches = iter(batches)
        while True:
            watch.now(f"the data of step {self._step + 1}")
            asked = time.perf_counter()
            batch = next(batches, None)
            self._waited += time.perf_counter() - asked
            if batch is None:
                return
            if self._layers:
                self._layers.begin(batch)
            watch.now(f"step {self._step + 1}")
            yield batch

    def add(self, loss: torch.Tensor, images: int, refused: bool = False) -> None:
        """The loss of a micro step, which stays on the device, and how many images this process showed in it.

        refused: its gradient, and that of the micro steps before it in this optimizer step, is not applied. Their losses
        are no part of the mean.
        """
        self._losses.append(loss.detach())
        if refused:
            del self._losses[self._before:]
        self._images += images
        if self._layers:
            self._layers.add(loss)

    def add_norm(self, norm: torch.Tensor) -> None:
        self._norms.append(norm.detach() if isinstance(norm, torch.Tensor) else torch.tensor(norm))
        if self._layers:
            self._layers.add_norm(norm)

    def step(self, step: int, epoch: float, lr: float) -> dict[str, float] | None:
        """After optimizer step number `step` (from 1). Every `every` steps: what was logged."""
        self._bar.update()
        self._step, self._before = step, len(self._losses)
        if self._layers:
            self._layers.end_step(step)
        if step % self.every and step != self._bar.total:
            return None
        return self._log(step, epoch, lr)

    def _log(self, step: int, epoch: float, lr: float) -> dict[str, float]:
        loss = torch.stack(self._losses).float().mean() if self._losses else None
        norm = torch.stack(self._norms).float().mean().item() if self._norms else None
        if loss is not None:    # on no process, or on all: they share the gradient
            loss = sum(processes.gather([loss.item()])) / processes.world()    # the one wait for the device
        now = time.perf_counter()
        passed = now - self._since
        values = {
            "step": step, "loss": loss, "lr": lr, "grad_norm": norm, "epoch": round(epoch, 4),
            "images_per_s": self._images * processes.world() / passed, "wait": self._waited / passed,
            "memory_gb": devices.peak_memory(self.device), "seconds": self._seconds_before + now - self._begin,
            **self.counts,
        }
        self._losses, self._norms, self._before, self._waited, self._since, self._images = [], [], 0, 0.0, now, 0
        if processes.is_main():
            with self.path.open("a") as file:
                file.write(json.dumps(values) + "\n")
            self.trackers.numbers(step, {name: value for name, value in values.items() if name != "step" and value is not None})
            shown = "none" if loss is None else f"{loss:.4f}"
            self._bar.set_postfix_str(f"loss {shown}, lr {lr:.1e}, {values['images_per_s']:.1f} images/s, "
                                      f"wait {values['wait']:.0%}, {values['memory_gb']:.1f} GB", refresh=False)
        return values

    def unlogged(self) -> dict[str, list[float]]:
        """What was added since the last line, averaged over processes: for a checkpoint between two lines."""
        everyone = processes.gather([[loss.item() for loss in self._losses]])
        return {"losses": [sum(values) / len(values) for values in zip(*everyone, strict=True)],
                "norms": [norm.item() for norm in self._norms]}

    @contextlib.contextmanager
    def paused(self):
        """Validation and saving do not count as training: the meter stands still in this context."""
        begin = time.perf_counter()
        watch.now(f"saving, drawing or evaluating after step {self._step}")
        yield
        self._since += time.perf_counter() - begin

    def close(self) -> None:
        self._bar.close()


def _forget_after(path: Path, step: int) -> float:
    """Drop lines of steps after `step` (a restart runs them again); the seconds the run took until then."""
    if not processes.is_main() or not path.exists():
        return 0.0
    kept = []
    for line in path.read_text().splitlines():
        try:
            values = json.loads(line)
        except ValueError:    # cut off by a kill
            continue
        if values["step"] <= step:
            kept.append((values["seconds"], line))
    partial = path.with_suffix(".tmp")
    partial.write_text("".join(line + "\n" for _, line in kept))
    os.replace(partial, path)
    return kept[-1][0] if kept else 0.0

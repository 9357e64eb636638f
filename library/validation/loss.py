"""The loss on images kept out of training, at fixed timesteps and with fixed noise: comparable from step to step."""

import contextlib
import json
from pathlib import Path

import torch

from library.data.cache import write_whole
from library.data.loader import Loader
from library.training import processes, sharding
from library.training.accelerator import say

NAME = "evaluation.jsonl"


def run(loss_of, held_out: Loader, images: int, timesteps: int, networks: list, average, step: int, output_dir: Path, trackers,
        accelerator, complete) -> dict[str, float]:
    """Mean loss of each evaluation set -> {id: loss}; written to evaluation.jsonl and the trackers, too.

    loss_of(batch) is the script's own loss. images: taken of each set, the first in its order; processes share them.
    timesteps: evenly spread over the schedule, all of them for every image. networks: set to evaluation meanwhile, the first
    with averaged weights if there are any. complete(batch) brings a batch to the device and encodes what is not cached.
    """
    for network in networks:
        network.eval()
    found = []
    averaged = average.applied(networks[0]) if average else contextlib.nullcontext()
    with torch.no_grad(), averaged, sharding.callable_alone(networks[0]), accelerator.autocast():
        for name, batch in held_out.one_by_one(images):
            batch = complete(batch)
            for number in range(timesteps):
                batch["timestep_draw"] = torch.full_like(batch["timestep_draw"], (number + 0.5) / timesteps)
                found.append((name, loss_of(batch).item()))
    for network in networks:
        network.train()
    found = processes.gather(found)
    losses = {name: sum(loss for other, loss in found if other == name) / sum(other == name for other, _ in found)
              for name in sorted({name for name, _ in found})}
    if processes.is_main():
        _write(output_dir / NAME, {"step": step, **losses})
        trackers.numbers(step, {f"loss/val/{name}": loss for name, loss in losses.items()})
    say(f"step {step}: evaluation loss " + ", ".join(f"{loss:.4f} ({name})" for name, loss in losses.items()))
    return losses


def _write(path: Path, line: dict) -> None:
    """Append a line; those of this step or later ones were written before a restart."""
    kept = []
    for text in path.read_text().splitlines() if path.exists() else ():
        with contextlib.suppress(ValueError):    # cut off by a kill
            kept += [text] if json.loads(text)["step"] < line["step"] else []
    write_whole(path, ("\n".join([*kept, json.dumps(line)]) + "\n").encode())

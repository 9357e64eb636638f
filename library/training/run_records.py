"""What --layer_statistics writes, as files: one an optimizer step, read without torch.

OUTPUT_DIR/layer_statistics/run.json has flags, versions and the number of processes; step-00000001.safetensors the statistics of
a step. A position is one micro step of one process, in the order in which a step's samples are dealt: with the same
--train_batch_size, position 3 has the same samples on one process with accumulation as on four processes.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from library.errors import UserError

FORMAT = 1
FOLDER = "layer_statistics"
NORM, MEAN, STD, MAX, SKETCH = 0, 1, 2, 3, slice(4, 20)    # of a tensor's 20 statistics; MAX is of absolute values
WIDTH = SKETCH.stop
ABSENT = -1.0    # the norm of what there is none of: a frozen weight's gradient, say


@dataclass
class Record:
    """One optimizer step. P positions of B samples, L calls of layers in the order in which they end, M modules, T tensors.

    arrays: input, output, output_gradient [P, L, 20] of each call; weight (before the update) and weight_gradient (of the whole
    step, not clipped) [M, 20]; loaded [P, T, 20] and checksum [P, T] of the loader's batch; given [P, T', 20], what the networks
    are called with; all float32 but checksum. loss [P]; grad_norm [1], NaN where it is not measured. samples: [P][B] of
    [name, content, visit].
    """

    step: int
    layers: list[str]
    modules: list[str]
    loaded: list[str]
    given: list[str]
    samples: list[list[list]]
    arrays: dict[str, np.ndarray]


def name_of(step: int) -> str:
    return f"step-{step:08d}.safetensors"


def steps_in(output_dir: Path) -> list[int]:
    """Numbers of the steps that were recorded, in order."""
    names = [path.name[5:-12] for path in (output_dir / FOLDER).glob("step-*.safetensors")]
    return sorted(int(name) for name in names if name.isdecimal())


def encode(record: Record) -> bytes:
    """A record as a safetensors file."""
    header = {name: getattr(record, name) for name in ("step", "layers", "modules", "loaded", "given", "samples")}
    arrays = {name: np.ascontiguousarray(values) for name, values in record.arrays.items()}
    return save(arrays, {"record": json.dumps(header | {"format": FORMAT})})


def read(output_dir: Path, step: int) -> Record:
    """The record of a step. Raises `UserError` for a file that is damaged or of another format."""
    path = output_dir / FOLDER / name_of(step)
    try:
        with safe_open(path, "numpy") as file:
            header = json.loads((file.metadata() or {})["record"])
            arrays = {name: file.get_tensor(name) for name in file.keys()}
        found = header.pop("format")
        record = Record(**header, arrays=arrays)
    except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} cannot be read: {error}. Leave it out, or train again with --{FOLDER}") from None
    if found != FORMAT:
        raise UserError(f"{path} has format {found} and this program reads {FORMAT}: compare with the version that wrote it")
    return record

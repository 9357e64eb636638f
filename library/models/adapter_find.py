"""An adapter as a command line names it, with its weight."""

import math
from pathlib import Path

from library.errors import UserError

DIFFUSERS_NAME = "pytorch_lora_weights.safetensors"


def find(text: str) -> tuple[Path, float]:
    """"FILE" or "FILE=WEIGHT" -> the file, and its weight (1 where none is given). What is there as written is a name.

    A folder stands for what a training script wrote there: diffusers' file, or else the only .safetensors. Raises `UserError`.
    """
    name, _, number = text.rpartition("=")
    weight = 1.0
    if name and not Path(text).exists():
        try:
            weight, text = float(number), name
        except ValueError:
            pass    # a name with =
    path = Path(text)
    if not math.isfinite(weight):
        raise UserError(f"the weight of {path} is {number}: it must be a number, such as 0.8")
    if not path.exists():
        raise UserError(f"there is no adapter {path} (give a file or a folder; with a weight it is FILE=0.8)")
    if path.is_dir() and not (path / DIFFUSERS_NAME).is_file():
        files = sorted(path.glob("*.safetensors"))
        if len(files) != 1:
            there = f"there are {', '.join(file.name for file in files)}" if files else "there is none"
            raise UserError(f"the folder {path} should hold one adapter, and {there}; name the file")
        return files[0], weight
    return path / DIFFUSERS_NAME if path.is_dir() else path, weight

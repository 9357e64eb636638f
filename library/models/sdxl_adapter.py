"""What a run of an SDXL adapter writes for use: one small file, in the keys of diffusers or of kohya."""

import contextlib
from pathlib import Path

from library.models import adapter_files
from library.training import processes
from library.training.accelerator import public


def save(output: Path, name: str, args, networks: dict, settings, average) -> list[Path]:
    """Write OUTPUT/pytorch_lora_weights.safetensors, OUTPUT/NAME.safetensors in kohya's keys, or both; the main process does.

    On the way, diffusers' file is OUTPUT/NAME/pytorch_lora_weights.safetensors. With an `average` (EMA), the UNet's is
    written. Returns what was written.
    """
    if not processes.is_main():
        return []
    folder, written = output if name == args.output_name else output / name, []
    metadata = {flag: str(value) for flag, value in public(args).items() if value not in (None, "", [], False)}
    with average.applied(networks["unet"]) if average else contextlib.nullcontext():
        if args.lora_format in ("diffusers", "both"):
            folder.mkdir(parents=True, exist_ok=True)
            path = folder / "pytorch_lora_weights.safetensors"
            written.append(adapter_files.save(path, networks, settings, "diffusers", metadata))
        if args.lora_format in ("kohya", "both"):
            written.append(adapter_files.save(output / f"{name}.safetensors", networks, settings, "kohya", metadata))
    return written

"""What a run of an SDXL adapter writes for use: one small file, in the keys of diffusers or of kohya."""

import contextlib
from pathlib import Path

from library.models import adapter_files, sdxl
from library.training import processes
from library.training.accelerator import public


def save(output: Path, name: str, args, networks: dict, settings, average, formats: tuple[str, ...]) -> list[Path]:
    """Write OUTPUT/pytorch_lora_weights.safetensors, OUTPUT/NAME.safetensors in kohya's keys, or both; the main process does.

    On the way, diffusers' file is OUTPUT/NAME/pytorch_lora_weights.safetensors. With an `average` (EMA), the UNet's is
    written. formats: "diffusers", "kohya" or both. Returns what was written.
    """
    if not processes.is_main():
        return []
    folder, written = output if name == args.output_name else output / name, []
    dtype = sdxl.DTYPES[args.save_precision] if args.save_precision else None
    metadata = {flag: str(value) for flag, value in public(args).items() if value not in (None, "", [], False)}
    with average.applied(networks["unet"]) if average else contextlib.nullcontext():
        if "diffusers" in formats:
            folder.mkdir(parents=True, exist_ok=True)
            path = folder / "pytorch_lora_weights.safetensors"
            written.append(adapter_files.save(path, networks, settings, "diffusers", metadata, dtype))
        if "kohya" in formats:
            written.append(adapter_files.save(output / f"{name}.safetensors", networks, settings, "kohya", metadata, dtype))
    return written

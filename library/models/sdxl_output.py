"""What a run of SDXL writes for use: a diffusers folder or one file; and its pipeline, for images while training."""

import functools
import json
import shutil
from pathlib import Path

from library.errors import UserError
from library.models import saving, sdxl
from library.models.sdxl import DTYPES, PARTS, Base
from library.training import processes, sharding

_LIBRARY = {"unet": ("diffusers", "UNet2DConditionModel"), "vae": ("diffusers", "AutoencoderKL"),
            "text_encoder": ("transformers", "CLIPTextModel"), "tokenizer": ("transformers", "CLIPTokenizer"),
            "text_encoder_2": ("transformers", "CLIPTextModelWithProjection"), "tokenizer_2": ("transformers", "CLIPTokenizer"),
            "scheduler": ("diffusers", "EulerDiscreteScheduler")}


def save_model(target: Path, args, base: Base, trained: dict, average, schedule) -> list[Path]:
    """Write the model, ready for use, in the kind and precision that the flags say; every process calls, the main one does.

    target: a folder, or the name of a file without its ending. trained: {part: network}. With an `average` (EMA), that
    is the UNet, and the one without averaging is kept beside it as `unet_raw` or NAME-raw. Returns what was written.
    """
    states = {part: (network, sharding.state_dict(network)) for part, network in trained.items()}
    averages = sharding.gather(average.averages) if average else {}
    if not processes.is_main():
        return []
    dtype, kind = DTYPES[args.save_precision] if args.save_precision else None, args.save_model_as
    if average:
        unet, raw = states["unet"]
        states |= {"unet": (unet, raw | averages), "unet_raw": (unet, raw)}
    networks = {part: sharding.with_weights(network, state, dtype) for part, (network, state) in states.items()}
    if kind == "diffusers":
        writers = {part: network.save_pretrained for part, network in networks.items()}
        writers |= {part: functools.partial(_write_frozen, base, part, dtype, schedule) for part in PARTS if part not in networks}
        saving.write_folder(target, writers, _index(base) | {"force_zeros_for_empty_prompt": not guides_from_encoded(args, base)})
        return [target]
    from library.models.single_file import save_single_file
    frozen = {part: sdxl.load_part(base, part, dtype) for part in PARTS[1:4] if part not in networks}
    written = []
    for unet, suffix in (("unet", ""), ("unet_raw", "-raw")):
        if unet in networks:
            states = {part: net.state_dict() for part, net in (frozen | networks).items() if not part.startswith("unet")}
            path = target.with_name(f"{target.name}{suffix}.{kind}")
            save_single_file(path, states | {"unet": networks[unet].state_dict()}, networks[unet].config, dtype,
                             prediction_type=schedule.config.prediction_type, resolution=args.resolution,
                             zero_terminal_snr=schedule.config.rescale_betas_zero_snr)
            written.append(path)
    return written


def make_pipeline(base: Base, unet, vae, schedule):
    """StableDiffusionXLPipeline of models in memory, for prompts that are encoded already."""
    from diffusers import StableDiffusionXLPipeline
    return StableDiffusionXLPipeline(
        vae=vae, unet=unet, text_encoder=None, text_encoder_2=None, tokenizer=None, tokenizer_2=None,
        scheduler=_sampler(base, schedule), add_watermarker=False)


def base_guides_from_encoded(base: Base) -> bool:
    """Whether the base's guidance starts from the encoded empty prompt; SDXL's own starts from zeros."""
    return not _index(base)["force_zeros_for_empty_prompt"]


def guides_from_encoded(args, base: Base) -> bool:
    """Whether guidance starts from the encoded empty prompt (else from zeros): it does where that was trained."""
    return args.proportion_empty_prompts > 0 or base_guides_from_encoded(base)


def check_base(base: Base, schedule) -> None:
    """Read what a saved model takes from the base now, not after days of training. Raises `UserError`."""
    try:
        _sampler(base, schedule)
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"cannot make the scheduler that model_index.json in {base.configs} names: {error}") from error


def _write_frozen(base: Base, part: str, dtype, schedule, folder: Path) -> None:
    """A part as it is in the base, where that is a folder; else loaded and saved."""
    if part == "scheduler":
        _sampler(base, schedule).save_pretrained(folder)
    elif part.startswith("tokenizer"):
        shutil.copytree(base.tokenizers[part.endswith("_2")], folder)
    elif dtype is None and base.variant is None and (found := base.files(part)[0]).is_dir():
        shutil.copytree(found, folder)
    else:
        sdxl.load_part(base, part, dtype).save_pretrained(folder)


def _index(base: Base) -> dict:
    """model_index.json of the base, or the usual one of SDXL."""
    usual = {"_class_name": "StableDiffusionXLPipeline", "_diffusers_version": "0.42.1", "force_zeros_for_empty_prompt": True,
             **{part: list(kind) for part, kind in _LIBRARY.items()}}
    path = base.configs / "model_index.json"
    own = json.loads(path.read_text()) if path.is_file() else {}
    return usual | {name: value for name, value in own.items() if name in usual}


def _sampler(base: Base, schedule):
    """The base model's own scheduler, with what training changed of the noise schedule."""
    import diffusers
    name = _index(base)["scheduler"][1]
    changes = {key: schedule.config[key] for key in ("prediction_type", "rescale_betas_zero_snr")}
    if schedule.config.rescale_betas_zero_snr:
        changes["timestep_spacing"] = "trailing"
    kind = getattr(diffusers, name)
    return kind.from_config(kind.load_config(base.configs, subfolder="scheduler", local_files_only=True), **changes)

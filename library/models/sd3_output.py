"""What a run of SD3 writes for use, a diffusers folder or one file; and its pipeline, for images while training."""

import functools
import json
import math
import shutil
from pathlib import Path

from library.errors import UserError
from library.flags_sd3 import SIZE_STEP
from library.models import saving, sd3, sd3_file
from library.models.parts import DTYPES, TOKENIZERS, Base
from library.training import processes, sharding
from library.training.accelerator import say

_LIBRARY = {"transformer": ("diffusers", "SD3Transformer2DModel"), "vae": ("diffusers", "AutoencoderKL"),
            "text_encoder": ("transformers", "CLIPTextModelWithProjection"), "tokenizer": ("transformers", "CLIPTokenizer"),
            "text_encoder_2": ("transformers", "CLIPTextModelWithProjection"), "tokenizer_2": ("transformers", "CLIPTokenizer"),
            "text_encoder_3": ("transformers", "T5EncoderModel"), "tokenizer_3": ("transformers", "T5TokenizerFast"),
            "scheduler": ("diffusers", "FlowMatchEulerDiscreteScheduler")}


def save_model(target: Path, args, base: Base, trained: dict, average) -> list[Path]:
    """Write the model, ready for use, in the kind and precision that the flags say; every process calls, the main one does.

    target: a folder, or the name of a file without its ending. trained: {part: network}. With an `average` (EMA), that is the
    transformer, and the one without averaging is kept beside it as `transformer_raw` or NAME-raw. Of a run without T5, it has
    none. Returns what was written.
    """
    states = {part: (network, sharding.state_dict(network)) for part, network in trained.items()}
    averages = sharding.gather(average.averages) if average else {}
    if not processes.is_main():
        return []
    dtype = DTYPES[args.save_precision] if args.save_precision else None
    if average:
        network, raw = states["transformer"]
        states |= {"transformer": (network, raw | averages), "transformer_raw": (network, raw)}
    if args.save_model_as != "diffusers":
        return _save_files(target, args, base, {part: state for part, (_, state) in states.items()}, dtype)
    writers = {part: sharding.with_weights(network, state, dtype).save_pretrained for part, (network, state) in states.items()}
    index = _index(base)
    for part in _LIBRARY:
        if index[part][0] and part not in writers:
            writers[part] = functools.partial(_write_frozen, base, part, dtype)
    saving.write_folder(target, writers, index)
    return [target]


def _save_files(target: Path, args, base: Base, states: dict, dtype) -> list[Path]:
    frozen = [part for part in sd3.PARTS[:5] if _index(base)[part][0] and part not in states]
    whole, written = {part: sd3.load_part(base, part, dtype).state_dict() for part in frozen} | states, []
    for part, suffix in (("transformer", ""), ("transformer_raw", "-raw")):
        if part in states:
            written.append(target.with_name(f"{target.name}{suffix}.{args.save_model_as}"))
            own = {name: state for name, state in whole.items() if not name.startswith("transformer")}
            save_file(written[-1], own | {"transformer": whole[part]}, dtype, args.resolution)
    return written


def save_file(path: Path, states: dict, dtype, resolution: tuple[int, int]) -> None:
    """`sd3_file.save`, which says what it moves."""
    if sd3_file.projects(states.get("text_encoder", {})):
        say("one file has no place for a projection of CLIP ViT-L: it is written as part of the transformer's layer behind it")
    sd3_file.save(path, states, dtype, resolution)


def make_pipeline(base: Base, transformer, vae):
    """StableDiffusion3Pipeline of models in memory, for prompts that are encoded already."""
    from diffusers import StableDiffusion3Pipeline
    absent = dict.fromkeys(("text_encoder", "text_encoder_2", "text_encoder_3", *TOKENIZERS))
    return StableDiffusion3Pipeline(transformer=transformer, vae=vae, scheduler=sampler(base), **absent)


def skip_layer_guidance(layers: list[int] | None, scale: float, start: float, stop: float) -> dict:
    """The pipeline's options: it leaves these layers out between two shares of the steps, and goes away from what they draw."""
    if layers is None:
        return {}
    return {"skip_guidance_layers": layers, "skip_layer_guidance_scale": scale, "skip_layer_guidance_start": start,
            "skip_layer_guidance_stop": stop}


def check_base(base: Base, skip_layers: list[int] | None, flag: str = "--validation_guidance_skip_layers") -> None:
    """Read what a saved model and its pipeline take from the base now, not after days of training. Raises `UserError`.

    flag: that the layers were named by.
    """
    try:
        sampler(base)
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"cannot make the scheduler that model_index.json in {base.configs} names: {error}") from error
    layers = sd3.transformer_config(base)["num_layers"]
    if wrong := [layer for layer in skip_layers or [] if layer >= layers]:
        raise UserError(f"{flag}: there is no layer {wrong[0]}: the transformer in {base.path} has layers 0 to {layers - 1}")


def check_sizes(base: Base | None, sizes: list[tuple[int, int]],
                settings: str = "resolution, bucket_reso_steps or aspect_bucket_alignment") -> None:
    """Refuse (width, height) whose latents are no pairs, or more than the grid of positions holds. Raises `UserError`.

    base: None where the model is not there, so that its grid is not known. settings: what made the sizes; data sets may say
    some of their own.
    """
    longest = SIZE_STEP * sd3.transformer_config(base)["pos_embed_max_size"] if base else math.inf
    if odd := [size for size in sizes if any(side % SIZE_STEP or side > longest for side in size)]:
        raise UserError(f"SD3 takes no images of {odd[0][0]} x {odd[0][1]} pixels: sides must be multiples of {SIZE_STEP}"
                        f"{f', and in this model at most {longest}' if base else ''}; change {settings}")


def _write_frozen(base: Base, part: str, dtype, folder: Path) -> None:
    """A part as it is in the base, where that is a folder; else loaded and saved."""
    if part == "scheduler":
        sampler(base).save_pretrained(folder)
    elif part in TOKENIZERS:
        shutil.copytree(base.tokenizers[TOKENIZERS.index(part)], folder)
    elif dtype is None and base.variant is None and (found := base.place(part)).is_dir():
        shutil.copytree(found, folder)
    else:
        sd3.load_part(base, part, dtype).save_pretrained(folder)


def _index(base: Base) -> dict:
    """model_index.json of the base, or the usual one of SD3; without T5 where the run has none."""
    path = base.configs / "model_index.json"
    own = json.loads(path.read_text()) if path.is_file() else {}
    index = {"_class_name": "StableDiffusion3Pipeline", "_diffusers_version": "0.42.1",
             **{part: list(kind) for part, kind in _LIBRARY.items()}}
    index |= {name: value for name, value in own.items() if name in index and value != [None, None]}
    if len(base.tokenizers) < len(TOKENIZERS):
        index |= {"text_encoder_3": [None, None], "tokenizer_3": [None, None]}
    return index


def sampler(base: Base):
    """The base model's own scheduler."""
    import diffusers
    kind = getattr(diffusers, _index(base)["scheduler"][1])
    return kind.from_config(kind.load_config(base.configs, subfolder="scheduler", local_files_only=True))

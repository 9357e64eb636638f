"""What a run of SD3 writes for use, a diffusers folder; and its pipeline, for images while training."""

import functools
import json
import shutil
from pathlib import Path

from library.errors import UserError
from library.flags_sd3 import SIZE_STEP
from library.models import saving, sd3
from library.models.parts import DTYPES, TOKENIZERS, Base
from library.models.sdxl_output import with_weights
from library.training import processes

_LIBRARY = {"transformer": ("diffusers", "SD3Transformer2DModel"), "vae": ("diffusers", "AutoencoderKL"),
            "text_encoder": ("transformers", "CLIPTextModelWithProjection"), "tokenizer": ("transformers", "CLIPTokenizer"),
            "text_encoder_2": ("transformers", "CLIPTextModelWithProjection"), "tokenizer_2": ("transformers", "CLIPTokenizer"),
            "text_encoder_3": ("transformers", "T5EncoderModel"), "tokenizer_3": ("transformers", "T5TokenizerFast"),
            "scheduler": ("diffusers", "FlowMatchEulerDiscreteScheduler")}


def save_model(target: Path, args, base: Base, trained: dict, average) -> list[Path]:
    """Write the model as a diffusers folder in the precision that the flags say; the main process does -> [target].

    trained: {part: network}. With an `average` (EMA), that is the transformer, and the one without averaging is kept beside
    it as `transformer_raw`. Of a run without T5, it has none.
    """
    if not processes.is_main():
        return []
    dtype = DTYPES[args.save_precision] if args.save_precision else None
    states = {part: (network, network.state_dict()) for part, network in trained.items()}
    if average:
        network, raw = states["transformer"]
        states |= {"transformer": (network, raw | average.averages), "transformer_raw": (network, raw)}
    writers = {part: with_weights(network, state, dtype).save_pretrained for part, (network, state) in states.items()}
    index = _index(base)
    for part in _LIBRARY:
        if index[part][0] and part not in writers:
            writers[part] = functools.partial(_write_frozen, base, part, dtype)
    saving.write_folder(target, writers, index)
    return [target]


def make_pipeline(base: Base, transformer, vae):
    """StableDiffusion3Pipeline of models in memory, for prompts that are encoded already."""
    from diffusers import StableDiffusion3Pipeline
    absent = dict.fromkeys(("text_encoder", "text_encoder_2", "text_encoder_3", *TOKENIZERS))
    return StableDiffusion3Pipeline(transformer=transformer, vae=vae, scheduler=_sampler(base), **absent)


def skip_layer_guidance(layers: list[int] | None, scale: float, start: float, stop: float) -> dict:
    """The pipeline's options: it leaves these layers out between two shares of the steps, and goes away from what they draw."""
    if layers is None:
        return {}
    return {"skip_guidance_layers": layers, "skip_layer_guidance_scale": scale, "skip_layer_guidance_start": start,
            "skip_layer_guidance_stop": stop}


def check_base(base: Base, skip_layers: list[int] | None) -> None:
    """Read what a saved model and its pipeline take from the base now, not after days of training. Raises `UserError`."""
    try:
        _sampler(base)
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"cannot make the scheduler that model_index.json in {base.configs} names: {error}") from error
    layers = sd3.transformer_config(base)["num_layers"]
    if wrong := [layer for layer in skip_layers or [] if layer >= layers]:
        raise UserError(f"--validation_guidance_skip_layers: there is no layer {wrong[0]}: the transformer in {base.path} has "
                        f"layers 0 to {layers - 1}")


def check_sizes(base: Base, sizes: list[tuple[int, int]]) -> None:
    """Refuse (width, height) whose latents are no pairs, or more than the grid of positions holds. Raises `UserError`.

    Data sets may say sizes of their own.
    """
    longest = SIZE_STEP * sd3.transformer_config(base)["pos_embed_max_size"]
    if odd := [size for size in sizes if any(side % SIZE_STEP or side > longest for side in size)]:
        raise UserError(f"SD3 takes no images of {odd[0][0]} x {odd[0][1]} pixels: sides must be multiples of {SIZE_STEP}, and "
                        f"in this model at most {longest}; change resolution, bucket_reso_steps or aspect_bucket_alignment")


def _write_frozen(base: Base, part: str, dtype, folder: Path) -> None:
    """A part as it is in the base, where that is a folder; else loaded and saved."""
    if part == "scheduler":
        _sampler(base).save_pretrained(folder)
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


def _sampler(base: Base):
    """The base model's own scheduler."""
    import diffusers
    kind = getattr(diffusers, _index(base)["scheduler"][1])
    return kind.from_config(kind.load_config(base.configs, subfolder="scheduler", local_files_only=True))

"""SD 3 and 3.5 as ONE .safetensors file, in Stability's layout: read by part. diffusers converts transformer and VAE."""

import contextlib
import logging
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from library.errors import UserError

PREFIXES = {"transformer": "model.diffusion_model.", "vae": "first_stage_model.",
            "text_encoder": "text_encoders.clip_l.transformer.", "text_encoder_2": "text_encoders.clip_g.transformer.",
            "text_encoder_3": "text_encoders.t5xxl.transformer."}


def parts_in(path: Path) -> tuple[str, ...]:
    """The networks that a file holds. Raises `UserError` where it is damaged, or no SD3."""
    with _reading(path) as file:
        names = list(file.keys())
    if not any(name.startswith(f"{PREFIXES['transformer']}joint_blocks.") for name in names):
        raise UserError(f"{path} holds no transformer of SD 3 or 3.5 (no tensor named {PREFIXES['transformer']}joint_blocks.*)")
    return tuple(part for part, prefix in PREFIXES.items() if any(name.startswith(prefix) for name in names))


def load_part(path: Path, part: str, kind: type, configs: Path, dtype: torch.dtype):
    """One network of a file on the CPU, frozen, in evaluation mode; the rest of the file is not read.

    kind: its class. configs: the diffusers folder with its config.json. Raises `UserError`.
    """
    prefix = PREFIXES[part]
    with _reading(path) as file:
        weights = {name: file.get_tensor(name).to(dtype, copy=True) for name in file.keys() if name.startswith(prefix)}
    try:
        model = _build(part, kind, str(configs), weights, dtype)
        if lacking := sorted(name for name, tensor in model.state_dict().items() if tensor.is_meta):
            raise ValueError(f"{len(lacking)} tensors are missing, first {lacking[0]}")
    except (OSError, AttributeError, IndexError, KeyError, RuntimeError, ValueError) as error:
        raise UserError(f"the {part} in {path} is not one of {configs / part}: {error}. Name the diffusers folder of the same "
                        "model by --single_file_config") from error
    return model.eval().requires_grad_(False)


def _build(part: str, kind: type, configs: str, weights: dict[str, torch.Tensor], dtype: torch.dtype):
    if part in ("transformer", "vae"):
        quiet = logging.getLogger("diffusers.models.modeling_utils")    # warns at every cast, of no modules at all
        quiet.addFilter(lambda record: "float32: []" not in record.getMessage())
        return kind.from_single_file(weights, config=configs, subfolder=part, dtype=dtype, local_files_only=True)
    state = {name.removeprefix(PREFIXES[part]): tensor for name, tensor in weights.items()}
    config = kind.config_class.from_pretrained(configs, subfolder=part, local_files_only=True)
    if part == "text_encoder" and "text_projection.weight" not in state:    # Stability's code reads CLIP ViT-L unprojected
        state["text_projection.weight"] = torch.eye(config.projection_dim, config.hidden_size, dtype=dtype)
    model, info = kind.from_pretrained(None, config=config, state_dict=state, dtype=dtype, output_loading_info=True,
                                       ignore_mismatched_sizes=True)
    if wrong := sorted([*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])]):
        raise ValueError(f"{len(wrong)} tensors are missing or of another shape, first {wrong[0]}")
    return model


@contextlib.contextmanager
def _reading(path: Path):
    if path.suffix != ".safetensors":
        raise UserError(f"{path}: SD3 is read from .safetensors alone; convert the file")
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except SafetensorError as error:
        raise UserError(f"{path} is damaged or cut short ({error}). Copy it again") from error

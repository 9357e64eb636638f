"""SD 3 and 3.5 as ONE .safetensors file, in Stability's layout, which ComfyUI reads: read by part, and written.

diffusers converts transformer and VAE as they are read; it has nothing that writes them, so that half is ours.
"""

import contextlib
import datetime
import logging
import re
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from library.errors import UserError
from library.models import single_file

PREFIXES = {"transformer": "model.diffusion_model.", "vae": "first_stage_model.",
            "text_encoder": "text_encoders.clip_l.transformer.", "text_encoder_2": "text_encoders.clip_g.transformer.",
            "text_encoder_3": "text_encoders.t5xxl.transformer."}


def _table(text: str) -> dict[str, list[str]]:
    return {theirs: ours.split("+") for theirs, ours in (entry.split("=") for entry in text.split())}


# a module of Stability's transformer = diffusers' modules that it is made of, outside of the blocks and in each of them
OUTSIDE = _table("""
    pos_embed=pos_embed.pos_embed  x_embedder.proj=pos_embed.proj  context_embedder=context_embedder
    t_embedder.mlp.0=time_text_embed.timestep_embedder.linear_1  t_embedder.mlp.2=time_text_embed.timestep_embedder.linear_2
    y_embedder.mlp.0=time_text_embed.text_embedder.linear_1  y_embedder.mlp.2=time_text_embed.text_embedder.linear_2
    final_layer.adaLN_modulation.1=norm_out.linear  final_layer.linear=proj_out
""")
BLOCK = _table("""
    x_block.adaLN_modulation.1=norm1.linear  context_block.adaLN_modulation.1=norm1_context.linear
    x_block.attn.qkv=attn.to_q+attn.to_k+attn.to_v  context_block.attn.qkv=attn.add_q_proj+attn.add_k_proj+attn.add_v_proj
    x_block.attn.ln_q=attn.norm_q  x_block.attn.ln_k=attn.norm_k
    context_block.attn.ln_q=attn.norm_added_q  context_block.attn.ln_k=attn.norm_added_k
    x_block.attn.proj=attn.to_out.0  context_block.attn.proj=attn.to_add_out
    x_block.attn2.qkv=attn2.to_q+attn2.to_k+attn2.to_v  x_block.attn2.proj=attn2.to_out.0
    x_block.attn2.ln_q=attn2.norm_q  x_block.attn2.ln_k=attn2.norm_k
    x_block.mlp.fc1=ff.net.0.proj  x_block.mlp.fc2=ff.net.2
    context_block.mlp.fc1=ff_context.net.0.proj  context_block.mlp.fc2=ff_context.net.2
""")
_PLACES = {ours: (theirs, place, len(names)) for theirs, names in (OUTSIDE | BLOCK).items() for place, ours in enumerate(names)}
_POOLED = "time_text_embed.text_embedder.linear_1.weight"    # of diffusers: reads the pooled embeddings of both CLIPs
_PROJECTION = "text_projection.weight"


def holds_sd3(path: Path) -> bool:
    """Whether a file holds a transformer of SD 3 or 3.5. Raises `UserError` where it is damaged."""
    if path.suffix != ".safetensors":
        return False
    with _reading(path) as file:
        return any(name.startswith(f"{PREFIXES['transformer']}joint_blocks.") for name in file.keys())


def usual_configs(path: Path) -> str:
    """The hub id of Stability's diffusers folder whose transformer has the blocks and the grid of the one in a file."""
    with _reading(path) as file:
        if f"{PREFIXES['transformer']}joint_blocks.37.x_block.mlp.fc1.weight" in file.keys():
            return "stabilityai/stable-diffusion-3.5-large"
        places = file.get_slice(f"{PREFIXES['transformer']}pos_embed").get_shape()[1]
    return f"stabilityai/stable-diffusion-{'3-medium-diffusers' if places <= 192**2 else '3.5-medium'}"


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


def to_original(states: dict[str, dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """State dicts of diffusers and transformers, by part -> the tensors of one file in Stability's layout.

    Shapes are kept, except: q, k, v [D, D] become one qkv [3 D, D]; where diffusers reads scale, then shift (after the last
    block, and in its text stream) they change places; the VAE's attention becomes convolutions. CLIP ViT-L has no projection
    in this layout: what it is, if not the identity, goes into the transformer's layer that reads its output. A name without a
    place is a ValueError. Source: the modules of Stability-AI/sd3.5.
    """
    states = _without_projection(states)
    renamed = _transformer(states["transformer"]) if "transformer" in states else {}
    if "vae" in states:
        renamed |= single_file.to_sgm({"vae": states["vae"]})
    for part in (part for part in states if part.startswith("text_encoder")):
        renamed |= {PREFIXES[part] + name: tensor for name, tensor in states[part].items()}
    return renamed


def _transformer(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    left, renamed = dict(state), {}
    last = max(int(name.split(".")[1]) for name in state if name.startswith("transformer_blocks."))
    blocks = [(f"joint_blocks.{number}.", f"transformer_blocks.{number}.", BLOCK) for number in range(last + 1)]
    for theirs, ours, table in [("", "", OUTSIDE), *blocks]:
        for module, sources in table.items():
            for kind in (".weight", ".bias", ""):
                if f"{ours}{sources[0]}{kind}" in left:
                    pieces = [left.pop(f"{ours}{source}{kind}") for source in sources]
                    if _is_turned(theirs + module, last):
                        pieces = pieces[0].chunk(2)[::-1]
                    renamed[f"{PREFIXES['transformer']}{theirs}{module}{kind}"] = torch.cat(list(pieces)) if len(pieces) > 1 \
                        else pieces[0]
    if left:
        raise ValueError(f"Stability's layout of SD3 has no place for {next(iter(left))}")
    return renamed


def _is_turned(module: str, last: int) -> bool:
    """Whether Stability has shift, then scale, where diffusers has scale, then shift. last: the number of the last block."""
    return module in ("final_layer.adaLN_modulation.1", f"joint_blocks.{last}.context_block.adaLN_modulation.1")


def place_of(part: str, name: str, blocks: int) -> tuple[str, Callable[[torch.Tensor], torch.Tensor]]:
    """Where a tensor of a transformer (of so many blocks) or text encoder lies -> its name in a file, and what it is of that."""
    block, ours, kind = re.fullmatch(r"(?:transformer_blocks\.(\d+)\.)?(.+?)(\.weight|\.bias)?", name).groups()
    if part != "transformer" or ours not in _PLACES:
        return PREFIXES[part] + name, torch.Tensor.detach
    module, place, count = _PLACES[ours]
    module = f"joint_blocks.{block}.{module}" if block else module
    turned = _is_turned(module, blocks - 1)
    return (f"{PREFIXES[part]}{module}{kind or ''}",
            lambda tensor: torch.cat(tensor.chunk(2)[::-1]) if turned else tensor.chunk(count)[place])


def projects(state: dict[str, torch.Tensor]) -> bool:
    """Whether the projection of CLIP ViT-L is another than the identity, which is all that Stability's layout knows."""
    own = state.get(_PROJECTION)
    return own is not None and not torch.equal(own, torch.eye(*own.shape, dtype=own.dtype, device=own.device))


def _without_projection(states: dict[str, dict[str, torch.Tensor]]) -> dict[str, dict[str, torch.Tensor]]:
    clip = states.get("text_encoder", {})
    if projects(clip):
        own, transformer = clip[_PROJECTION].float(), states["transformer"]
        reads = transformer[_POOLED]    # W p + W' p', of which p = P q: (W P) q + W' p'
        joined = torch.cat([reads[:, :len(own)].float() @ own, reads[:, len(own):].float()], dim=1).to(reads.dtype)
        states = states | {"transformer": transformer | {_POOLED: joined}}
    return states | ({"text_encoder": {name: t for name, t in clip.items() if name != _PROJECTION}} if clip else {})


def save(path: Path, states: dict[str, dict[str, torch.Tensor]], dtype: torch.dtype | None, resolution: tuple[int, int]) -> None:
    """Write one file, whole or not at all. states: as for `to_original`. dtype: of its tensors, None keeps theirs.

    resolution: (width, height), for the header. Takes as much CPU memory as the file. Raises `UserError`: a weight too large
    for dtype, or a file that cannot be written.
    """
    tensors = {}
    for name, tensor in to_original(states).items():
        tied = name.endswith("embed_tokens.weight")    # T5's, which a file must hold twice: diffusers reads either alone
        tensors[name] = single_file.for_file(name, tensor.clone() if tied else tensor, dtype)
    blocks = {name.split(".")[3] for name in tensors if name.startswith(f"{PREFIXES['transformer']}joint_blocks.")}
    kind = "3.5-large" if len(blocks) == 38 else "3.5-medium" if any(".attn2." in name for name in tensors) else "3-medium"
    single_file.write(path, tensors, {    # https://github.com/Stability-AI/ModelSpec
        "format": "pt", "modelspec.sai_model_spec": "1.0.0", "modelspec.architecture": f"stable-diffusion-v{kind}",
        "modelspec.implementation": "https://github.com/Stability-AI/sd3.5", "modelspec.title": path.stem,
        "modelspec.date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "modelspec.resolution": f"{resolution[0]}x{resolution[1]}"})


@contextlib.contextmanager
def _reading(path: Path):
    if path.suffix != ".safetensors":
        raise UserError(f"{path}: SD3 is read from .safetensors alone; convert the file")
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except SafetensorError as error:
        raise UserError(f"{path} is damaged or cut short ({error}). Copy it again") from error

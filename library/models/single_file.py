"""SDXL as ONE file: the SGM layout that kohya's scripts, ComfyUI and A1111 read and write.

diffusers reads this layout but its package has no writer: the writing half (`to_sgm`) is ours, the reading half
diffusers'. A "part" is one of PARTS, named as its folder is in a diffusers pipeline.
"""

import contextlib
import datetime
import logging
import os
import pickle
import re
import zipfile
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor, nn

from library.errors import UserError

PARTS = {
    "unet": "model.diffusion_model.",
    "vae": "first_stage_model.",
    "text_encoder": "conditioner.embedders.0.transformer.",
    "text_encoder_2": "conditioner.embedders.1.model.",
}
SDXL_BASE = "stabilityai/stable-diffusion-xl-base-1.0"
UNREADABLE = (safetensors.SafetensorError, pickle.UnpicklingError, EOFError, OSError, RuntimeError, AttributeError)
IDLE_TENSORS = ("position_ids", "logit_scale")  # in others' files: a buffer of old transformers, CLIP's temperature


def _table(text):
    return dict(entry.split("=") for entry in text.split())


# diffusers' or transformers' name = the name in SGM, LDM or OpenCLIP. unet_blocks has the blocks of the UNet.
UNET_NAMES = _table("""
    time_embedding.linear_1=time_embed.0  time_embedding.linear_2=time_embed.2  conv_in=input_blocks.0.0
    add_embedding.linear_1=label_emb.0.0  add_embedding.linear_2=label_emb.0.2  conv_norm_out=out.0  conv_out=out.2
""")
RESNET_NAMES = _table("""
    norm1=in_layers.0   conv1=in_layers.2   time_emb_proj=emb_layers.1
    norm2=out_layers.0  conv2=out_layers.3  conv_shortcut=skip_connection
""")
VAE_NAMES = _table("""
    conv_norm_out=norm_out  mid_block.resnets.0=mid.block_1  mid_block.resnets.1=mid.block_2  mid_block.=mid.
    attentions.0=attn_1  group_norm=norm  to_q=q  to_k=k  to_v=v  to_out.0=proj_out  conv_shortcut=nin_shortcut
    down_blocks=down  up_blocks=up  resnets=block  downsamplers.0=downsample  upsamplers.0=upsample
""")
OPENCLIP_NAMES = _table("""
    embeddings.token_embedding=token_embedding  embeddings.position_embedding.weight=positional_embedding
    final_layer_norm=ln_final  encoder.layers=transformer.resblocks  layer_norm1=ln_1  layer_norm2=ln_2
    mlp.fc1=mlp.c_fc  mlp.fc2=mlp.c_proj  self_attn.out_proj=attn.out_proj
""")
# Left of a name after renaming, these tell of another architecture, ...
FOREIGN = re.compile(r"attentions|resnets|samplers|_blocks?\.|embeddings|layers|self_attn|embed_")
# ... and these, before it, of adapters not yet merged, or of a model still wrapped by torch.compile, DDP or PEFT.
WRAPPED = re.compile(r"(^|\.)(_orig_mod|module|base_model|base_layer|lora_\w+)\.")


def to_sgm(states: dict[str, dict[str, Tensor]], unet_config: dict | None = None) -> dict[str, Tensor]:
    """Rename state dicts of diffusers and transformers to the SGM layout.

    `states`: PARTS' names -> state dicts; a part left out is left out of the result. `unet_config`: `unet.config`,
    needed with a UNet; its numbers of blocks and layers are read from it, so any width and depth will do.
    Shapes are kept, except: the VAE's attention becomes 1x1 convolutions [C, C, 1, 1]; in text_encoder_2, q, k, v
    [W, W] become one in_proj_weight [3W, W], and text_projection is transposed to [W, P]. Nothing is left out in
    silence: a name without a place is a ValueError. Source: the modules of Stability-AI/generative-models, open_clip.
    """
    convert = {
        "unet": lambda state: _unet_to_sgm(state, unet_config),
        "vae": _vae_to_ldm,
        # transformers 5 dropped `text_model.` from CLIPTextModel (not from ...WithProjection); all readers expect it.
        "text_encoder": lambda state: {"text_model." + n.removeprefix("text_model."): t for n, t in state.items()},
        "text_encoder_2": _clip_to_openclip,
    }
    if wrapped := [name for state in states.values() for name in state if WRAPPED.search(name)]:
        raise ValueError(f"unwrap the model and merge its adapters before saving: it has a tensor {wrapped[0]}")
    return {PARTS[part] + n: tensor for part, state in states.items() for n, tensor in convert[part](state).items()}


def _unet_to_sgm(state, config):
    blocks = UNET_NAMES | unet_blocks(config)
    renamed = {}
    for name, tensor in state.items():
        pieces = name.split(".")
        head = next((head for n in range(len(pieces), 0, -1) if (head := ".".join(pieces[:n])) in blocks), None)
        if head is None:
            raise ValueError(f"the single-file layout of SDXL has no place for {name}")
        tail = name.removeprefix(head)
        if ".resnets." in head:
            module = tail.split(".")[1]
            tail = tail.replace(module, RESNET_NAMES[module], 1)
        renamed[blocks[head] + tail] = tensor
    return renamed


def unet_blocks(config):
    """diffusers' nested blocks -> SGM's running numbers; in the encoder each downsampling has a number of its own."""
    layers = config["layers_per_block"]
    layers = [layers] * len(config["down_block_types"]) if isinstance(layers, int) else list(layers)
    names = {f"mid_block.resnets.{layer}": f"middle_block.{2 * layer}" for layer in range(2)}
    names["mid_block.attentions.0"] = "middle_block.1"
    number = 1  # input_blocks.0 is conv_in
    for block, count in enumerate(layers):
        for layer in range(count):
            names[f"down_blocks.{block}.resnets.{layer}"] = f"input_blocks.{number}.0"
            names[f"down_blocks.{block}.attentions.{layer}"] = f"input_blocks.{number}.1"
            number += 1
        names[f"down_blocks.{block}.downsamplers.0.conv"] = f"input_blocks.{number}.0.op"
        number += 1
    number = 0
    for block, (count, kind) in enumerate(zip(reversed(layers), config["up_block_types"], strict=True)):
        for layer in range(count + 1):
            names[f"up_blocks.{block}.resnets.{layer}"] = f"output_blocks.{number}.0"
            names[f"up_blocks.{block}.attentions.{layer}"] = f"output_blocks.{number}.1"
            number += 1
        # The upsampler is the last module of the block's last layer: third where that has attention, else second.
        names[f"up_blocks.{block}.upsamplers.0.conv"] = f"output_blocks.{number - 1}.{2 if 'Attn' in kind else 1}.conv"
    return names


def _rename(name, table):
    renamed = name
    for theirs, ours in table.items():
        renamed = renamed.replace(theirs, ours)
    if FOREIGN.search(renamed):
        raise ValueError(f"the single-file layout of SDXL has no place for {name}")
    return renamed


def _vae_to_ldm(state):
    last = max((int(name.split(".")[2]) for name in state if name.startswith("decoder.up_blocks.")), default=0)
    renamed = {}
    for name, tensor in state.items():
        # LDM numbers the decoder's blocks by resolution, as in the encoder; diffusers in the order they run.
        name = re.sub(r"^decoder\.up_blocks\.(\d+)", lambda found: f"decoder.up_blocks.{last - int(found[1])}", name)
        name = _rename(name, VAE_NAMES)
        renamed[name] = tensor[:, :, None, None] if ".attn_1." in name and tensor.ndim == 2 else tensor
    return renamed


def _clip_to_openclip(state):
    state = {name.removeprefix("text_model."): tensor for name, tensor in state.items()}
    renamed = {}
    for name, tensor in state.items():
        qkv = re.fullmatch(r"encoder\.layers\.(\d+)\.self_attn\.([qkv])_proj\.(weight|bias)", name)
        if name == "text_projection.weight":
            renamed["text_projection"] = tensor.T  # OpenCLIP computes x @ P, nn.Linear x @ W.T
        elif qkv is None and not name.endswith("position_ids"):
            renamed[_rename(name, OPENCLIP_NAMES)] = tensor
        elif qkv is not None and qkv[2] == "q":
            joined = torch.cat([state[name.replace("q_proj", f"{letter}_proj")] for letter in "qkv"])
            renamed[f"transformer.resblocks.{qkv[1]}.attn.in_proj_{qkv[3]}"] = joined
    return renamed


def save_single_file(
    path: str | Path,
    states: dict[str, dict[str, Tensor]],
    unet_config: dict,
    dtype: torch.dtype | None = None,
    prediction_type: str = "epsilon", zero_terminal_snr: bool = False, resolution: tuple[int, int] = (1024, 1024),
    metadata: dict[str, object] | None = None,
) -> None:
    """Write the four parts of SDXL as one `.safetensors` or `.ckpt` file, whole or not at all.

    `states`, `unet_config`: as for `to_sgm`, with all of PARTS (else KeyError). `dtype`: of all floating tensors in
    the file; None keeps each as it is. `resolution`: (width, height), for the header. `metadata`: added to the
    header's modelspec.* fields or put in their place (title, author, date, ...), as str. A `.ckpt` holds the same as
    "state_dict" and "metadata". Takes as much CPU memory as the file; the temporary file lies in the same folder.
    Raises UserError: another ending, a weight too large for `dtype`, or a file that cannot be written.
    """
    path = Path(path)
    if path.suffix not in (".safetensors", ".ckpt"):
        raise UserError(f"{path}: a single-file model ends in .safetensors or .ckpt.")
    if prediction_type not in ("epsilon", "v_prediction"):
        raise UserError(f"{path}: other programs know SDXL with epsilon or v_prediction, not {prediction_type!r}.")
    whole = to_sgm({part: states[part] for part in PARTS}, unet_config)
    tensors = {name: for_file(name, tensor, dtype) for name, tensor in whole.items()}
    # ComfyUI and forge know v-prediction by tensors of these names, not by the header; ComfyUI writes them empty too.
    if prediction_type == "v_prediction":
        tensors["v_pred"] = torch.tensor([])
    if zero_terminal_snr:
        tensors["ztsnr"] = torch.tensor([])
    header = {  # https://github.com/Stability-AI/ModelSpec
        "format": "pt",
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": "stable-diffusion-xl-v1-base",
        "modelspec.implementation": "https://github.com/Stability-AI/generative-models",
        "modelspec.title": path.stem,
        "modelspec.date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "modelspec.prediction_type": "v" if prediction_type == "v_prediction" else "epsilon",
        "modelspec.resolution": f"{resolution[0]}x{resolution[1]}",
    }
    write(path, tensors, header | {key: str(value) for key, value in (metadata or {}).items()})


def for_file(name: str, tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    """A tensor as a file holds it: on the CPU, contiguous, alone in its storage, in `dtype`. UserError: too large for that."""
    source = tensor.detach().to("cpu")
    if dtype is not None and source.is_floating_point():
        rounded = source.to(dtype)
        if not rounded.isfinite().all() and source.isfinite().all():
            raise UserError(f"{name} reaches {source.abs().max():.3g}, too large for {dtype}: save as bf16")
        source = rounded
    source = source.contiguous()  # channels_last weights are not; safetensors asks for it
    # A view would take its whole storage into a .ckpt (weights sharded by FSDP are views of one flat tensor).
    return source if source.untyped_storage().nbytes() == source.nbytes else source.clone()


def write(path: Path, tensors: dict[str, Tensor], header: dict[str, str]) -> None:
    """Write a .safetensors or .ckpt file, whole or not at all; the temporary one lies beside it. Raises `UserError`."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.touch()
        mode = temporary.stat().st_mode  # safetensors 0.8 writes 0600 whatever the umask (its issue 782)
        if path.suffix == ".ckpt":
            torch.save({"state_dict": tensors, "metadata": header}, temporary)
        else:
            safetensors.torch.save_file(tensors, temporary, metadata=header)
        temporary.chmod(mode)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError, safetensors.SafetensorError) as error:  # RuntimeError: torch.save on a full disk
        raise UserError(f"could not write {path}: {error}") from error
    finally:
        temporary.unlink(missing_ok=True)  # gone already where the renaming was reached


def load_part(path: str | Path, part: str, config: str = SDXL_BASE, dtype: torch.dtype = torch.float32) -> nn.Module:
    """Load one of PARTS from a single-file model; the rest of the file is not read.

    Returns a UNet2DConditionModel, AutoencoderKL, CLIPTextModel or CLIPTextModelWithProjection on the CPU, in eval
    mode, with its own memory (the file may be overwritten). `config`: a pipeline's folder or its name on the Hub, for
    the configuration alone. Raises UserError: no such file, a damaged one, one with Python objects in it, one without
    this part or with tensors of it missing, or not of this configuration. Tensors without a use are logged by name.
    """
    with reading(path) as (names, get):
        # Tensors are copied out of the memory map one by one, so the peak is one part in `dtype`.
        tensors = ((name, get(name)) for name in names if name.startswith(PARTS[part]))
        weights = {name: t.to(dtype if t.is_floating_point() else t.dtype, copy=True) for name, t in tensors}
    if not weights:
        held = ", ".join(contents_of(path)[0]) or "nothing of SDXL"
        raise UserError(f"{path} has no {part} (no tensor named {PARTS[part]}*). It holds: {held}.")
    try:
        model = _build(weights, part, str(config), dtype)
    except (OSError, AttributeError, KeyError, RuntimeError, ValueError) as error:
        raise UserError(f"the {part} in {path} cannot be built by the configuration in {config}: {error}") from error
    # diffusers leaves a missing tensor on the meta device and says nothing.
    known = to_sgm({part: {name: tensor.to("meta") for name, tensor in model.state_dict().items()}}, model.config)
    if missing := sorted(known.keys() - weights.keys()):
        raise UserError(f"{path} lacks {len(missing)} tensors of its {part}, first {missing[0]}.")
    if unknown := sorted(name for name in weights.keys() - known.keys() if not name.endswith(IDLE_TENSORS)):
        logging.getLogger(__name__).warning("%s: %d tensors not used: %s", path, len(unknown), ", ".join(unknown))
    return model


def _build(weights, part, config, dtype):
    # Imported here: with diffusers and transformers this module would take seconds to import, even for contents_of.
    import diffusers
    import transformers
    from diffusers.loaders.single_file_utils import create_diffusers_clip_model_from_ldm

    # diffusers 0.42 warns at every cast to a dtype, about no modules at all: that one sentence is kept out of its log.
    logging.getLogger("diffusers.models.modeling_utils").addFilter(lambda r: "float32: []" not in r.getMessage())
    options = {"config": config, "subfolder": part}
    if part in ("unet", "vae"):
        cls = diffusers.UNet2DConditionModel if part == "unet" else diffusers.AutoencoderKL
        return cls.from_single_file(weights, dtype=dtype, **options)
    cls = transformers.CLIPTextModel if part == "text_encoder" else transformers.CLIPTextModelWithProjection
    return create_diffusers_clip_model_from_ldm(cls, weights, torch_dtype=dtype, **options)


def contents_of(path: str | Path) -> tuple[list[str], str, bool]:
    """(PARTS, prediction type, zero terminal SNR) of a file by the names in it; without markers: "epsilon", False."""
    with reading(path) as (names, _):
        parts = [part for part, prefix in PARTS.items() if any(name.startswith(prefix) for name in names)]
        return parts, "v_prediction" if "v_pred" in names else "epsilon", "ztsnr" in names


@contextlib.contextmanager
def reading(path):
    """Yield (names, a function name -> tensor) of a memory-mapped file; what goes wrong becomes a UserError."""
    if not os.path.isfile(path):
        raise UserError(f"There is no file {path}.")
    try:
        if str(path).endswith(".safetensors"):
            with safetensors.safe_open(path, "pt") as file:
                yield list(file.keys()), file.get_tensor
            return
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
        state = {name: t for name, t in state.get("state_dict", state).items() if isinstance(t, Tensor)}
        yield list(state), state.__getitem__
    except UNREADABLE as error:
        reason = "is damaged, cut short, or holds Python objects, which are never run. Copy it again or convert it"
        raise UserError(f"{path} {reason} to .safetensors. ({error!s:.200})") from error

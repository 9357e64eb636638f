"""SDXL: its parts loaded, prompts and images encoded, the conditioning of the UNet."""

import json
from pathlib import Path

import torch

from library.errors import UserError
from library.models import parts
from library.models.locate import find_model
from library.models.parts import DTYPES, PIECE, Base, enable_gradient_checkpointing  # noqa: F401
from library.training.imports import lean

PARTS = ("unet", "vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "scheduler")
TEXT_ENCODERS = PARTS[2:4]    # CLIP ViT-L and OpenCLIP ViT-bigG
FIELDS = {"hidden": TEXT_ENCODERS, "pooled": ("text_encoder_2",)}    # what is kept of a prompt, and which encoders make it


def find_base(args) -> Base:
    """Locate the base model, its VAE and tokenizers; hub ids are fetched. Raises `UserError` for what is lacking."""
    path = find_model(args.pretrained_model_name_or_path, "--pretrained_model_name_or_path", PARTS, args.revision, args.variant)
    configs = path
    if path.is_file():
        configs = find_model(args.single_file_config, "--single_file_config", PARTS[4:], loose=("*/config.json",))
    vae, tokenizers = parts.find_vae(args), parts.find_tokenizers(args, configs, PARTS[4:6])
    parts.find_preview_model(args, channels=4)
    return parts.check_files(Base(path, configs, vae, tokenizers, args.variant), PARTS[:4])


def load_part(base: Base, part: str, dtype: torch.dtype | None, checkpoint: Path | None = None):
    """One network on the CPU, frozen, in evaluation mode; from `checkpoint` if that holds it.

    dtype None is float32. Raises `UserError`.
    """
    place = checkpoint / part if checkpoint and (checkpoint / part).is_dir() else base.place(part)
    if place.is_file():
        from library.models import single_file
        return single_file.load_part(place, part, base.configs, dtype or torch.float32).requires_grad_(False)
    return parts.load_network(class_of(part), part, place, dtype, base.variant_of(place))


def load_tokenizers(base: Base) -> list:
    from transformers import CLIPTokenizer
    return parts.load_tokenizers([CLIPTokenizer] * 2, base.tokenizers)


def load_schedule(base: Base, prediction_type: str | None, zero_terminal_snr: bool):
    """The DDPM schedule of the base model, with what the flags change -> diffusers' DDPMScheduler. Raises `UserError`."""
    with lean():
        from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
    if base.path.is_file() and not prediction_type:
        from library.models.single_file import contents_of
        prediction_type = contents_of(base.path)[1]
    changes = {"prediction_type": prediction_type} if prediction_type else {}
    if zero_terminal_snr:
        changes |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    try:
        schedule = DDPMScheduler.from_pretrained(base.configs, subfolder="scheduler", local_files_only=True, **changes)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read the noise schedule in {base.configs / 'scheduler'}: {error}") from error
    if zero_terminal_snr and schedule.config.prediction_type == "epsilon":
        raise UserError("--zero_terminal_snr needs --prediction_type v_prediction (the base model predicts epsilon): at pure "
                        "noise, epsilon says nothing of the image")
    return schedule


def vae_config(base: Base) -> dict:
    """The VAE's config.json, without loading the VAE where it is a folder."""
    place = base.place("vae")
    return dict(load_part(base, "vae", torch.float32).config) if place.is_file() else parts.config_of("VAE", place)


def empty_unet(base: Base):
    """The UNet without its weights (on the meta device), for what must fit it. Raises `UserError`."""
    folder = (base.configs if base.path.is_file() else base.path) / "unet"
    if base.path.is_file() and not folder.exists():
        from library.models.adapter_settings import SDXL_UNET as config
    else:
        config = parts.config_of("UNet", folder)
    with torch.device("meta"):
        return class_of("unet").from_config(config)


def text_options(args, base: Base) -> dict:
    """What of the flags, beside the encoders themselves, decides a prompt's embeddings: it is part of the cache's key."""
    return {"length": args.max_token_length}


def text_dropout(args) -> list[tuple[float, bool]]:
    """How often each text encoder hears nothing, and whether that is zeros: not a choice of SDXL."""
    return []


def trained_parts(args) -> tuple[str, ...]:
    """The text encoders that are asked anew in every step, as they are trained."""
    return TEXT_ENCODERS if args.train_text_encoder else ()


def cut_off(prompts: list[str], tokenizers: list, *, length: int) -> dict[str, set[str]]:
    """{flag that is the limit: the prompts that are longer}."""
    return {f"--max_token_length {length}": parts.longer(prompts, tokenizers[0], parts.clip_limit(length))}


def tokenize(prompts: list[list[str]], tokenizers: list, *, length: int) -> dict[str, torch.Tensor]:
    """Prompts for each of both -> {"input_ids": [B, n, 77], "input_ids_2": [B, n, 77]} int64, in n = length // 75 pieces."""
    return {name: parts.clip_tokens(texts, tokenizer, length)[0] for name, texts, tokenizer in
            zip(("input_ids", "input_ids_2"), prompts, tokenizers, strict=True)}


def encode_prompts(tokens: dict[str, torch.Tensor], text_encoders: list, *, length: int) -> dict[str, torch.Tensor]:
    """Token ids [B, n, 77] of both -> "hidden" [B, 75 n + 2, 768 + 1280] and "pooled" [B, 1280], of text encoder 2."""
    one, two = (parts.clip_states(encoder, tokens[name]) for name, encoder in
                zip(("input_ids", "input_ids_2"), text_encoders, strict=True))
    return {"hidden": torch.cat([one[0], two[0]], dim=-1), "pooled": two[1]}


def kept(fields: dict[str, torch.Tensor], *, length: int) -> dict[str, torch.Tensor]:
    """What is stored of encoded prompts: all of it."""
    return fields


def assemble(fields: dict[str, torch.Tensor], *, length: int) -> dict[str, torch.Tensor]:
    """The fields of a prompt, or of a batch of them, as training calls them."""
    return {"prompt_embeds": fields["hidden"], "pooled_prompt_embeds": fields["pooled"]}


def added_cond(pooled: torch.Tensor, time_ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """SDXL's conditioning beside the prompt. time_ids [B, 6] stay float32: bf16 would turn 1333 into 1336."""
    return {"text_embeds": pooled, "time_ids": time_ids}


def trainable_text_encoders(args, encoders) -> dict:
    """Unfreeze the text encoders, if they are to be trained and their rate is not 0 -> {"text_encoder": ..., ...}.

    The last layer and final norm of the first stay frozen: SDXL reads the layer before, so they have no gradient.
    """
    if not args.train_text_encoder:
        return {}
    rates = (args.learning_rate_te1, args.learning_rate_te2)
    trained = {}
    for name, encoder, rate in zip(TEXT_ENCODERS, encoders.text_encoders, rates, strict=True):
        if rate != 0:
            trained[name] = encoder.requires_grad_(True).train()
    if "text_encoder" in trained:
        inner = getattr(trained["text_encoder"], "text_model", trained["text_encoder"])
        inner.encoder.layers[-1].requires_grad_(False)
        inner.final_layer_norm.requires_grad_(False)
    return trained


def adapted_text_encoders(args, encoders) -> dict:
    """The text encoders that get an adapter: those that are to be trained, and whose rate is not 0."""
    rates = {"text_encoder": args.learning_rate_te1, "text_encoder_2": args.learning_rate_te2}
    if not args.train_text_encoder:
        return {}
    return {name: encoder for (name, rate), encoder in zip(rates.items(), encoders.text_encoders, strict=True) if rate != 0}


def check_same_unet(base: Base, checkpoint: Path) -> None:
    """Refuse a checkpoint of another architecture. Raises `UserError` naming the first difference."""
    if base.path.is_file():
        return
    ours, theirs = (json.loads((path / "unet" / "config.json").read_text()) for path in (base.path, checkpoint))
    for key in ("block_out_channels", "layers_per_block", "cross_attention_dim", "transformer_layers_per_block", "in_channels"):
        if ours.get(key) != theirs.get(key):
            raise UserError(f"--resume_from_checkpoint: {checkpoint} holds another UNet than {base.path}: {key} is "
                            f"{theirs.get(key)} instead of {ours.get(key)}")


def class_of(part: str):
    with lean():
        if part == "unet":
            from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel as Model
        elif part == "vae":
            from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL as Model
        elif part == "text_encoder":
            from transformers import CLIPTextModel as Model
        else:
            from transformers import CLIPTextModelWithProjection as Model
    return Model

"""SDXL: its parts loaded, prompts and images encoded, the conditioning of the UNet."""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError

from library.errors import UserError
from library.models.locate import fault_of_network, fault_of_tokenizer, find_model
from library.training.imports import lean

PARTS = ("unet", "vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "scheduler")
DTYPES = {"fp32": torch.float32, "float": torch.float32, "no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
PIECE = 75    # prompt tokens between BOS and EOS


@dataclass(frozen=True)
class Base:
    """Where the parts of the base model are, on this machine.

    path: a diffusers folder or one file. configs: the folder with tokenizers and scheduler. vae: another VAE, or None.
    """

    path: Path
    configs: Path
    vae: Path | None
    tokenizers: tuple[Path, Path]
    variant: str | None

    def files(self, *parts: str) -> list[Path]:
        """The files or folders that hold these parts: what their output depends on."""
        if parts == ("vae",) and self.vae:
            return [self.vae / "vae" if (self.vae / "vae").is_dir() else self.vae]
        tokenizers = [path for part, path in zip(PARTS[4:6], self.tokenizers, strict=True) if part in parts]
        if self.path.is_file():
            return [self.path, *tokenizers]
        return [self.path / part for part in parts if not part.startswith("tokenizer")] + tokenizers


def find_base(args) -> Base:
    """Locate the base model, its VAE and tokenizers; hub ids are fetched. Raises `UserError` for what is lacking."""
    path = find_model(args.pretrained_model_name_or_path, "--pretrained_model_name_or_path", PARTS, args.revision, args.variant)
    configs = path
    if path.is_file():
        configs = find_model(args.single_file_config, "--single_file_config", PARTS[4:], loose=("*/config.json",))
    vae = None
    if args.pretrained_vae_model_name_or_path:
        vae = find_model(args.pretrained_vae_model_name_or_path, "--pretrained_vae_model_name_or_path", (),
                         args.revision, args.variant, ("config.json", "diffusion_pytorch_model*", "vae/*"))
    tokenizers = []
    for part, flag, given in (("tokenizer", "--tokenizer1_path", args.tokenizer1_path),
                              ("tokenizer_2", "--tokenizer2_path", args.tokenizer2_path)):
        found = find_model(given, flag, (), loose=(f"{part}/*", "*.json", "merges.txt")) if given else configs
        tokenizers.append(found / part if (found / part).is_dir() else found)
    base = Base(path, configs, vae, tuple(tokenizers), args.variant)
    networks = [folder for part in PARTS[:4] if (folder := base.files(part)[0]).is_dir()]
    faults = [fault_of_network(folder, args.variant if folder.parent == path else None) for folder in networks]
    if faults := [fault for fault in faults + [fault_of_tokenizer(folder) for folder in tokenizers] if fault]:
        raise UserError(f"the base model cannot be loaded: {'; '.join(faults)}. Copy it again, or name another")
    return base


def load_part(base: Base, part: str, dtype: torch.dtype | None, checkpoint: Path | None = None):
    """One network on the CPU, frozen, in evaluation mode; from `checkpoint` if that holds it.

    dtype None is float32. Raises `UserError`.
    """
    path = base.vae if part == "vae" and base.vae else base.path
    if checkpoint and (checkpoint / part).is_dir():
        path = checkpoint
    if path.is_file():
        from library.models import single_file
        return single_file.load_part(path, part, base.configs, dtype or torch.float32).requires_grad_(False)
    folder = path / part if (path / part).is_dir() else path
    variant = base.variant if path == base.path else None
    options = {"ignore_mismatched_sizes": True} if part.startswith("text") else {}    # told below; its own words are vague
    try:
        model, info = _class_of(part).from_pretrained(folder, variant=variant, dtype=dtype or torch.float32,
                                                      local_files_only=True, output_loading_info=True, **options)
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        raise UserError(f"cannot load the {part} in {folder}: {error}") from error
    if wrong := sorted([*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])]):
        raise UserError(f"cannot load the {part} in {folder}: {len(wrong)} tensors that its config.json calls for are missing "
                        f"or of another shape, first {wrong[0]}: the files do not belong together, or are damaged")
    return model.eval().requires_grad_(False)


def load_text_encoders(base: Base, dtype: torch.dtype, checkpoint: Path | None = None) -> list:
    """CLIP ViT-L and OpenCLIP ViT-bigG."""
    return [load_part(base, part, dtype, checkpoint) for part in ("text_encoder", "text_encoder_2")]


def load_tokenizers(base: Base) -> list:
    from transformers import CLIPTokenizer
    try:
        return [CLIPTokenizer.from_pretrained(path, local_files_only=True) for path in base.tokenizers]
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"cannot load the tokenizers in {' and '.join(map(str, base.tokenizers))}: {error}") from error


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


def encode_images(vae, pixels: torch.Tensor) -> torch.Tensor:
    """Pixels [B, 3, H, W] in -1..1 -> mean and standard deviation of the posterior, [B, 2 C, H/8, W/8] float32."""
    posterior = vae.encode(pixels.to(vae.device, vae.dtype)).latent_dist
    return torch.cat([posterior.mean, posterior.std], dim=1).float()


def vae_config(base: Base) -> dict:
    """The VAE's config.json, without loading the VAE where it is a folder."""
    folder = base.files("vae")[0]
    if folder.is_file():
        return dict(load_part(base, "vae", torch.float32).config)
    try:
        return json.loads((folder / "config.json").read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read the VAE's config in {folder}: {error}") from error


def empty_unet(base: Base):
    """The UNet without its weights (on the meta device), for what must fit it. Raises `UserError`."""
    folder = (base.configs if base.path.is_file() else base.path) / "unet"
    if base.path.is_file() and not folder.exists():
        from library.models.adapter_settings import SDXL_UNET as config
    else:
        try:
            config = json.loads((folder / "config.json").read_text())
        except (OSError, ValueError) as error:
            raise UserError(f"cannot read the UNet's config in {folder}: {error}") from error
    with torch.device("meta"):
        return _class_of("unet").from_config(config)


def tokenize(prompts: list[str], tokenizers: list, length: int) -> dict[str, torch.Tensor]:
    """Prompts -> {"input_ids": [B, n, 77], "input_ids_2": [B, n, 77]} int64, in n = length // 75 pieces.

    Each piece is BOS, up to 75 tokens, EOS and padding, as kohya cuts long prompts; longer ones are cut off.
    """
    pieces = max(1, length // PIECE)
    batch = {}
    for name, tokenizer in zip(("input_ids", "input_ids_2"), tokenizers, strict=True):
        rows = []
        for ids in token_ids(prompts, tokenizer):
            parts = [ids[start:start + PIECE] for start in range(0, pieces * PIECE, PIECE)]
            rows.append([[tokenizer.bos_token_id, *part, tokenizer.eos_token_id]
                         + [tokenizer.pad_token_id] * (PIECE - len(part)) for part in parts])
        batch[name] = torch.tensor(rows)
    return batch


def token_ids(prompts: list[str], tokenizer) -> list[list[int]]:
    """Token ids of each prompt, whole and without BOS and EOS."""
    return tokenizer(list(prompts), add_special_tokens=False, truncation=False, verbose=False)["input_ids"]


def encode_prompts(batch: dict[str, torch.Tensor], text_encoders: list) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids [B, n, 77] of both -> hidden states [B, 75 n + 2, 768 + 1280] and the pooled embedding [B, 1280].

    The hidden states are those before the last layer; of n pieces the first BOS and the last EOS are kept.
    The pooled embedding is text encoder 2's projection of the first piece.
    """
    hidden = []
    for name, encoder in zip(("input_ids", "input_ids_2"), text_encoders, strict=True):
        ids = batch[name]
        output = encoder(ids.flatten(0, 1).to(encoder.device), output_hidden_states=True)
        states = output.hidden_states[-2].unflatten(0, ids.shape[:2])                          # [B, n, 77, d]
        hidden.append(torch.cat([states[:, 0, :1], states[:, :, 1:-1].flatten(1, 2), states[:, -1, -1:]], dim=1))
    return torch.cat(hidden, dim=-1), output.text_embeds.unflatten(0, ids.shape[:2])[:, 0]


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
    for name, encoder, rate in zip(("text_encoder", "text_encoder_2"), encoders.text_encoders, rates, strict=True):
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


def enable_gradient_checkpointing(networks: dict) -> None:
    for network in networks.values():    # diffusers and transformers name it differently
        if hasattr(network, "enable_gradient_checkpointing"):
            network.enable_gradient_checkpointing()
        else:
            network.gradient_checkpointing_enable()


def set_attention(unet, xformers: bool, npu: bool) -> None:
    if xformers:
        unet.enable_xformers_memory_efficient_attention()
    if npu:
        unet.enable_npu_flash_attention()


def _class_of(part: str):
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

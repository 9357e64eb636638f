"""What the models share: where the parts of a base model lie, how one of them is loaded, and CLIP's prompts in pieces."""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError

from library.errors import UserError
from library.models.locate import fault_of_network, fault_of_tokenizer, find_model, has_variant
from library.training import agreement
from library.training.imports import lean

DTYPES = {"fp32": torch.float32, "float": torch.float32, "no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
TOKENIZERS = ("tokenizer", "tokenizer_2", "tokenizer_3")
PIECE = 75    # prompt tokens between BOS and EOS


@dataclass(frozen=True)
class Base:
    """Where the parts of the base model are, on this machine.

    path: a diffusers folder or one file. configs: the folder with scheduler and configs. vae: another VAE, or None.
    tokenizers: one for each text encoder that is used. apart: networks that are not in `path` but in `configs`.
    """

    path: Path
    configs: Path
    vae: Path | None
    tokenizers: tuple[Path, ...]
    variant: str | None
    apart: tuple[str, ...] = ()

    def place(self, part: str) -> Path:
        """The folder or file that holds a network."""
        if part == "vae" and self.vae:
            return self.vae / "vae" if (self.vae / "vae").is_dir() else self.vae
        root = self.configs if part in self.apart else self.path
        return root if root.is_file() else root / part

    def files(self, *parts: str) -> list[Path]:
        """The files or folders that hold these parts: what their output depends on."""
        networks = dict.fromkeys(self.place(part) for part in parts if not part.startswith("tokenizer"))
        return [*networks, *(path for part, path in zip(TOKENIZERS, self.tokenizers, strict=False) if part in parts)]

    def variant_of(self, folder: Path) -> str | None:
        """The variant of the weight files in `folder`: the base model's own have it, but for networks that come in none."""
        return self.variant if self.variant and folder.parent == self.path and has_variant(folder, self.variant) else None


def find_vae(args) -> Path | None:
    """Another VAE than the base model's, if one is named. Raises `UserError`."""
    if not args.pretrained_vae_model_name_or_path:
        return None
    return find_model(args.pretrained_vae_model_name_or_path, "--pretrained_vae_model_name_or_path", (), args.revision,
                      args.variant, ("config.json", "diffusion_pytorch_model*", "vae/*"))


def find_preview_model(args, channels: int) -> Path | None:
    """The tiny autoencoder of --validation_preview, if there are images to preview: it is loaded once, to see that it can be.

    channels: of the base model's latents. Raises `UserError`.
    """
    if not (args.validation_preview and args.validation_prompt):
        return None
    with lean():
        from diffusers.models.autoencoders.autoencoder_tiny import AutoencoderTiny
    flag, name = "--validation_preview_model", args.validation_preview_model
    folder = find_model(name, flag, (), loose=("config.json", "diffusion_pytorch_model*"))
    fault = f"{name} is one file, not a folder" if folder.is_file() else fault_of_network(folder)
    if not fault and (own := config_of("tiny autoencoder", folder)).get("_class_name") != "AutoencoderTiny":
        fault = f"{name} is of diffusers' class {own.get('_class_name')}, not AutoencoderTiny"
    if not fault and own.get("latent_channels", 4) != channels:
        fault = f"{name} decodes latents of {own.get('latent_channels', 4)} channels, and this model's have {channels}"
    if fault:
        raise UserError(f"{flag}: {fault}; name another (for SDXL madebyollin/taesdxl, for SD3 madebyollin/taesd3)")
    load_network(AutoencoderTiny, "tiny autoencoder", folder, None, None)
    return folder


def find_tokenizers(args, configs: Path, parts: tuple[str, ...]) -> tuple[Path, ...]:
    """The folders of these tokenizers: those of the flags, else those in `configs`. Raises `UserError`."""
    named = {"tokenizer": ("--tokenizer1_path", args.tokenizer1_path), "tokenizer_2": ("--tokenizer2_path", args.tokenizer2_path)}
    found = []
    for part in parts:
        flag, given = named.get(part, ("", None))
        folder = find_model(given, flag, (), loose=(f"{part}/*", "*.json", "merges.txt")) if given else configs
        found.append(folder / part if (folder / part).is_dir() else folder)
    return tuple(found)


def check_files(base: Base, parts: tuple[str, ...]) -> Base:
    """Refuse networks and tokenizers that cannot be loaded, as far as headers tell. Raises `UserError` naming all of them."""
    folders = [folder for part in parts if (folder := base.place(part)).is_dir()]
    own = [folder for folder in folders if base.variant and folder.parent == base.path]
    if usual := [folder.name for folder in own if not base.variant_of(folder)]:
        if len(usual) == len(own):
            raise UserError(f"--variant {base.variant}: no network in {base.path} has weights of that name; leave the flag out")
        from library.training.accelerator import say
        say(f"--variant {base.variant}: no such weights in {', '.join(usual)}: the usual ones are read")
    faults = [fault_of_network(folder, base.variant_of(folder)) for folder in folders]
    if faults := [fault for fault in faults + [fault_of_tokenizer(folder) for folder in base.tokenizers] if fault]:
        raise UserError(f"the base model cannot be loaded: {'; '.join(faults)}. Copy it again, or name another")
    agreement.check_model(_files_of(base, parts))
    return base


def _files_of(base: Base, parts: tuple[str, ...]) -> dict[str, Path]:
    """What is read of a base model, by names that are the same on every machine."""
    found = {}
    for part in parts:
        folder = base.place(part)
        weights = [path for kind in ("safetensors", "bin") for path in sorted(folder.glob(f"*.{kind}"))]
        variant = base.variant_of(folder)
        weights = [path for path in weights if (variant in path.name.split(".") if variant else path.name.count(".") == 1)]
        if folder.is_file():
            found["the file of the base model"] = folder
        found |= {f"{part}/{path.name}": path for path in [folder / "config.json", *weights[:64]] if path.is_file()}
    return found | {f"tokenizer {number + 1}/{path.name}": path for number, folder in enumerate(base.tokenizers)
                    for path in sorted(folder.glob("*")) if path.suffix in (".json", ".txt", ".model") and path.is_file()}


def load_network(kind: type, part: str, folder: Path, dtype: torch.dtype | None, variant: str | None):
    """One network on the CPU, frozen, in evaluation mode; dtype None is float32. Raises `UserError`."""
    options = {"ignore_mismatched_sizes": True} if part.startswith("text") else {}    # told below; its own words are vague
    try:
        model, info = kind.from_pretrained(folder, variant=variant, dtype=dtype or torch.float32, local_files_only=True,
                                           output_loading_info=True, **options)
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        raise UserError(f"cannot load the {part} in {folder}: {error}") from error
    if wrong := sorted([*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])]):
        raise UserError(f"cannot load the {part} in {folder}: {len(wrong)} tensors that its config.json calls for are missing "
                        f"or of another shape, first {wrong[0]}: the files do not belong together, or are damaged")
    return model.eval().requires_grad_(False)


def load_tokenizers(kinds: list[type], folders: tuple[Path, ...]) -> list:
    try:
        return [kind.from_pretrained(path, local_files_only=True) for kind, path in zip(kinds, folders, strict=True)]
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"cannot load the tokenizers in {' and '.join(map(str, folders))}: {error}") from error


def config_of(part: str, folder: Path) -> dict:
    """A network's config.json. Raises `UserError`."""
    try:
        return json.loads((folder / "config.json").read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read the {part}'s config in {folder}: {error}") from error


def token_ids(prompts: list[str], tokenizer) -> list[list[int]]:
    """Token ids of each prompt, whole and without BOS and EOS."""
    return tokenizer(list(prompts), add_special_tokens=False, truncation=False, verbose=False)["input_ids"]


def longer(prompts: list[str], tokenizer, limit: int) -> set[str]:
    """The prompts of more than `limit` tokens."""
    return {prompt for prompt, ids in zip(prompts, token_ids(prompts, tokenizer), strict=True) if len(ids) > limit}


def clip_limit(length: int) -> int:
    """Tokens that CLIP reads of a prompt with --max_token_length."""
    return max(1, length // PIECE) * PIECE


def clip_tokens(prompts: list[str], tokenizer, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Prompts -> token ids [B, n, 77] in n = length // 75 pieces, and a mask of the same shape, 0 at padding; int64.

    Each piece is BOS, up to 75 tokens, EOS and padding, as kohya cuts long prompts; longer ones are cut off.
    """
    rows, mask = [], []
    for ids in token_ids(prompts, tokenizer):
        parts = [ids[start:start + PIECE] for start in range(0, clip_limit(length), PIECE)]
        rows.append([[tokenizer.bos_token_id, *part, tokenizer.eos_token_id]
                     + [tokenizer.pad_token_id] * (PIECE - len(part)) for part in parts])
        mask.append([[1] * (len(part) + 2) + [0] * (PIECE - len(part)) for part in parts])
    return torch.tensor(rows), torch.tensor(mask)


def clip_states(encoder, ids: torch.Tensor, mask: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Token ids [B, n, 77] -> hidden states [B, 75 n + 2, d] and the pooled embedding [B, p], None of an encoder without one.

    The hidden states are those before the last layer; of n pieces the first BOS and the last EOS are kept. The pooled
    embedding is the projection of the first piece. mask: what of each piece is attended to; None: all of it.
    """
    options = {} if mask is None else {"attention_mask": mask.flatten(0, 1).to(encoder.device)}
    output = encoder(ids.flatten(0, 1).to(encoder.device), output_hidden_states=True, **options)
    states = output.hidden_states[-2].unflatten(0, ids.shape[:2])                          # [B, n, 77, d]
    hidden = torch.cat([states[:, 0, :1], states[:, :, 1:-1].flatten(1, 2), states[:, -1, -1:]], dim=1)
    pooled = output.text_embeds.unflatten(0, ids.shape[:2])[:, 0] if hasattr(output, "text_embeds") else None
    return hidden, pooled


def enable_gradient_checkpointing(networks: dict) -> None:
    for network in networks.values():    # diffusers and transformers name it differently
        if hasattr(network, "enable_gradient_checkpointing"):
            network.enable_gradient_checkpointing()
        else:
            network.gradient_checkpointing_enable()

"""SD 3 and 3.5 (Medium, Large): its parts loaded, prompts encoded by two CLIPs and T5, as StableDiffusion3Pipeline has them."""

import json
from pathlib import Path

import torch
import torch.nn.functional as F

from library.errors import UserError
from library.models import parts, quantize
from library.models.locate import check_kind, find_model
from library.models.parts import DTYPES, PIECE, TOKENIZERS, Base, config_of, enable_gradient_checkpointing  # noqa: F401
from library.training.imports import lean

PARTS = ("transformer", "vae", "text_encoder", "text_encoder_2", "text_encoder_3", *TOKENIZERS, "scheduler")
TEXT_ENCODERS = PARTS[2:5]    # CLIP ViT-L, OpenCLIP ViT-bigG and T5-XXL
# what is kept of a prompt, and which text encoder makes it
FIELDS = {"clip_l": PARTS[2:3], "pooled_l": PARTS[2:3], "clip_g": PARTS[3:4], "pooled_g": PARTS[3:4], "t5": PARTS[4:5]}
_IDS, _MASKS = ("input_ids", "input_ids_2", "input_ids_3"), ("mask", "mask_2", "mask_3")
_SHAPE = """num_layers num_attention_heads attention_head_dim joint_attention_dim pooled_projection_dim in_channels
    dual_attention_layers qk_norm pos_embed_max_size""".split()


def find_base(args) -> Base:
    """Locate the base model, its VAE and tokenizers; hub ids are fetched, with --no_t5 without T5.

    Of one file, what it does not hold comes from --single_file_config. Raises `UserError` for what is lacking.
    """
    name, wanted = args.pretrained_model_name_or_path, [part for part in PARTS if not (args.no_t5 and part.endswith("_3"))]
    if (Path(name) / "transformer").is_dir() and not args.no_t5 and not (Path(name) / "text_encoder_3").is_dir():
        check_kind(Path(name), name, "--pretrained_model_name_or_path", PARTS)
        raise UserError(f"--pretrained_model_name_or_path: {name} has no text_encoder_3, which is T5; do without it by --no_t5")
    path = find_model(name, "--pretrained_model_name_or_path", tuple(wanted), args.revision, args.variant)
    configs, apart = path, ()
    if path.is_file():
        from library.models import sd3_file
        held = sd3_file.parts_in(path)
        apart = tuple(part for part in wanted if part in PARTS[1:5] and part not in held)
        configs = find_model(args.single_file_config, "--single_file_config", tuple(part for part in wanted if part not in held),
                             loose=tuple(f"{part}/config.json" for part in held))
    vae, tokenizers = parts.find_vae(args), parts.find_tokenizers(args, configs, tuple(p for p in TOKENIZERS if p in wanted))
    parts.find_preview_model(args, channels=16)
    base = Base(path, configs, vae, tokenizers, args.variant, apart)
    parts.check_files(base, tuple(part for part in PARTS[:5] if part in wanted))
    _check_widths(base, args.no_t5)
    return base


def find_whole(name: str, flag: str, config: str | None, no_t5: bool = False, more: tuple[str, ...] = (),
               held_alone: bool = False) -> tuple[Base, tuple[str, ...]]:
    """A model to draw with or to change -> where its parts are, and the networks that there are. Raises `UserError`.

    T5 is left out by no_t5, and where model_index.json has none. Of one file, the rest comes from `config`, a folder or hub id
    (None: Stability's), or, with held_alone, only configs do. more: parts beside the usual ones.
    """
    path = find_model(name, flag, ())    # of a hub id, model_index.json alone
    index = json.loads((path / "model_index.json").read_text()) if (path / "model_index.json").is_file() else {}
    no_t5 = no_t5 or not (index.get("text_encoder_3") or [True])[0]
    wanted = tuple(part for part in PARTS if not (no_t5 and part.endswith("_3")))
    path = find_model(name, flag, wanted + more)
    configs, held, apart = path, wanted, ()
    if path.is_file():
        from library.models import sd3_file
        held = sd3_file.parts_in(path)
        apart = tuple(part for part in wanted if part not in held and not held_alone)
        configs = find_model(config or sd3_file.usual_configs(path), "--config", apart,
                             loose=tuple(f"{part}/config.json" for part in held))
    tokenizers = tuple(configs / part for part in TOKENIZERS if part in wanted)
    networks = tuple(part for part in PARTS[:5] if part in wanted and part in (*held, *apart))
    return Base(path, configs, None, tokenizers, None, apart), networks


def _check_widths(base: Base, no_t5: bool) -> None:
    """Refuse text encoders that the transformer was not made for. Raises `UserError`."""
    ours, own = transformer_config(base), [config_of(part, base.configs / part) for part in TEXT_ENCODERS[:len(base.tokenizers)]]
    pooled = sum(config.get("projection_dim", 512) for config in own[:2])    # transformers writes no default
    if pooled != ours["pooled_projection_dim"]:
        raise UserError(f"the text encoders in {base.configs} are not those of the transformer: their pooled embeddings have "
                        f"{pooled} numbers, and it takes {ours['pooled_projection_dim']}")
    if not no_t5 and (width := own[2].get("d_model", 512)) != ours["joint_attention_dim"]:
        raise UserError(f"the T5 in {base.configs} is not that of the transformer: it makes {width} numbers of a token, and "
                        f"{ours['joint_attention_dim']} are taken")


def transformer_config(base: Base) -> dict:
    """The transformer's config.json. Raises `UserError`."""
    return config_of("transformer", (base.configs if base.path.is_file() else base.path) / "transformer")


def load_part(base: Base, part: str, dtype: torch.dtype | None, checkpoint: Path | None = None):
    """One network on the CPU, frozen, in evaluation mode; from `checkpoint` if that holds it.

    dtype None is float32; in fp16, T5 keeps the layers in float32 that overflow in it. Raises `UserError`.
    """
    place = checkpoint / part if checkpoint and (checkpoint / part).is_dir() else base.place(part)
    if place.is_file():
        from library.models import sd3_file
        return sd3_file.load_part(place, part, class_of(part), base.configs, dtype or torch.float32)
    return parts.load_network(class_of(part), part, place, dtype, base.variant_of(place))


def load_tokenizers(base: Base) -> list:
    """CLIP's two and, unless it is left out, T5's."""
    from transformers import CLIPTokenizer, T5TokenizerFast
    return parts.load_tokenizers([CLIPTokenizer, CLIPTokenizer, T5TokenizerFast][:len(base.tokenizers)], base.tokenizers)


def load_schedule(base: Base):
    """The base model's flow-matching schedule -> diffusers' FlowMatchEulerDiscreteScheduler. Raises `UserError`."""
    with lean():
        from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
    try:
        return FlowMatchEulerDiscreteScheduler.from_pretrained(base.configs, subfolder="scheduler", local_files_only=True)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read the noise schedule in {base.configs / 'scheduler'}: {error}") from error


def vae_config(base: Base) -> dict:
    """The VAE's config.json; of one file, that of --single_file_config."""
    place = base.place("vae")
    return config_of("VAE", base.configs / "vae" if place.is_file() else place)


def empty_transformer(base: Base):
    """The transformer without its weights (on the meta device), for what must fit it. Raises `UserError`."""
    config = transformer_config(base)
    with torch.device("meta"):
        return class_of("transformer").from_config(config)


def text_options(args, base: Base) -> dict:
    """What of the flags, beside the encoders themselves, decides a prompt's embeddings: it is part of the cache's key."""
    width = transformer_config(base)["joint_attention_dim"] if args.no_t5 else None
    return {"length": args.max_token_length, "t5_length": args.tokenizer_max_length, "t5_padding": args.t5_padding,
            "clip_mask": args.apply_lg_attn_mask, "t5_mask": args.apply_t5_attn_mask, "no_t5_width": width}


def text_dropout(args) -> list[tuple[float, bool]]:
    """How often each text encoder hears nothing, and whether what it says then is zeros; else it is of the empty prompt."""
    clip, t5 = args.sd3_clip_uncond_behaviour == "zero", args.sd3_t5_uncond_behaviour == "zero"
    return [(args.clip_l_dropout_rate, clip), (args.clip_g_dropout_rate, clip), (args.t5_dropout_rate, t5)]


def text_precisions(args, device: str) -> list[str]:
    """Precisions of the text encoders. Raises `UserError` for what cannot run on this kind of device."""
    flags = [f"text_encoder_{number}_precision" for number in (1, 2, 3)]
    given = [getattr(args, flag, "no_change") for flag in flags]    # the CLIPs' are for adapters alone
    for flag, precision in zip(flags, given, strict=True):
        quantize.check(precision, device, f"--{flag}")
    return given


def trained_parts(args) -> tuple[str, ...]:
    """The text encoders that are trained and asked anew in every step: CLIPs whose rate is not 0, and T5 if it has one."""
    rates = (args.learning_rate_te1, args.learning_rate_te2, getattr(args, "learning_rate_te3", None) or 0)
    return tuple(part for part, rate in zip(TEXT_ENCODERS, rates, strict=True) if rate != 0) if args.train_text_encoder else ()


def cut_off(prompts: list[str], tokenizers: list, *, length: int, t5_length: int, **_) -> dict[str, set[str]]:
    """{flag that is the limit: the prompts that are longer}. The last of T5's tokens is EOS."""
    cut = {f"--max_token_length {length} (CLIP)": parts.longer(prompts, tokenizers[0], parts.clip_limit(length))}
    if len(tokenizers) > 2:
        cut[f"--tokenizer_max_length {t5_length} (T5)"] = parts.longer(prompts, tokenizers[2], t5_length - 1)
    return cut


def tokenize(prompts: list[list[str]], tokenizers: list, *, length: int, t5_length: int, t5_padding: str, clip_mask: bool,
             t5_mask: bool, **_) -> dict[str, torch.Tensor]:
    """Prompts for each text encoder -> "input_ids", "input_ids_2" [B, n, 77] for the CLIPs, "input_ids_3" [B, t5_length] for T5.

    n = length // 75 pieces. With "mask", "mask_2", "mask_3" of the same shapes, 0 at padding, where they are used; int64. A
    tokenizer that is None is left out.
    """
    tokens, used = {}, (clip_mask, clip_mask, t5_mask or t5_padding == "zero")
    for number, (texts, tokenizer) in enumerate(zip(prompts, tokenizers, strict=True)):
        if tokenizer is not None:
            ids, mask = _t5_tokens(texts, tokenizer, t5_length) if number == 2 else parts.clip_tokens(texts, tokenizer, length)
            tokens |= {_IDS[number]: ids} | ({_MASKS[number]: mask} if used[number] else {})
    return tokens


def _t5_tokens(prompts: list[str], tokenizer, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    rows = [[*ids[:length - 1], tokenizer.eos_token_id] for ids in parts.token_ids(prompts, tokenizer)]
    padded = [row + [tokenizer.pad_token_id] * (length - len(row)) for row in rows]
    return torch.tensor(padded), torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in rows])


def encode_prompts(tokens: dict[str, torch.Tensor], text_encoders: list, *, t5_padding: str, clip_mask: bool, t5_mask: bool,
                   **_) -> dict[str, torch.Tensor]:
    """Token ids -> "clip_l" [B, 75 n + 2, 768], "pooled_l" [B, 768], "clip_g" [.., 1280], "pooled_g", "t5" [B, t5_length, 4096].

    A text encoder that is None is left out. Masks hide padding from the attention within an encoder, as kohya's do; what
    padding becomes is zeros only of T5, and only with t5_padding "zero".
    """
    fields = {}
    for name, encoder, ids, mask in zip("lg", text_encoders, _IDS, _MASKS, strict=False):
        if encoder is not None:
            hidden, pooled = parts.clip_states(encoder, tokens[ids], tokens[mask] if clip_mask else None)
            fields |= {f"clip_{name}": hidden, f"pooled_{name}": pooled}
    if len(text_encoders) > 2 and (t5 := text_encoders[2]) is not None:
        mask = tokens["mask_3"].to(t5.device) if "mask_3" in tokens else None
        rows = t5(tokens["input_ids_3"].to(t5.device), attention_mask=mask if t5_mask else None)[0]
        fields["t5"] = rows.masked_fill(mask[..., None] == 0, 0) if t5_padding == "zero" else rows
    return fields


def kept(fields: dict[str, torch.Tensor], *, t5_padding: str, **_) -> dict[str, torch.Tensor | list]:
    """What is stored of encoded prompts: T5's rows without the zeros behind them, a list of B."""
    if "t5" not in fields or t5_padding != "zero":
        return fields
    ends = [int(rows.any(-1).nonzero().max()) + 1 for rows in fields["t5"]]
    return fields | {"t5": [rows[:end] for rows, end in zip(fields["t5"], ends, strict=True)]}


def assemble(fields: dict[str, torch.Tensor], *, t5_length: int, no_t5_width: int | None, **_) -> dict[str, torch.Tensor]:
    """The fields of a prompt, or of a batch of them, as training calls them; T5's alone are filled up with zeros again.

    "prompt_embeds" [.., 75 n + 2 + t5_length, 4096]: the CLIPs' side by side with zeros to the right, then T5's, zeros without
    one. "pooled_prompt_embeds" [.., 768 + 1280].
    """
    if "t5" in fields and (lacking := t5_length - fields["t5"].shape[-2]):
        fields = fields | {"t5": F.pad(fields["t5"], (0, 0, 0, lacking))}
    if "clip_l" not in fields or "clip_g" not in fields or not ("t5" in fields or no_t5_width):
        return fields    # the rest comes with the step
    clip = torch.cat([fields["clip_l"], fields["clip_g"]], dim=-1)
    t5 = fields["t5"] if "t5" in fields else clip.new_zeros(*clip.shape[:-2], t5_length, no_t5_width)
    clip = F.pad(clip, (0, t5.shape[-1] - clip.shape[-1]))
    return {"prompt_embeds": torch.cat([clip, t5], dim=-2),
            "pooled_prompt_embeds": torch.cat([fields["pooled_l"], fields["pooled_g"]], dim=-1)}


def trainable_text_encoders(args, encoders) -> dict:
    """Unfreeze the text encoders that are to be trained as a whole -> {"text_encoder": ..., ...}."""
    return {part: encoders.text_encoder(part).requires_grad_(True).train() for part in encoders.trained}


def adapted_text_encoders(args, encoders) -> dict:
    """The text encoders that get an adapter. T5's own dropout is off: what it says of a prompt stays the same in training."""
    networks = {part: encoders.text_encoder(part) for part in encoders.trained}
    for module in (module for network in networks.values() for module in network.modules()):
        for name in ("p", "dropout"):    # of torch's layer, and of T5's attention
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
    return networks


def check_same_transformer(base: Base, checkpoint: Path) -> None:
    """Refuse a checkpoint of another architecture. Raises `UserError` naming the first difference."""
    ours, theirs = transformer_config(base), config_of("transformer", checkpoint / "transformer")
    for key in _SHAPE:
        if ours.get(key) != theirs.get(key):
            raise UserError(f"--resume_from_checkpoint: {checkpoint} holds another transformer than {base.path}: {key} is "
                            f"{theirs.get(key)} instead of {ours.get(key)}")


def class_of(part: str) -> type:
    """diffusers' or transformers' class of a network."""
    with lean():
        if part == "transformer":
            from diffusers.models.transformers.transformer_sd3 import SD3Transformer2DModel as Model
        elif part == "vae":
            from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL as Model
        elif part == "text_encoder_3":
            from transformers import T5EncoderModel as Model
        else:
            from transformers import CLIPTextModelWithProjection as Model
    return Model

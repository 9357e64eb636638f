"""A tiny SDXL and SD 3 of the true topologies, and small pictures: made here, nothing is downloaded."""

import json
from pathlib import Path

import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from PIL import Image
from safetensors.torch import save_file
from tokenizers.pre_tokenizers import ByteLevel
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)

from library.models import sd3_file, single_file

WORDS = "red green blue cat dog house a photo of".split()
SD3 = {    # as Stability's, but for the numbers of layers and heads, and the size of the grid of positions
    "medium": dict(num_layers=3, pos_embed_max_size=24),
    "3.5-medium": dict(num_layers=3, pos_embed_max_size=48, dual_attention_layers=(0, 1), qk_norm="rms_norm"),
    "3.5-large": dict(num_layers=4, pos_embed_max_size=24, qk_norm="rms_norm")}


def make_tokenizer(folder: Path, pad: str) -> None:
    """CLIP's byte-level tokenizer with a vocabulary of letters and a few words."""
    letters = sorted(ByteLevel.alphabet())
    merges = []
    for word in WORDS:
        parts = [*word[:-1], word[-1] + "</w>"]
        merges += [("".join(parts[:end]), parts[end]) for end in range(1, len(parts))]
    merges = list(dict.fromkeys(merges))
    tokens = letters + [letter + "</w>" for letter in letters] + ["".join(pair) for pair in merges]
    tokens = list(dict.fromkeys(tokens)) + ["<|startoftext|>", "<|endoftext|>"]
    vocab = {token: number for number, token in enumerate(tokens)}
    tokenizer = CLIPTokenizer(vocab=vocab, merges=merges, pad_token=pad, model_max_length=77)
    tokenizer.save_pretrained(folder)
    (folder / "vocab.json").write_text(json.dumps(vocab))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges))


def make_text_encoder(model_class, hidden: int, tokenizer):
    config = CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=hidden, intermediate_size=2 * hidden, num_hidden_layers=3,
        num_attention_heads=2, projection_dim=hidden, max_position_embeddings=77, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, hidden_act="gelu")
    return model_class(config).eval()


def make_model(folder: Path, seed: int = 0, widths=(32, 64, 64), prediction_type: str = "epsilon") -> Path:
    """A diffusers pipeline folder: 0.5 M parameters in the UNet, 8 x 8 pixels a latent."""
    torch.manual_seed(seed)
    for name, pad in (("tokenizer", "<|endoftext|>"), ("tokenizer_2", "!")):
        make_tokenizer(folder / name, pad)
    tokenizers = [CLIPTokenizer.from_pretrained(folder / name) for name in ("tokenizer", "tokenizer_2")]
    unet = UNet2DConditionModel(
        sample_size=8, block_out_channels=widths, layers_per_block=1, norm_num_groups=16,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=[1, 1, 2], attention_head_dim=[1, 2, 2], cross_attention_dim=48,
        use_linear_projection=True, addition_embed_type="text_time", addition_time_embed_dim=16,
        projection_class_embeddings_input_dim=32 + 6 * 16)
    vae = AutoencoderKL(
        block_out_channels=(8, 8, 16, 16), down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4, layers_per_block=1, norm_num_groups=4, latent_channels=4,
        sample_size=64, scaling_factor=0.5)
    scheduler = EulerDiscreteScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", timestep_spacing="leading", steps_offset=1,
        prediction_type=prediction_type)
    StableDiffusionXLPipeline(
        vae=vae.eval(), text_encoder=make_text_encoder(CLIPTextModel, 16, tokenizers[0]),
        text_encoder_2=make_text_encoder(CLIPTextModelWithProjection, 32, tokenizers[1]),
        tokenizer=tokenizers[0], tokenizer_2=tokenizers[1], unet=unet.eval(), scheduler=scheduler,
        add_watermarker=False).save_pretrained(folder)
    return folder


def make_t5(folder: Path) -> tuple[T5TokenizerFast, T5EncoderModel]:
    """T5 v1.1's tokenizer with a vocabulary of letters and a few words, and an encoder of two layers."""
    pieces = [f"\u2581{word}" for word in WORDS] + ["\u2581", *"abcdefghijklmnopqrstuvwxyz0123456789,.!"]
    vocab = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *((piece, -float(len(piece) == 1) - 1) for piece in pieces)]
    T5TokenizerFast(vocab=vocab, extra_ids=0, model_max_length=512).save_pretrained(folder)
    config = T5Config(vocab_size=len(vocab), d_model=64, d_kv=16, d_ff=64, num_layers=2, num_heads=2,
                      feed_forward_proj="gated-gelu", is_encoder_decoder=False, use_cache=False)
    return T5TokenizerFast.from_pretrained(folder), T5EncoderModel(config).eval()


def make_sd3(folder: Path, flavour: str = "medium", seed: int = 0) -> Path:
    """A diffusers pipeline folder of SD 3 or 3.5, a flavour of SD3: 8 x 8 pixels a latent of 16 channels."""
    torch.manual_seed(seed)
    for name, pad in (("tokenizer", "<|endoftext|>"), ("tokenizer_2", "!")):
        make_tokenizer(folder / name, pad)
    tokenizers = [CLIPTokenizer.from_pretrained(folder / name) for name in ("tokenizer", "tokenizer_2")]
    t5_tokenizer, t5 = make_t5(folder / "tokenizer_3")
    transformer = SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=16, attention_head_dim=16, num_attention_heads=2, joint_attention_dim=64,
        caption_projection_dim=32, pooled_projection_dim=48, out_channels=16, **SD3[flavour])
    vae = AutoencoderKL(
        block_out_channels=(8, 8, 16, 16), down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4, layers_per_block=1, norm_num_groups=4, latent_channels=16,
        sample_size=64, scaling_factor=1.5305, shift_factor=0.0609, use_quant_conv=False, use_post_quant_conv=False)
    StableDiffusion3Pipeline(
        transformer=transformer.eval(), vae=vae.eval(), scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        text_encoder=make_text_encoder(CLIPTextModelWithProjection, 16, tokenizers[0]), tokenizer=tokenizers[0],
        text_encoder_2=make_text_encoder(CLIPTextModelWithProjection, 32, tokenizers[1]), tokenizer_2=tokenizers[1],
        text_encoder_3=t5, tokenizer_3=t5_tokenizer).save_pretrained(folder)
    return folder


def original_layout(transformer) -> dict[str, torch.Tensor]:
    """A transformer's weights by the names of Stability's files."""
    config, state, out = transformer.config, transformer.state_dict(), {}

    def put(name, *sources):
        for kind in ("weight", "bias"):
            if f"{sources[0]}.{kind}" in state:
                out[f"{name}.{kind}"] = torch.cat([state[f"{source}.{kind}"] for source in sources])

    def swap(name, source):    # scale and shift change places
        for kind in ("weight", "bias"):
            shift, scale = state[f"{source}.{kind}"].chunk(2)
            out[f"{name}.{kind}"] = torch.cat([scale, shift])

    out["pos_embed"] = state["pos_embed.pos_embed"]
    for name, source in {"x_embedder.proj": "pos_embed.proj", "t_embedder.mlp.0": "time_text_embed.timestep_embedder.linear_1",
                         "t_embedder.mlp.2": "time_text_embed.timestep_embedder.linear_2", "context_embedder": "context_embedder",
                         "y_embedder.mlp.0": "time_text_embed.text_embedder.linear_1",
                         "y_embedder.mlp.2": "time_text_embed.text_embedder.linear_2", "final_layer.linear": "proj_out"}.items():
        put(name, source)
    swap("final_layer.adaLN_modulation.1", "norm_out.linear")
    for number in range(config.num_layers):
        ours, theirs, last = f"transformer_blocks.{number}", f"joint_blocks.{number}", number == config.num_layers - 1
        for stream, kinds, prefix in (("x", "q k v", "to_"), ("context", "q k v", "add_")):
            names = [f"{ours}.attn.{prefix}{kind}" + ("_proj" if prefix == "add_" else "") for kind in kinds.split()]
            put(f"{theirs}.{stream}_block.attn.qkv", *names)
        for kind, norm in (("q", "ln_q"), ("k", "ln_k")):
            put(f"{theirs}.x_block.attn.{norm}", f"{ours}.attn.norm_{kind}")
            put(f"{theirs}.context_block.attn.{norm}", f"{ours}.attn.norm_added_{kind}")
            put(f"{theirs}.x_block.attn2.{norm}", f"{ours}.attn2.norm_{kind}")
        put(f"{theirs}.x_block.attn.proj", f"{ours}.attn.to_out.0")
        put(f"{theirs}.x_block.adaLN_modulation.1", f"{ours}.norm1.linear")
        put(f"{theirs}.x_block.mlp.fc1", f"{ours}.ff.net.0.proj")
        put(f"{theirs}.x_block.mlp.fc2", f"{ours}.ff.net.2")
        if number in config.dual_attention_layers:
            put(f"{theirs}.x_block.attn2.qkv", *(f"{ours}.attn2.to_{kind}" for kind in "qkv"))
            put(f"{theirs}.x_block.attn2.proj", f"{ours}.attn2.to_out.0")
        (swap if last else put)(f"{theirs}.context_block.adaLN_modulation.1", f"{ours}.norm1_context.linear")
        if not last:
            put(f"{theirs}.context_block.attn.proj", f"{ours}.attn.to_add_out")
            put(f"{theirs}.context_block.mlp.fc1", f"{ours}.ff_context.net.0.proj")
            put(f"{theirs}.context_block.mlp.fc2", f"{ours}.ff_context.net.2")
    return {f"model.diffusion_model.{name}": tensor for name, tensor in out.items()}


def write_one_file(path: Path, pipeline, *text_encoders: str) -> Path:
    """An SD3 as Stability's files have it: transformer, VAE and these text encoders."""
    state = original_layout(pipeline.transformer) | single_file.to_sgm({"vae": pipeline.vae.state_dict()})
    for part in text_encoders:
        own = getattr(pipeline, part).state_dict()
        own = {name: tensor for name, tensor in own.items() if (part, name) != ("text_encoder", "text_projection.weight")}
        state |= {sd3_file.PREFIXES[part] + name: tensor for name, tensor in own.items() if "embed_tokens" not in name}
    save_file({name: tensor.clone().contiguous() for name, tensor in state.items()}, path)
    return path


def picture(width: int, height: int, number: int) -> Image.Image:
    """Smooth colours that differ from picture to picture and from corner to corner."""
    draw = np.random.default_rng(number)
    small = (draw.random((4, 4, 3)) * 255).astype(np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


def make_images(folder: Path, sizes, captions: bool = True) -> Path:
    """One PNG a size, each with its caption in a text file."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, (width, height) in enumerate(sizes):
        picture(width, height, number).save(folder / f"image{number:03d}.png")
        if captions:
            words = [WORDS[number % 3], WORDS[3 + number % 3]]
            (folder / f"image{number:03d}.txt").write_text(f"a photo of a {words[0]} {words[1]}, {words[0]}, number {number}")
    return folder

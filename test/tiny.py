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

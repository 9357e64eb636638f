"""Make what the benchmarks run on: photographs with captions, and two SDXL and two SD 3 models of random weights.

    pip install scikit-image
    python benchmarks/make_data.py out/bench

Nothing is downloaded. FOLDER/photos: 240 JPEG files of 400 to 1600 pixels a side, cut from the photographs that
scikit-image's package ships, with captions in metadata.jsonl. FOLDER/photos_80: a third of them.
FOLDER/tiny and FOLDER/small: diffusers folders of SDXL's true block types, with a UNet of 3.2 M and of 124 M
parameters. Their tokenizers have as many entries as CLIP's (49,408), but of made-up pieces of words.
FOLDER/sd3_tiny and FOLDER/sd3_small: of SD 3 Medium, transformer, CLIPs and T5 at an eighth and at a third of their widths
and depths (3.9 M and 74.5 M parameters in the transformer, 26 M and 210 M in T5), which keeps what they cost in proportion. The
VAE is as much narrower as it takes to keep its cost in proportion, too. T5's tokenizer has 32,100 made-up pieces.
"""

import argparse
import importlib.util
import itertools
import json
import random
import string
import sys
from pathlib import Path

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

PHOTOS = {
    "astronaut.png": "a portrait of an astronaut in an orange suit, a flag behind her",
    "brick.png": "a wall of bricks, seen from the front",
    "camera.png": "a man with a camera on a tripod on a lawn, black and white",
    "chelsea.png": "a tabby cat looking into the camera, close up",
    "clock_motion.png": "a clock on a wall, blurred by motion",
    "coffee.png": "a cup of coffee with a spoon on a wooden table",
    "coins.png": "old coins in rows on a dark cloth",
    "grass.png": "grass from above, black and white",
    "gravel.png": "gravel on the ground, black and white",
    "hubble_deep_field.jpg": "galaxies and stars in the night sky, seen by a telescope",
    "ihc.png": "a stained tissue under the microscope, brown and blue",
    "moon.png": "the surface of the moon with craters",
    "motorcycle_left.png": "a motorcycle in a garage, tools on the wall",
    "motorcycle_right.png": "a motorcycle among shelves and boxes",
    "page.png": "a printed page of a book about images",
    "retina.jpg": "the retina of an eye with its blood vessels",
    "rocket.jpg": "a rocket on its launch pad at dusk",
}
# UNet widths, transformer layers, attention heads; widths of the text encoders and the VAE; channels of a time id
TINY = {"widths": (32, 64, 64), "layers": [1, 1, 2], "heads": [1, 2, 2], "text": (32, 64), "vae": (16, 32, 32, 32), "time": 32}
SMALL = {"widths": (128, 256, 384), "layers": [1, 2, 4], "heads": [2, 4, 6], "text": (128, 256), "vae": (48, 96, 96, 96),
         "time": 128}
# heads of the transformer, which are also its layers; (width, layers, heads) of the CLIPs, (width, layers, width within) of T5
SD3_TINY = {"heads": 3, "clips": ((96, 2, 2), (160, 4, 2)), "t5": (512, 3, 1280), "vae": (8, 16, 16, 16)}
SD3_SMALL = {"heads": 8, "clips": ((256, 4, 4), (448, 11, 7)), "t5": (1344, 8, 3392), "vae": (32, 64, 96, 96)}
BOS, EOS = "<|startoftext|>", "<|endoftext|>"
VOCABULARY, T5_VOCABULARY = 49408, 32100


def make_photos(folder: Path, count: int) -> None:
    """Cuts of the photographs at other sizes, half of them mirrored; JPEG quality 90 to 97."""
    package = importlib.util.find_spec("skimage")
    if not package:
        sys.exit("make_data.py: error: needs `pip install scikit-image`, for its photographs")
    sources = {name: Image.open(Path(package.origin).parent / "data" / name).convert("RGB") for name in PHOTOS}
    folder.mkdir(parents=True, exist_ok=True)
    draw, lines = random.Random(0), []
    for number, name in zip(range(count), itertools.cycle(PHOTOS), strict=False):
        image = sources[name]
        share = draw.uniform(0.6, 1.0)
        width, height = int(image.width * share), int(image.height * draw.uniform(0.8, 1.2) * share)
        height = min(height, image.height)
        left, top = draw.randint(0, image.width - width), draw.randint(0, image.height - height)
        image = image.crop((left, top, left + width, top + height))
        scale = max(draw.uniform(600, 1600) / max(width, height), 400 / min(width, height))
        image = image.resize((round(width * scale), round(height * scale)), Image.Resampling.BICUBIC)
        if draw.random() < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        image.save(folder / f"photo{number:03d}.jpg", quality=draw.randint(90, 97))
        lines.append({"file_name": f"photo{number:03d}.jpg", "text": f"{PHOTOS[name]}, view {number // len(PHOTOS)}"})
    (folder / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def make_tokenizer(folder: Path, pad: str) -> CLIPTokenizer:
    """CLIP's kind of tokenizer, as large as CLIP's; also in the two files that older readers want."""
    letters = sorted(ByteLevel.alphabet())
    pairs = itertools.product(string.ascii_lowercase, repeat=2)
    triples = itertools.product(map("".join, itertools.product(string.ascii_lowercase, repeat=2)), string.ascii_lowercase)
    fours = itertools.product(map("".join, itertools.product(string.ascii_lowercase, repeat=3)),
                              [letter + "</w>" for letter in "esndrt"])
    merges = list(itertools.islice(itertools.chain(pairs, triples, fours), VOCABULARY - 2 * len(letters) - 2))
    tokens = [*letters, *(letter + "</w>" for letter in letters), *map("".join, merges), BOS, EOS]
    vocab = {token: number for number, token in enumerate(tokens)}
    assert len(vocab) == VOCABULARY, len(vocab)
    tokenizer = CLIPTokenizer(vocab=vocab, merges=merges, pad_token=pad, model_max_length=77)
    tokenizer.save_pretrained(folder)
    (folder / "vocab.json").write_text(json.dumps(vocab))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges))
    return tokenizer


def make_text_encoder(kind, width: int, tokenizer: CLIPTokenizer, layers: int = 2, heads: int = 2):
    return kind(CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=width, intermediate_size=4 * width, num_hidden_layers=layers, projection_dim=width,
        num_attention_heads=heads, max_position_embeddings=77, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id))


def make_t5(folder: Path, width: int, layers: int, within: int) -> tuple[T5TokenizerFast, T5EncoderModel]:
    """T5 v1.1's encoder, and its kind of tokenizer: the likeliest pieces of a word, letters at the worst."""
    letters = [*string.ascii_lowercase, *string.ascii_uppercase, *string.digits, *",.!?'-", "\u2581"]
    pieces = ("".join(each) for size in (2, 3) for each in itertools.product(string.ascii_lowercase, repeat=size))
    words = ("\u2581" + "".join(each) for size in (1, 2, 3) for each in itertools.product(string.ascii_lowercase, repeat=size))
    pieces = itertools.islice(itertools.chain(*zip(words, pieces, strict=False)), T5_VOCABULARY - len(letters) - 3)
    vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *((letter, -12.0) for letter in letters),
                  *((piece, -8.0 - len(piece) / 10) for piece in pieces)]
    assert len(vocabulary) == len(dict(vocabulary)) == T5_VOCABULARY, len(vocabulary)
    T5TokenizerFast(vocab=vocabulary, extra_ids=0, model_max_length=512).save_pretrained(folder)
    return T5TokenizerFast.from_pretrained(folder), T5EncoderModel(T5Config(
        vocab_size=T5_VOCABULARY, d_model=width, d_kv=64, d_ff=within, num_layers=layers, num_heads=width // 64,
        feed_forward_proj="gated-gelu", is_encoder_decoder=False, use_cache=False))


def make_model(folder: Path, widths, layers, heads, text, vae, time) -> None:
    torch.manual_seed(0)
    tokenizers = [make_tokenizer(folder / name, pad) for name, pad in (("tokenizer", EOS), ("tokenizer_2", "!"))]
    unet = UNet2DConditionModel(
        sample_size=32, block_out_channels=widths, layers_per_block=2,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=layers, attention_head_dim=heads, cross_attention_dim=sum(text),
        use_linear_projection=True, addition_embed_type="text_time", addition_time_embed_dim=time,
        projection_class_embeddings_input_dim=text[1] + 6 * time)
    print(f"{folder}: a UNet of {sum(p.numel() for p in unet.parameters()) / 1e6:.1f} M parameters")
    autoencoder = AutoencoderKL(
        block_out_channels=vae, down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1, norm_num_groups=8, latent_channels=4, sample_size=256, scaling_factor=0.13025)
    StableDiffusionXLPipeline(
        vae=autoencoder, text_encoder=make_text_encoder(CLIPTextModel, text[0], tokenizers[0]),
        text_encoder_2=make_text_encoder(CLIPTextModelWithProjection, text[1], tokenizers[1]),
        tokenizer=tokenizers[0], tokenizer_2=tokenizers[1], unet=unet, add_watermarker=False,
        scheduler=EulerDiscreteScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear",
                                         timestep_spacing="leading", steps_offset=1)).save_pretrained(folder)


def make_sd3(folder: Path, heads: int, clips, t5, vae) -> None:
    torch.manual_seed(0)
    tokenizers = [make_tokenizer(folder / name, pad) for name, pad in (("tokenizer", EOS), ("tokenizer_2", "!"))]
    encoders = [make_text_encoder(CLIPTextModelWithProjection, width, tokenizer, *sizes)
                for (width, *sizes), tokenizer in zip(clips, tokenizers, strict=True)]
    tokenizer_3, encoder_3 = make_t5(folder / "tokenizer_3", *t5)
    transformer = SD3Transformer2DModel(
        sample_size=32, num_layers=heads, num_attention_heads=heads, attention_head_dim=64, caption_projection_dim=64 * heads,
        joint_attention_dim=t5[0], pooled_projection_dim=sum(clip[0] for clip in clips), out_channels=16, pos_embed_max_size=192)
    for name, network in {"a transformer": transformer, "a T5": encoder_3}.items():
        print(f"{folder}: {name} of {sum(p.numel() for p in network.parameters()) / 1e6:.1f} M parameters")
    autoencoder = AutoencoderKL(
        block_out_channels=vae, down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1, norm_num_groups=8, latent_channels=16, sample_size=256, scaling_factor=1.5305, shift_factor=0.0609,
        use_quant_conv=False, use_post_quant_conv=False)
    StableDiffusion3Pipeline(
        transformer=transformer, vae=autoencoder, scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        text_encoder=encoders[0], tokenizer=tokenizers[0], text_encoder_2=encoders[1], tokenizer_2=tokenizers[1],
        text_encoder_3=encoder_3, tokenizer_3=tokenizer_3).save_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    make_photos(folder / "photos", 240)
    make_photos(folder / "photos_80", 80)
    make_model(folder / "tiny", **TINY)
    make_model(folder / "small", **SMALL)
    make_sd3(folder / "sd3_tiny", **SD3_TINY)
    make_sd3(folder / "sd3_small", **SD3_SMALL)


if __name__ == "__main__":
    main()

"""Write the demo's untrained model: a diffusers pipeline folder of SDXL's topology, small enough for a CPU.

    python config/demo/make_model.py out/demo/model

Every part is of SDXL's class and wired as there; only the numbers are smaller. The UNet is random and is what
train_sdxl.py trains; both text encoders are random too and stay so (eleven words need telling apart, not
understanding); the VAE was trained by train_vae.py. Only the weights' values depend on the seed.
"""

import argparse
import json
from pathlib import Path

import scans
import torch
from build_once import build_once
from diffusers import AutoencoderKL, EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from tokenizers.pre_tokenizers import ByteLevel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

SEED = 0
VAE = Path(__file__).parent / "vae"
BOS, EOS = "<|startoftext|>", "<|endoftext|>"
HIDDEN, HIDDEN_2 = 32, 64  # of the two text encoders (SDXL: 768 and 1280); concatenated for the UNet's attention
TEXT_WEIGHT_GAIN = 2.5  # of the random text encoders over CLIP's initial weights
TIME_ID_CHANNELS = 32  # a number (SDXL: 256), of which there are six


def vocabulary():
    """CLIP's byte-level vocabulary {token: id} and merges [(left, right)], in which each demo word is one token."""
    letters = sorted(ByteLevel.alphabet())
    merges = []
    for word in (*scans.WORDS, "over"):
        parts = [*word[:-1], word[-1] + "</w>"]
        merges += [("".join(parts[:end]), parts[end]) for end in range(1, len(parts))]
    merges = list(dict.fromkeys(merges))
    tokens = letters + [letter + "</w>" for letter in letters] + ["".join(pair) for pair in merges] + [BOS, EOS]
    return {token: number for number, token in enumerate(tokens)}, merges


def save_vocabulary(folder):
    """The two files of older transformers, beside the tokenizer.json that version 5 writes."""
    vocab, merges = vocabulary()
    (folder / "vocab.json").write_text(json.dumps(vocab, ensure_ascii=False))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges))


def make_tokenizer(pad_token):
    """CLIP's tokenizer of 77 places; SDXL pads the first with EOS and the second with "!"."""
    vocab, merges = vocabulary()
    return CLIPTokenizer(vocab=vocab, merges=merges, pad_token=pad_token, model_max_length=77)


def make_text_encoder(model_class, hidden, activation, tokenizer):
    """A random CLIP text encoder in which captions differ, as they would not with CLIP's own initial weights.

    Embeddings of 0.02 would leave all words alike; small weights would average words without their order, and
    leave the 70-odd padding places, which the UNet attends to as well, empty of the caption.
    """
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=4 * hidden,
        num_hidden_layers=2,
        num_attention_heads=2,
        projection_dim=hidden,
        hidden_act=activation,
        max_position_embeddings=tokenizer.model_max_length,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    encoder = model_class(config)
    for name, weight in encoder.named_parameters():
        if "token_embedding" in name:
            torch.nn.init.normal_(weight, std=1.0)
        elif "position_embedding" in name:
            torch.nn.init.normal_(weight, std=0.5)
        elif weight.ndim == 2 and ".layers." in name:
            weight.data.mul_(TEXT_WEIGHT_GAIN)
    return encoder.eval()


def make_unet():
    """SDXL's UNet: three levels, attention on the lower two, micro-conditioning; 3.6 million weights."""
    return UNet2DConditionModel(
        sample_size=scans.SIDE // 8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(32, 64, 96),
        layers_per_block=1,
        transformer_layers_per_block=[1, 1, 2],
        attention_head_dim=[1, 2, 3],  # the number of heads, as in SDXL's config: 32 channels a head
        cross_attention_dim=HIDDEN + HIDDEN_2,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=TIME_ID_CHANNELS,
        projection_class_embeddings_input_dim=HIDDEN_2 + 6 * TIME_ID_CHANNELS,
    )


def make_scheduler():
    """SDXL's own scheduler_config.json. clip_sample is for DDIM and DDPM made from it: latents exceed 1."""
    settings = {"clip_sample": False, "set_alpha_to_one": False, "skip_prk_steps": True}
    return EulerDiscreteScheduler.from_config({
        "num_train_timesteps": 1000,
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "prediction_type": "epsilon",
        "timestep_spacing": "leading",
        "steps_offset": 1,
        **settings,
    })


def write_model(folder):
    """Make every part from the seed and save the pipeline."""
    torch.manual_seed(SEED)
    tokenizers = make_tokenizer(EOS), make_tokenizer("!")
    pipeline = StableDiffusionXLPipeline(
        vae=AutoencoderKL.from_pretrained(VAE),
        text_encoder=make_text_encoder(CLIPTextModel, HIDDEN, "quick_gelu", tokenizers[0]),
        text_encoder_2=make_text_encoder(CLIPTextModelWithProjection, HIDDEN_2, "gelu", tokenizers[1]),
        tokenizer=tokenizers[0],
        tokenizer_2=tokenizers[1],
        unet=make_unet(),
        scheduler=make_scheduler(),
        force_zeros_for_empty_prompt=False,  # the script trains "" as encoded, so guidance must start from that
        add_watermarker=False,
    )
    pipeline.save_pretrained(folder)
    for name in ("tokenizer", "tokenizer_2"):
        save_vocabulary(folder / name)


def make_folder(docstring, sources, write):
    """Make the folder that the command line names by write(folder), or say that it is there."""
    parser = argparse.ArgumentParser(description=docstring, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="the folder to make")
    out = parser.parse_args().out
    made = build_once(out, [*sources, scans.__file__, *sorted(VAE.iterdir())], write)
    print(f"{out}: {'made' if made else 'as it was'}")


if __name__ == "__main__":
    make_folder(__doc__, [__file__], write_model)

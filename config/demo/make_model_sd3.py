"""Write the SD3 demo's untrained model: a diffusers pipeline folder of SD 3.5 Medium's topology, small enough for a CPU.

    python config/demo/make_model_sd3.py out/demo_sd3/model

Every part is of SD3's class and wired as there; only the numbers are smaller. The transformer is random and is what
train_sd3.py trains; both CLIPs and T5 are random too and stay so. The VAE is the SDXL demo's, rewritten as SD3's are
(as_sd3). Only the weights' values depend on the seed.
"""

import math

import make_model
import scans
import torch
import train_vae
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from transformers import CLIPTextModelWithProjection, T5Config, T5EncoderModel, T5TokenizerFast

CHANNELS = 4  # of the latents (SD3: 16): a scan is 64 numbers, and noise in more channels is to be predicted all the same
SCALING_FACTOR = 1.5305  # SD3's: the latents' deviation is 1 / 1.5305
SHIFT_FACTOR = 0.5  # their mean. SD3's own, 0.0609, would hardly be missed; a forgotten 0.5 shows in the demo's pictures
T5_WIDTH = 128  # of T5's embeddings (SD3: 4096), wider than both CLIPs' side by side
LAYERS, HEADS, HEAD_DIM = 3, 2, 32  # SD 3.5 Medium: 24, 24, 64


@torch.no_grad()
def as_sd3(vae):
    """The SDXL demo's VAE -> one with a shift factor and without convolutions around the latents that decodes the same pictures.

    The four channels of `vae` are one signal s of mean 0 and deviation 1, with signs in turn (train_vae.standardize). Here
    they are SHIFT_FACTOR + sign s / SCALING_FACTOR. The decoder takes s from the channels with their signs, and the constant
    that the convolution behind the latents added from their mean: so its first convolution needs no other bias, which the
    padding at a picture's border would not have.
    """
    settings = {"scaling_factor": SCALING_FACTOR, "shift_factor": SHIFT_FACTOR, "use_quant_conv": False}
    new = AutoencoderKL.from_config(dict(vae.config) | settings | {"use_post_quant_conv": False})
    before, after, factor = vae.quant_conv, vae.post_quant_conv, vae.config.scaling_factor
    states = {name: tensor for name, tensor in vae.state_dict().items() if "quant_conv" not in name}
    signs = torch.tensor([1.0, -1.0]).repeat(CHANNELS // 2)

    first = before.weight[0, :, 0, 0] * factor / SCALING_FACTOR  # [8]: to s / SCALING_FACTOR, from what comes before it
    weight = torch.einsum("e,eihw->ihw", first, states["encoder.conv_out.weight"])
    bias = first @ states["encoder.conv_out.bias"] + before.bias[0] * factor / SCALING_FACTOR
    log_variance = torch.full((CHANNELS,), 2 * math.log(train_vae.POSTERIOR_STD / SCALING_FACTOR))
    states["encoder.conv_out.weight"] = torch.cat([signs[:, None, None, None] * weight, torch.zeros(CHANNELS, *weight.shape)])
    states["encoder.conv_out.bias"] = torch.cat([SHIFT_FACTOR + signs * bias, log_variance])

    gain = after.weight[:, :, 0, 0] @ signs / factor  # [4]: its decoder begins with gain s + after.bias
    mixed = (gain[:, None] * signs * SCALING_FACTOR + after.bias[:, None] / SHIFT_FACTOR) / CHANNELS  # [4, 4]
    states["decoder.conv_in.weight"] = torch.einsum("oihw,ic->ochw", states["decoder.conv_in.weight"], mixed)
    new.load_state_dict(states)
    return new


def make_t5():
    """T5's tokenizer, in which each demo word is one token, and a random encoder of two layers."""
    words, letters = (*scans.WORDS, "over"), sorted(set("".join(scans.WORDS) + "over"))
    scores = {"<pad>": 0.0, "</s>": 0.0, "<unk>": 0.0} | {f"\u2581{word}": -1.0 for word in words}
    vocab = [*scores.items(), *((letter, -9.0) for letter in ["\u2581", *letters])]
    config = T5Config(
        vocab_size=len(vocab),
        d_model=T5_WIDTH,
        d_kv=32,
        d_ff=2 * T5_WIDTH,
        num_layers=2,
        num_heads=2,
        feed_forward_proj="gated-gelu",
        is_encoder_decoder=False,
        use_cache=False,
    )
    return T5TokenizerFast(vocab=vocab, extra_ids=0, model_max_length=512), T5EncoderModel(config).eval()


def make_transformer():
    """SD 3.5 Medium's: joint blocks with RMS-normed queries and keys, the first with a second attention within the image.

    The modulations and the last layer start at 0, as DiT's do: each block begins as the identity.
    """
    side = scans.SIDE // 8
    transformer = SD3Transformer2DModel(
        sample_size=side,
        patch_size=2,
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        num_layers=LAYERS,
        num_attention_heads=HEADS,
        attention_head_dim=HEAD_DIM,
        caption_projection_dim=HEADS * HEAD_DIM,
        joint_attention_dim=T5_WIDTH,
        pooled_projection_dim=make_model.HIDDEN + make_model.HIDDEN_2,
        pos_embed_max_size=side // 2,  # patches lie 1 apart. In a larger grid (SD 3.5: 384, 1/6 apart) 16 would look alike
        qk_norm="rms_norm",
        dual_attention_layers=tuple(range(LAYERS // 2 + 1)),  # SD 3.5 Medium: the first 13 of 24
    )
    for name, parameter in transformer.named_parameters():
        if name.startswith(("norm_out.linear", "proj_out")) or "norm1.linear" in name or "norm1_context.linear" in name:
            torch.nn.init.zeros_(parameter)
    return transformer


def write_model(folder):
    """Make every part from the seed and save the pipeline."""
    torch.manual_seed(make_model.SEED)
    tokenizers = make_model.make_tokenizer(make_model.EOS), make_model.make_tokenizer("!")
    kind, (t5_tokenizer, t5) = CLIPTextModelWithProjection, make_t5()
    pipeline = StableDiffusion3Pipeline(
        transformer=make_transformer(),
        vae=as_sd3(AutoencoderKL.from_pretrained(make_model.VAE)),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        text_encoder=make_model.make_text_encoder(kind, make_model.HIDDEN, "quick_gelu", tokenizers[0]),
        text_encoder_2=make_model.make_text_encoder(kind, make_model.HIDDEN_2, "gelu", tokenizers[1]),
        text_encoder_3=t5,
        tokenizer=tokenizers[0],
        tokenizer_2=tokenizers[1],
        tokenizer_3=t5_tokenizer,
    )
    pipeline.save_pretrained(folder)
    for name in ("tokenizer", "tokenizer_2"):
        make_model.save_vocabulary(folder / name)


if __name__ == "__main__":
    make_model.make_folder(__doc__, [__file__, make_model.__file__, train_vae.__file__], write_model)

"""Train the demo's small VAE on the demo's pictures. config/demo/vae was made so: trained once, then standardized.

    python config/demo/make_images.py out/demo/images
    python config/demo/train_vae.py out/demo/images config/demo/vae

Factor 8 and 4 latent channels, as SDXL's. After training, the latents are centred and stretched, inside the
1x1 convolutions around the latents, to the spread that makes SDXL's own scaling factor the right one (standardize).
"""

import argparse
import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from PIL import Image

SCALING_FACTOR = 0.13025  # SDXL's. Not 1, so that a forgotten or doubled factor shows in the demo's pictures
KL_WEIGHT = 1e-3
POSTERIOR_STD = 0.05  # of the scaled latents, whose own is 1
BATCH_SIZE = 16
PEAK_LEARNING_RATE = 2e-3


def load_pictures(folder):
    """Picture folder -> list of uint8 tensors [n, 3, h, w], one a shape."""
    by_shape = {}
    for path in sorted(folder.glob("*.png")):
        picture = np.asarray(Image.open(path).convert("RGB"))
        by_shape.setdefault(picture.shape, []).append(torch.from_numpy(picture.copy()).permute(2, 0, 1))
    return [torch.stack(pictures) for pictures in by_shape.values()]


def as_input(pictures):
    """uint8 [n, 3, h, w] -> float32 in -1..1."""
    return pictures.float() / 127.5 - 1


def new_vae():
    """SDXL's VAE classes and factor 8, narrow: some 240,000 weights."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8, 16, 32, 32),
        layers_per_block=1,
        norm_num_groups=8,
        latent_channels=4,
        sample_size=64,
        scaling_factor=SCALING_FACTOR,
        force_upcast=False,
    )


def loss_of(vae, pictures):
    """Reconstruction plus weighted KL divergence of one batch, both a pixel's mean."""
    posterior = vae.encode(pictures).latent_dist
    restored = vae.decode(posterior.sample()).sample
    kl = posterior.kl().sum() / posterior.mean.numel()
    return F.mse_loss(restored, pictures) + 0.1 * F.l1_loss(restored, pictures) + KL_WEIGHT * kl


def train(vae, groups, num_steps):
    """Adam with a one-cycle learning rate; shapes take turns in proportion to their pictures."""
    optimizer = torch.optim.AdamW(vae.parameters(), lr=PEAK_LEARNING_RATE, weight_decay=1e-4, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, PEAK_LEARNING_RATE, total_steps=num_steps, pct_start=0.1)
    shares = torch.tensor([float(len(group)) for group in groups])
    for step in range(num_steps):
        group = groups[torch.multinomial(shares, 1).item()]
        loss = loss_of(vae, as_input(group[torch.randint(len(group), (BATCH_SIZE,))]))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 100 == 0 or step == num_steps - 1:
            print(f"step {step}: loss {loss.item():.4f}", flush=True)


@torch.no_grad()
def spread_of_latents(vae, groups):
    """Mean [4] and standard deviation [4] of all latents' channels, and the mean posterior deviation [4]."""
    posteriors = [vae.encode(as_input(part)).latent_dist for group in groups for part in group.split(256)]
    means = torch.cat([posterior.mean.transpose(0, 1).flatten(1) for posterior in posteriors], dim=1)  # [4, pixels]
    widths = torch.cat([posterior.std.transpose(0, 1).flatten(1) for posterior in posteriors], dim=1)
    return means.mean(dim=1), means.std(dim=1), (widths.mean(dim=1) / means.std(dim=1))


@torch.no_grad()
def standardize(vae, mean, std, width):
    """Let all four latent channels show the picture, with mean 0 and deviation 1 / SCALING_FACTOR.

    A scan is 8x8 numbers, so one channel suffices, and the KL term gives the other three up: their posterior is
    wide noise that the decoder ignores. So the one of the narrowest posterior is written to all four, with signs
    in turn, and the decoder takes the mean of the four. Both are linear: they go into the 1x1 convolutions before
    and after the latents.
    """
    chosen = width.argmin()
    signs = torch.tensor([1.0, -1.0, 1.0, -1.0])
    gain = signs / (std[chosen] * SCALING_FACTOR)  # [4]
    before, after = vae.quant_conv, vae.post_quant_conv
    before.bias[:4] = (before.bias[chosen] - mean[chosen]) * gain
    before.weight[:4] = before.weight[chosen] * gain[:, None, None, None]
    before.weight[4:] = 0  # the other four outputs are the logarithm of the variance
    before.bias[4:] = 2 * math.log(POSTERIOR_STD / SCALING_FACTOR)
    after.bias.add_(after.weight[:, :, 0, 0] @ mean)  # what the other three channels hold on average stays
    after.weight[:] = after.weight[:, chosen, None] / gain[None, :, None, None] / 4


def main():
    """Train, standardize, save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", type=Path, help="what make_images.py wrote")
    parser.add_argument("out", type=Path, help="the VAE's folder")
    parser.add_argument("--steps", type=int, default=1000)
    args = parser.parse_args()
    torch.manual_seed(0)
    groups = load_pictures(args.images)
    vae = new_vae()
    print(f"{sum(p.numel() for p in vae.parameters()):,} weights, {sum(map(len, groups)):,} pictures")
    train(vae, groups, args.steps)
    standardize(vae, *spread_of_latents(vae.eval(), groups))
    mean, std, width = spread_of_latents(vae, groups)
    print("scaled latents: mean", mean * SCALING_FACTOR, "deviation", std * SCALING_FACTOR, "posterior's share", width)
    vae.save_pretrained(args.out)


if __name__ == "__main__":
    main()

"""The objective of flow matching (SD 3 and 3.5): noise levels, targets, loss weights.

A noise level sigma runs from 0, the image, to 1, noise: x = (1 - sigma) image + sigma noise, and the transformer predicts the
velocity noise - image. Esser et al., "Scaling Rectified Flow Transformers for High-Resolution Image Synthesis", 2024. All of it
is float32: in bf16, of 1000 levels 355 are left.
"""

import math

import torch

STEPS = 1000    # levels that are trained, and the unit of the transformer's timestep
SCHEMES = ("none", "sigma_sqrt", "logit_normal", "mode", "cosmap")
DENSITIES = ("uniform", "logit_normal", "mode", "beta")


def draw_u(draw: torch.Tensor, density: str, logit_mean: float = 0.0, logit_std: float = 1.0,
           mode_scale: float = 1.29) -> torch.Tensor:
    """Uniform numbers [B] in [0, 1) -> u [B] in 0..1 of the density, float32. u = 0 is noise, u = 1 the image.

    logit_normal: sigmoid of a normal number; mode: equation 20 of the paper; beta: Beta(2, 2). As diffusers'
    `compute_density_for_timestep_sampling`, but that each is a function of one uniform number. The paper counts the other way
    around: a positive logit_mean is less noise here (and in diffusers), more in the paper.
    """
    draw = draw.float()
    if density == "logit_normal":
        inside = draw.clamp(2.0 ** -24, 1 - 2.0 ** -24)
        return torch.sigmoid(logit_mean + logit_std * math.sqrt(2) * torch.erfinv(2 * inside - 1))
    if density == "mode":
        return 1 - draw - mode_scale * (torch.cos(math.pi / 2 * draw) ** 2 - 1 + draw)
    if density == "beta":    # the inverse of 3 x^2 - 2 x^3
        return 0.5 - torch.sin(torch.asin(1 - 2 * draw) / 3)
    if density != "uniform":
        raise ValueError(f"there is no density {density!r}")
    return draw


def sigmas(u: torch.Tensor, shift: float) -> torch.Tensor:
    """u [B] -> noise levels [B] float32: one of 1000 from 1 down to 1/1000, then moved towards noise by `shift`.

    The levels of diffusers' FlowMatchEulerDiscreteScheduler: shift s / (1 + (shift - 1) s), equation 23 of the paper.
    """
    level = (STEPS - (u.float() * STEPS).floor().clamp(0, STEPS - 1)) / STEPS
    return shift * level / (1 + (shift - 1) * level)


def auto_shift(height: int, width: int, schedule_config=None) -> float:
    """The shift for latents of height x width: exp(mu), mu linear in the number of 2 x 2 patches, 0.5 at 256 and 1.15 at 4096.

    schedule_config: of the scheduler, whose base_image_seq_len, max_image_seq_len, base_shift, max_shift go before these.
    diffusers' `calculate_shift`.
    """
    known = {"base_image_seq_len": 256, "max_image_seq_len": 4096, "base_shift": 0.5, "max_shift": 1.15}
    at = {name: (schedule_config or {}).get(name) or value for name, value in known.items()}
    slope = (at["max_shift"] - at["base_shift"]) / (at["max_image_seq_len"] - at["base_image_seq_len"])
    return math.exp(at["base_shift"] + slope * ((height // 2) * (width // 2) - at["base_image_seq_len"]))


def add_noise(latents: torch.Tensor, noise: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    """(1 - sigma) latents + sigma noise, [B, C, h, w] float32; sigma [B]."""
    sigma = sigma[:, None, None, None]
    return (1 - sigma) * latents + sigma * noise


def velocity(latents: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """What the transformer is to predict: noise - latents, [B, C, h, w]."""
    return noise - latents


def denoised(prediction: torch.Tensor, noisy: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    """The image that a predicted velocity means: noisy - sigma prediction, [B, C, h, w] float32.

    Its squared error is sigma^2 times that of the velocity.
    """
    return noisy.float() - sigma[:, None, None, None] * prediction.float()


def loss_weight(scheme: str, sigma: torch.Tensor) -> torch.Tensor:
    """Weight of each sample's loss -> [B]: sigma_sqrt is sigma^-2, cosmap 2 / (pi (1 - 2 sigma + 2 sigma^2)), else 1.

    diffusers' `compute_loss_weighting_for_sd3`, for each sample by itself.
    """
    if scheme not in SCHEMES:
        raise ValueError(f"there is no weighting scheme {scheme!r}")
    if scheme == "sigma_sqrt":
        return sigma ** -2.0
    if scheme == "cosmap":
        return 2 / (math.pi * (1 - 2 * sigma + 2 * sigma ** 2))
    return torch.ones_like(sigma)

"""The objective of discrete-time diffusion (SD 1.x, 2.x, SDXL): timesteps, targets, loss weights.

All tables are float32; alphas_cumprod [T] is the product of (1 - beta_t) of Ho et al., "Denoising Diffusion
Probabilistic Models", 2020.
"""

import torch
import torch.nn.functional as F

from library.errors import UserError


def timestep_bias(strategy: str, steps: int, multiplier: float, begin: int, end: int, portion: float) -> torch.Tensor:
    """Probability of each timestep -> [steps], sums to 1.

    `later` and `earlier` favour the last or first int(portion * steps) timesteps, `range` those of [begin, end).
    As diffusers' `generate_timestep_weights`, but that a share that rounds to nothing favours nothing.
    Raises `UserError` for a range that holds no timestep.
    """
    weights = torch.ones(steps)
    share = int(portion * steps)
    if strategy == "later":
        weights[steps - share:] *= multiplier
    elif strategy == "earlier":
        weights[:share] *= multiplier
    elif strategy == "range":
        if not 0 <= begin < end <= steps:
            raise UserError(f"--timestep_bias_begin {begin} and --timestep_bias_end {end} hold no timesteps of 0 to {steps - 1}; "
                            f"the range is begin <= t < end, and end is at most {steps}")
        weights[begin:end] *= multiplier
    elif strategy != "none":
        raise ValueError(f"there is no timestep bias {strategy!r}")
    return weights / weights.sum()


def cumulative(probability: torch.Tensor) -> torch.Tensor:
    """Distribution function [T] float32 of a probability [T], summed in float64: once, on the CPU (MPS has no float64)."""
    return probability.double().cumsum(0).float()


def draw_timesteps(draw: torch.Tensor, timestep_cdf: torch.Tensor) -> torch.Tensor:
    """Uniform numbers [B] in [0, 1) -> timesteps [B] int64 of the distribution function [T], by its inverse."""
    return torch.searchsorted(timestep_cdf, draw, right=True).clamp_(max=len(timestep_cdf) - 1)


def offset_noise(noise: torch.Tensor, offset: torch.Tensor, strength: float) -> torch.Tensor:
    """Noise [B, C, h, w] plus `strength` times one number a channel, [B, C, 1, 1].

    Lets a model learn images that are dark or bright as a whole (Guttenberg, "Diffusion with offset noise", 2023).
    """
    return noise + strength * offset if strength else noise


def add_noise(latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor,
              alphas_cumprod: torch.Tensor) -> torch.Tensor:
    """sqrt(abar_t) x0 + sqrt(1 - abar_t) noise, [B, C, h, w] float32 (DDPM, equation 4)."""
    signal, sigma = _rates(timesteps, alphas_cumprod)
    return signal * latents + sigma * noise


def target(prediction_type: str, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor,
           alphas_cumprod: torch.Tensor) -> torch.Tensor:
    """What the network should predict, [B, C, h, w]: the noise, or v = sqrt(abar) noise - sqrt(1 - abar) x0.

    v: Salimans & Ho, "Progressive Distillation", 2022, appendix D. Raises ValueError for another prediction type.
    """
    if prediction_type == "epsilon":
        return noise
    if prediction_type != "v_prediction":
        raise ValueError(f"prediction type {prediction_type!r} cannot be trained: --prediction_type epsilon or v_prediction")
    signal, sigma = _rates(timesteps, alphas_cumprod)
    return signal * noise - sigma * latents


def min_snr_weight(prediction_type: str, timesteps: torch.Tensor, alphas_cumprod: torch.Tensor,
                   gamma: float) -> torch.Tensor:
    """Weight of each sample's loss -> [B]: min(SNR, gamma)/SNR for epsilon, min(SNR, gamma)/(SNR + 1) for v.

    Hang et al., "Efficient Diffusion Training via Min-SNR Weighting Strategy", 2023. At SNR = 0 (zero terminal SNR)
    the weight for epsilon is its limit, 1; written as min(1, gamma/SNR) it needs no special case.
    """
    snr = snr_table(alphas_cumprod).to(timesteps.device)[timesteps]
    if prediction_type == "v_prediction":
        return snr.clamp(max=gamma) / (snr + 1)
    return (gamma / snr).clamp(max=1)


def snr_table(alphas_cumprod: torch.Tensor) -> torch.Tensor:
    """Signal-to-noise ratio abar / (1 - abar) of each timestep -> [T] float32."""
    return alphas_cumprod.float() / (1 - alphas_cumprod.float())


def mse_per_sample(prediction: torch.Tensor, wanted: torch.Tensor, mask: torch.Tensor | None = None,
                   area: str = "image") -> torch.Tensor:
    """Mean squared error over all but the batch, in float32 -> [B].

    mask [B, 1, h, w] in 0..1 weighs it. area: "image" divides by all pixels, as kohya and SimpleTuner do; "mask" by the
    mask's own area, so that a small mask weighs as much as a large one (0 where a mask is empty).
    """
    error = F.mse_loss(prediction.float(), wanted.float(), reduction="none")
    axes = tuple(range(1, prediction.ndim))
    if mask is None:
        return error.mean(dim=axes)
    masked = (error * mask).mean(dim=axes)
    if area == "image":
        return masked
    share = mask.mean(dim=axes)
    return torch.where(share > 0, masked / share.clamp(min=1e-6), 0.0)


def _rates(timesteps: torch.Tensor, alphas_cumprod: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """sqrt(abar_t) and sqrt(1 - abar_t), each [B, 1, 1, 1]."""
    at = alphas_cumprod.to(timesteps.device)[timesteps].float()[:, None, None, None]
    return at ** 0.5, (1 - at) ** 0.5

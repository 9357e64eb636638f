"""What the denoiser sees of the VAE's latents."""

import torch


def latent_scale(vae_config) -> tuple[torch.Tensor, torch.Tensor]:
    """(shift, scale), each [C, 1, 1]: the denoiser sees (latents - shift) * scale. A mean and a deviation of each channel go
    before the shift_factor of all."""
    channels, factor = vae_config["latent_channels"], vae_config["scaling_factor"]
    mean, std = vae_config.get("latents_mean"), vae_config.get("latents_std")
    shift = torch.tensor(mean if mean else [float(vae_config.get("shift_factor") or 0)] * channels)
    scale = factor / torch.tensor(std) if std else torch.full((channels,), factor)
    return shift[:, None, None], scale[:, None, None]

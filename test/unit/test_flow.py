"""Flow matching against diffusers' own functions and scheduler, and against closed forms."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.stats
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel
from diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3 import calculate_shift
from diffusers.training_utils import compute_density_for_timestep_sampling, compute_loss_weighting_for_sd3
from hypothesis import given
from hypothesis import strategies as st

import train_sd3
from library import flags_sd3
from library.diffusion import flow

EVEN = (torch.arange(20000) + 0.5) / 20000    # quantiles
CORNERS = torch.tensor([0.0, 2.0 ** -24, 0.5, 1 - 2.0 ** -24])    # the least and the most that NumPy draws in float32


def density_of_diffusers(monkeypatch, draw: torch.Tensor, scheme: str, mean: float, std: float, scale: float) -> torch.Tensor:
    """Its own function, with its random numbers given: uniform ones, and normal ones of the same quantiles."""
    normal = torch.from_numpy(scipy.stats.norm.ppf(draw.double().numpy()))
    with monkeypatch.context() as patch:
        patch.setattr(torch, "rand", lambda *_, **__: draw)
        patch.setattr(torch, "normal", lambda mean, std, **_: (mean + std * normal).float())
        return compute_density_for_timestep_sampling(scheme, len(draw), mean, std, scale)


# noise levels

@pytest.mark.parametrize("shift", [1.0, 3.0, 6.0])
def test_levels_are_the_schedulers_own(shift):
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    ours = flow.sigmas((torch.arange(1000) + 0.5) / 1000, shift)
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, scheduler.sigmas, rtol=1e-6, atol=0)
    torch.testing.assert_close(flow.STEPS * ours, scheduler.timesteps, rtol=1e-6, atol=0)
    assert ours[0] == 1 and ours[-1] > 0 and (ours.diff() < 0).all()    # u = 0 is noise


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("density", flow.DENSITIES)
def test_every_draw_is_a_level(density, shift):
    levels = flow.sigmas(flow.draw_u(CORNERS, density), shift)
    least = shift * 0.001 / (1 + (shift - 1) * 0.001)
    assert ((least * (1 - 1e-6) <= levels) & (levels <= 1)).all() and len(levels.unique()) > 1


def test_half_precision_is_widened():
    half = flow.sigmas(torch.rand(500, generator=torch.Generator().manual_seed(0)).bfloat16(), 3.0)
    assert half.dtype == torch.float32 and flow.draw_u(EVEN.half(), "mode").dtype == torch.float32


@pytest.mark.parametrize("width, height, wanted", [(512, 512, 0.63), (1024, 1024, 1.15), (1280, 768, 1.15 - 256 * 0.65 / 3840)])
def test_the_automatic_shift(width, height, wanted):
    config = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True).config
    for known in (None, config):
        shift = flow.auto_shift(height // 8, width // 8, known)
        assert shift == pytest.approx(math.exp(wanted), rel=1e-9)
    tokens = (height // 16) * (width // 16)
    assert math.log(shift) == pytest.approx(calculate_shift(tokens, 256, 4096, 0.5, 1.15), abs=1e-9)
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    levels = scheduler.time_shift(math.log(shift), 1.0, torch.arange(1000, 0, -1) / 1000)
    torch.testing.assert_close(flow.sigmas((torch.arange(1000) + 0.5) / 1000, shift), levels, rtol=1e-6, atol=0)


def test_the_automatic_shift_reads_the_schedulers_config():
    other = {"base_image_seq_len": 100, "max_image_seq_len": 400, "base_shift": 0.1, "max_shift": 0.7}
    assert flow.auto_shift(32, 32, other) == pytest.approx(math.exp(0.1 + 0.6 * 156 / 300))


# densities

@pytest.mark.parametrize("mean, std", [(0.0, 1.0), (1.5, 0.4), (-0.7, 2.0)])
def test_logit_normal(monkeypatch, mean, std):
    u = flow.draw_u(EVEN, "logit_normal", mean, std)
    torch.testing.assert_close(u, density_of_diffusers(monkeypatch, EVEN, "logit_normal", mean, std, 0), rtol=0, atol=1e-5)
    assert scipy.stats.kstest(scipy.special.logit(u.double().numpy()), scipy.stats.norm(mean, std).cdf).statistic < 1e-4


@pytest.mark.parametrize("scale", [1.29, -0.5, 0.0, 1.75])
def test_mode(monkeypatch, scale):
    u = flow.draw_u(EVEN, "mode", mode_scale=scale)
    torch.testing.assert_close(u, density_of_diffusers(monkeypatch, EVEN, "mode", 0, 1, scale), rtol=0, atol=1e-6)
    assert (u >= 0).all() and (u <= 1).all() and (u.diff() < 1e-6).all()
    if scale < 1.5:    # how often the middle is drawn: the slope of u there is -1 - s (1 - pi / 2)
        middle = ((u - 0.5).abs() < 0.01).double().mean().item()
        assert middle == pytest.approx(0.02 / (1 + scale * (1 - math.pi / 2)), rel=0.02)


def test_beta_and_uniform():
    u = flow.draw_u(EVEN, "beta").double().numpy()
    np.testing.assert_allclose(u, scipy.stats.beta(2, 2).ppf(EVEN.double().numpy()), atol=1e-6)
    assert scipy.stats.kstest(u, scipy.stats.beta(2, 2).cdf).statistic < 1e-4
    assert torch.equal(flow.draw_u(EVEN, "uniform"), EVEN)


def test_a_positive_mean_is_less_noise():
    """Here and in diffusers; more in the paper, which counts the other way around."""
    less, even, more = (flow.sigmas(flow.draw_u(EVEN, "logit_normal", mean), 1.0).mean().item() for mean in (1, 0, -1))
    assert less < even - 0.1 < even < more - 0.1


@pytest.mark.parametrize("draw", [lambda: flow.draw_u(EVEN, "cosmap"), lambda: flow.loss_weight("beta", EVEN)])
def test_unknown_names(draw):
    with pytest.raises(ValueError, match="cosmap|beta"):
        draw()


# targets and weights

@given(st.floats(0.001, 1), st.integers(0, 1000))
def test_the_image_comes_back_out_of_the_velocity(level, number):
    made, sigma = torch.Generator().manual_seed(number), torch.tensor([level])
    latents, noise = torch.randn(1, 4, 3, 5, generator=made), torch.randn(1, 4, 3, 5, generator=made)
    noisy = flow.add_noise(latents, noise, sigma)
    torch.testing.assert_close(flow.denoised(flow.velocity(latents, noise), noisy, sigma), latents, rtol=0, atol=1e-5)
    off = torch.randn(1, 4, 3, 5, generator=made)    # the squared error of the image is sigma^2 times that of the velocity
    image_error = (flow.denoised(flow.velocity(latents, noise) + off, noisy, sigma) - latents).square().mean()
    torch.testing.assert_close(image_error, sigma[0] ** 2 * off.square().mean(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("scheme", flow.SCHEMES)
def test_weights_are_those_of_diffusers_for_each_sample(scheme):
    sigma = FlowMatchEulerDiscreteScheduler(shift=3.0).sigmas
    assert torch.equal(flow.loss_weight(scheme, sigma), compute_loss_weighting_for_sd3(scheme, sigma))
    assert torch.isfinite(flow.loss_weight(scheme, sigma)).all()


# the loss of the script

def tiny_transformer() -> SD3Transformer2DModel:
    """SD 3.5's topology: two layers with a second attention, norms of queries and keys, a positional grid."""
    torch.manual_seed(0)
    return SD3Transformer2DModel(
        sample_size=16, patch_size=2, in_channels=4, out_channels=4, num_layers=3, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=24, caption_projection_dim=16, pooled_projection_dim=12, pos_embed_max_size=12,
        dual_attention_layers=(0, 1), qk_norm="rms_norm")


def some_batch(size: int = 5, height: int = 12, width: int = 8) -> dict[str, torch.Tensor]:
    made = torch.Generator().manual_seed(3)
    shape = (size, 4, height, width)
    return {"latents": torch.randn(shape, generator=made), "noise": torch.randn(shape, generator=made),
            "noise_offset": torch.randn(size, 4, 1, 1, generator=made), "timestep_draw": torch.rand(size, generator=made),
            "loss_weight": torch.ones(size), "prompt_embeds": torch.randn(size, 7, 24, generator=made),
            "pooled_prompt_embeds": torch.randn(size, 12, generator=made)}


def parse(*flags):
    return train_sd3.parse_args(["--pretrained_model_name_or_path=model", "--train_data_dir=images", *map(str, flags)])


def our_loss(transformer, batch: dict, *flags) -> torch.Tensor:
    args = parse(*flags)
    return train_sd3.training_loss(transformer, batch, FlowMatchEulerDiscreteScheduler(shift=3.0), flags_sd3.density(args), args)


def loss_of_diffusers(transformer, batch: dict, u: torch.Tensor, scheme: str, precondition: bool, shift: float) -> torch.Tensor:
    """What train_dreambooth_lora_sd3.py computes of latents, noise, u and embeddings: each level is looked up by its timestep."""
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    timesteps = scheduler.timesteps[(u * scheduler.config.num_train_timesteps).long()]
    places = [(scheduler.timesteps == timestep).nonzero().item() for timestep in timesteps]
    level = scheduler.sigmas[places].view(-1, 1, 1, 1)
    noisy = (1.0 - level) * batch["latents"] + level * batch["noise"]
    output = transformer(hidden_states=noisy, timestep=timesteps, encoder_hidden_states=batch["prompt_embeds"],
                         pooled_projections=batch["pooled_prompt_embeds"], return_dict=False)[0]
    if precondition:
        output, wanted = output * (-level) + noisy, batch["latents"]
    else:
        wanted = batch["noise"] - batch["latents"]
    weight = compute_loss_weighting_for_sd3(scheme, level)
    return (weight * (output - wanted) ** 2).flatten(1).mean(1).mean()


@pytest.mark.parametrize("precondition", [False, True])
@pytest.mark.parametrize("scheme", flow.SCHEMES)
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_loss_and_gradients_are_those_of_diffusers(monkeypatch, scheme, precondition, shift):
    batch, transformer = some_batch(), tiny_transformer()
    ours = our_loss(transformer, batch, "--weighting_scheme", scheme, f"--precondition_outputs={int(precondition)}",
                    "--flow_schedule_shift", shift)
    ours.backward()
    gradients = {name: p.grad.clone() for name, p in transformer.named_parameters() if p.grad is not None}
    transformer.zero_grad(set_to_none=True)
    u = density_of_diffusers(monkeypatch, batch["timestep_draw"], scheme, 0.0, 1.0, 1.29)
    theirs = loss_of_diffusers(transformer, batch, u, scheme, precondition, shift)
    theirs.backward()
    scale = max(1.0, theirs.item())
    assert abs(ours - theirs).item() < 1e-6 * scale
    for name, parameter in transformer.named_parameters():
        assert (name in gradients) == (parameter.grad is not None)
        if name in gradients:
            off, most = (gradients[name] - parameter.grad).abs().max().item(), parameter.grad.abs().max().item()
            assert off < 1e-6 * max(1.0, most), name


def test_each_flag_of_the_objective_changes_the_loss():
    batch, transformer = some_batch(), tiny_transformer()
    plain = our_loss(transformer, batch).item()
    changes = [("--weighting_scheme", "none"), ("--weighting_scheme", "sigma_sqrt"), ("--weighting_scheme", "mode"),
               ("--weighting_scheme", "cosmap"), ("--logit_mean", 1), ("--logit_std", 0.5), ("--precondition_outputs",),
               ("--weighting_scheme", "mode", "--mode_scale", 0.5), ("--flow_schedule_shift", 1), ("--training_shift", 2),
               ("--flow_schedule_auto_shift",), ("--flow_use_beta_schedule",), ("--noise_offset", 0.1)]
    losses = [our_loss(transformer, batch, *flags).item() for flags in changes]
    assert len({plain, *losses}) == 1 + len(changes)
    even = our_loss(transformer, batch, "--flow_use_uniform_schedule").item()
    assert even == our_loss(transformer, batch, "--weighting_scheme", "none").item()


def test_the_automatic_shift_is_that_of_the_batchs_size():
    batch, transformer = some_batch(), tiny_transformer()
    shift = math.exp(0.5 + 0.65 / 3840 * (6 * 4 - 256))
    assert our_loss(transformer, batch, "--flow_schedule_auto_shift").item() == pytest.approx(
        our_loss(transformer, batch, "--flow_schedule_shift", shift).item(), rel=1e-6)


def test_weights_and_masks_are_of_each_sample():
    """Of a batch, the loss is the mean of those of its samples, each with its own level: kohya's is not."""
    batch, transformer = some_batch(), tiny_transformer()
    batch["loss_weight"] = torch.tensor([1.0, 0.5, 2.0, 0.0, 1.0])
    batch["loss_mask"] = (torch.rand(5, 1, 12, 8, generator=torch.Generator().manual_seed(9)) > 0.3).float()
    for flags in (("--weighting_scheme", "sigma_sqrt"), ("--weighting_scheme", "cosmap", "--masked_loss_area", "mask")):
        each = [our_loss(transformer, {name: values[row:row + 1] for name, values in batch.items()}, *flags).item()
                for row in range(5)]
        assert our_loss(transformer, batch, *flags).item() == pytest.approx(np.mean(each), rel=1e-5) and each[3] == 0
    bare = {name: values for name, values in batch.items() if name != "loss_mask"}
    assert our_loss(transformer, bare).item() != our_loss(transformer, batch).item()


def test_the_transformer_is_asked_in_thousandths_and_float32():
    asked = {}
    def transformer(**given):
        asked.update(given)
        return SimpleNamespace(sample=torch.zeros_like(given["hidden_states"]))
    batch = some_batch()
    our_loss(transformer, batch, "--flow_use_uniform_schedule", "--flow_schedule_shift", 1)
    level = (1000 - (batch["timestep_draw"] * 1000).floor())
    assert asked["timestep"].dtype == torch.float32 and torch.allclose(asked["timestep"], level, rtol=1e-6)

"""The pieces of the loss against diffusers' own functions, and against closed forms."""

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from diffusers.schedulers.scheduling_ddpm import rescale_zero_terminal_snr
from diffusers.training_utils import compute_snr

from library.data import draws
from library.diffusion import ddpm
from library.errors import UserError
from library.models import sdxl

T, GRID = 1000, 2**24    # a float32 in [0, 1) drawn by NumPy is a multiple of 1 / GRID
EVERY = torch.arange(T)


def scheduler(**changes) -> DDPMScheduler:
    """SDXL's."""
    return DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", **changes)


def zero_snr() -> DDPMScheduler:
    return scheduler(rescale_betas_zero_snr=True, timestep_spacing="trailing", prediction_type="v_prediction")


def pair(number: int) -> tuple[torch.Tensor, torch.Tensor]:
    made = torch.Generator().manual_seed(number)
    return torch.randn(T, 2, 2, 3, generator=made), torch.randn(T, 2, 2, 3, generator=made)


def weights_of_diffusers(strategy, multiplier, begin, end, portion) -> torch.Tensor:
    """`generate_timestep_weights` of train_text_to_image_sdxl.py, as peers/diffusers.md describes it."""
    weights = torch.ones(T)
    count = int(portion * T)
    biased = {"later": slice(-count, None), "earlier": slice(0, count), "range": slice(begin, end)}
    if strategy != "none":
        weights[biased[strategy]] *= multiplier
    return weights / weights.sum()


@pytest.mark.parametrize("schedule", [scheduler(), zero_snr()], ids=["sdxl", "zero snr"])
def test_noising_and_targets_are_those_of_diffusers(schedule):
    latents, noise = pair(0)
    abar = schedule.alphas_cumprod
    assert torch.equal(ddpm.add_noise(latents, noise, EVERY, abar), schedule.add_noise(latents, noise, EVERY))
    assert torch.equal(ddpm.target("v_prediction", latents, noise, EVERY, abar), schedule.get_velocity(latents, noise, EVERY))
    assert ddpm.target("epsilon", latents, noise, EVERY, abar) is noise


def test_targets_answer_for_the_noisy_latents():
    """x0 and noise come back out of (x_t, v) by Salimans & Ho's x0 = alpha x_t - sigma v, noise = sigma x_t + alpha v."""
    latents, noise = (values.double() for values in pair(1))
    abar = scheduler().alphas_cumprod
    noisy = ddpm.add_noise(latents, noise, EVERY, abar)
    v = ddpm.target("v_prediction", latents, noise, EVERY, abar)
    signal, sigma = abar.double().sqrt()[:, None, None, None], (1 - abar.double()).sqrt()[:, None, None, None]
    torch.testing.assert_close(signal * noisy - sigma * v, latents, rtol=0, atol=1e-6)
    torch.testing.assert_close(sigma * noisy + signal * v, noise, rtol=0, atol=1e-6)


def test_a_prediction_type_that_cannot_be_trained_is_refused():
    with pytest.raises(ValueError, match="sample.*--prediction_type"):
        ddpm.target("sample", *pair(0), EVERY, scheduler().alphas_cumprod)


@pytest.mark.parametrize("gamma", [0.5, 1.0, 5.0, 20.0])
def test_min_snr_weights_are_those_of_diffusers(gamma):
    schedule = scheduler()
    snr = compute_snr(schedule, EVERY)
    clipped = torch.stack([snr, gamma * torch.ones_like(snr)], dim=1).min(dim=1)[0]
    abar = schedule.alphas_cumprod
    torch.testing.assert_close(ddpm.snr_table(abar), snr, rtol=1e-6, atol=0)
    torch.testing.assert_close(ddpm.min_snr_weight("epsilon", EVERY, abar, gamma), clipped / snr, rtol=1e-6, atol=0)
    torch.testing.assert_close(ddpm.min_snr_weight("v_prediction", EVERY, abar, gamma), clipped / (snr + 1), rtol=1e-6, atol=0)


def test_the_weights_are_picked_by_timestep():
    table = scheduler().alphas_cumprod
    chosen = torch.tensor([999, 0, 500, 0])
    for kind in ("epsilon", "v_prediction"):
        whole = ddpm.min_snr_weight(kind, EVERY, table, 5.0)
        assert torch.equal(ddpm.min_snr_weight(kind, chosen, table, 5.0), whole[chosen])


def test_zero_terminal_snr_is_that_of_the_paper(tiny_model):
    """Lin et al., algorithm 1, in float64; and diffusers' own."""
    base = sdxl.Base(tiny_model, tiny_model, None, (tiny_model, tiny_model), None)
    abar = sdxl.load_schedule(base, "v_prediction", True).alphas_cumprod
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, T, dtype=torch.float64) ** 2
    root = torch.cumprod(1 - betas, 0).sqrt()
    exact = ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2
    assert abar[-1] == 0 and abar.dtype == torch.float32
    torch.testing.assert_close(abar.double(), exact, rtol=2e-4, atol=1e-9)    # cumprod of 1000 float32 factors
    theirs = torch.cumprod(1 - rescale_zero_terminal_snr(scheduler().betas), 0)
    torch.testing.assert_close(abar, theirs, rtol=0, atol=0)
    plain = sdxl.load_schedule(base, None, False)
    assert torch.equal(plain.alphas_cumprod, scheduler().alphas_cumprod) and plain.config.prediction_type == "epsilon"


def test_zero_terminal_snr_of_a_model_that_predicts_noise_is_refused(tiny_model):
    base = sdxl.Base(tiny_model, tiny_model, None, (tiny_model, tiny_model), None)
    for prediction_type in ("epsilon", None):    # None: the base model's own, which is epsilon here
        with pytest.raises(UserError, match="--zero_terminal_snr needs --prediction_type v_prediction"):
            sdxl.load_schedule(base, prediction_type, True)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_pure_noise_gives_finite_losses_and_gradients(kind):
    abar = zero_snr().alphas_cumprod
    latents, noise = pair(2)
    last = torch.full((T,), T - 1)
    assert torch.equal(ddpm.add_noise(latents, noise, last, abar), noise)    # nothing of the image is left
    assert torch.equal(ddpm.target("v_prediction", latents, noise, last, abar), -latents)
    prediction = torch.zeros_like(latents, requires_grad=True)
    weight = ddpm.min_snr_weight(kind, EVERY, abar, 5.0)
    assert weight[-1] == (1 if kind == "epsilon" else 0)    # the limits of min(snr, g)/snr and min(snr, g)/(snr + 1) at 0
    loss = ddpm.mse_per_sample(prediction, ddpm.target(kind, latents, noise, EVERY, abar)) * weight
    loss.mean().backward()
    assert torch.isfinite(loss).all() and torch.isfinite(prediction.grad).all()


def test_mse_is_float32_and_per_sample():
    ours, wanted = torch.tensor([[[[1.0, 3.0]]], [[[0.0, 0.0]]]]).bfloat16(), torch.zeros(2, 1, 1, 2).half()
    loss = ddpm.mse_per_sample(ours, wanted)
    assert loss.dtype == torch.float32 and loss.tolist() == [5.0, 0.0]


@pytest.mark.parametrize("flags", [
    ("none", 3.0, 0, 1000, 0.25), ("later", 3.0, 0, 1000, 0.25), ("earlier", 0.5, 0, 1000, 0.4), ("range", 4.0, 200, 500, 0.25),
    ("range", 2.0, 0, 1000, 0.25), ("later", 2.0, 0, 1000, 1.0)], ids=str)
def test_timestep_bias_is_that_of_diffusers(flags):
    strategy, multiplier, begin, end, portion = flags
    ours = ddpm.timestep_bias(strategy, T, multiplier, begin, end, portion)
    torch.testing.assert_close(ours, weights_of_diffusers(*flags), rtol=1e-6, atol=0)
    assert ours.sum().item() == pytest.approx(1, abs=1e-6)
    favoured = {"later": range(T - int(portion * T), T), "earlier": range(int(portion * T)), "range": range(begin, end)}
    if strategy != "none":    # a closed form: multiplier / (favoured x multiplier + others)
        count = len(favoured[strategy])
        for t in (favoured[strategy][0], favoured[strategy][-1]):
            assert ours[t].item() == pytest.approx(multiplier / (count * multiplier + T - count), rel=1e-5)


def test_a_share_of_nothing_favours_nothing():
    """diffusers' slice(-0, None) would be all of them: the same distribution, by luck."""
    for strategy in ("later", "earlier"):
        assert torch.equal(ddpm.timestep_bias(strategy, T, 9.0, 0, T, 0.0005), torch.full((T,), 1 / T))


@pytest.mark.parametrize(("begin", "end"), [(500, 500), (600, 200), (0, 1001), (1000, 1001)])
def test_a_range_without_timesteps_is_refused(begin, end):
    with pytest.raises(UserError, match=f"--timestep_bias_begin {begin} and --timestep_bias_end {end}"):
        ddpm.timestep_bias("range", T, 2.0, begin, end, 0.25)


@pytest.mark.parametrize("flags", [("none", 1.0, 0, T, 0.25), ("later", 7.0, 0, T, 0.1), ("range", 0.01, 300, 301, 0.25)],
                         ids=str)
def test_every_number_that_can_be_drawn_gives_exactly_the_distribution(flags):
    """All 2^24 numbers: each timestep's share of them is its probability, to the rounding of its two borders."""
    strategy, *rest = flags
    probability = ddpm.timestep_bias(strategy, T, *rest)
    cdf = ddpm.cumulative(probability)
    counts = torch.zeros(T, dtype=torch.int64)
    for start in range(0, GRID, GRID // 8):
        numbers = torch.arange(start, start + GRID // 8).float() / GRID
        counts += torch.bincount(ddpm.draw_timesteps(numbers, cdf), minlength=T)
    assert counts.sum() == GRID
    off = (counts.double() - GRID * probability.double()).abs()
    assert off.max() <= 3, f"timestep {off.argmax()} is off by {off.max()} of {GRID} numbers"


def test_timesteps_begin_where_their_share_begins():
    cdf = ddpm.cumulative(torch.tensor([0.25, 0.5, 0.25]))
    numbers = torch.tensor([0, 0.2499, 0.25, 0.7499, 0.75, 1 - 2**-24])
    assert ddpm.draw_timesteps(numbers, cdf).tolist() == [0, 0, 1, 1, 2, 2]
    short = ddpm.cumulative(torch.full((T,), 1 / T)) * (1 - 1e-6)    # rounding may leave the last border below 1
    assert ddpm.draw_timesteps(torch.tensor([1 - 2**-24]), short).item() == T - 1


@pytest.mark.parametrize("flags", [("none", 1.0, 0, T, 0.25), ("later", 5.0, 0, T, 0.2)], ids=str)
def test_the_loaders_draws_follow_the_distribution(flags):
    """Chi-square over 100 bins of 40,000 samples' own draws: below the 99.99% point of 99 degrees of freedom."""
    strategy, *rest = flags
    probability = ddpm.timestep_bias(strategy, T, *rest)
    numbers = np.array([draws.generator(3, row, visit, draws.TIMESTEP).random(dtype=np.float32)
                        for row in range(200) for visit in range(200)])
    drawn = ddpm.draw_timesteps(torch.from_numpy(numbers), ddpm.cumulative(probability))
    seen = torch.bincount(drawn, minlength=T).view(100, 10).sum(1).double()
    wanted = probability.double().view(100, 10).sum(1) * len(numbers)
    assert ((seen - wanted) ** 2 / wanted).sum() < 160


def test_noise_offset_shifts_each_channel_of_noise_and_target():
    """T of diffusers: noise += offset * randn(B, C, 1, 1); the shifted noise is the target, too."""
    noise, offset = torch.randn(3, 4, 5, 6), torch.randn(3, 4, 1, 1)
    shifted = ddpm.offset_noise(noise, offset, 0.1)
    wanted = noise.clone()
    wanted += 0.1 * offset
    assert torch.equal(shifted, wanted)
    assert ddpm.offset_noise(noise, offset, 0.0) is noise


def test_a_mask_weighs_the_loss_of_each_pixel():
    draw = torch.Generator().manual_seed(0)
    prediction, wanted = torch.randn(3, 4, 6, 5, generator=draw), torch.randn(3, 4, 6, 5, generator=draw)
    mask = torch.zeros(3, 1, 6, 5)
    mask[0, :, :2], mask[1] = 0.5, 1.0    # a soft part, everything, nothing
    squares = (prediction - wanted) ** 2
    whole = ddpm.mse_per_sample(prediction, wanted, mask, "image")
    torch.testing.assert_close(whole, torch.stack([squares[0, :, :2].sum() * 0.5 / 120, squares[1].mean(), torch.tensor(0.0)]))
    inside = ddpm.mse_per_sample(prediction, wanted, mask, "mask")
    torch.testing.assert_close(inside, torch.stack([squares[0, :, :2].mean(), squares[1].mean(), torch.tensor(0.0)]))
    assert ddpm.mse_per_sample(prediction, wanted, torch.ones(3, 1, 6, 5)).equal(ddpm.mse_per_sample(prediction, wanted))
    prediction.requires_grad_()
    ddpm.mse_per_sample(prediction, wanted, mask, "mask").sum().backward()
    assert prediction.grad[0, :, 2:].abs().max() == 0 == prediction.grad[2].abs().max()
    assert prediction.grad[0, :, :2].abs().min() > 0
    assert prediction.grad.isfinite().all()

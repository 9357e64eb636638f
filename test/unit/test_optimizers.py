"""Optimizers and learning rates against the libraries they come from."""

import json
import math

import pytest
import torch
import transformers
from bitsandbytes.optim import AdamW8bit
from diffusers.optimization import get_scheduler
from transformers.optimization import Adafactor

from library.errors import UserError
from library.training import optimizers

STEPS = 40
GIVEN = {"lr": 3e-3, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.2}
FLAGS = ("--learning_rate", 3e-3, "--adam_beta1", 0.8, "--adam_beta2", 0.95, "--adam_epsilon", 1e-6, "--adam_weight_decay", 0.2)


def network(seed: int = 0) -> torch.nn.Module:
    torch.manual_seed(seed)
    return torch.nn.Sequential(torch.nn.Linear(96, 96), torch.nn.Tanh(), torch.nn.Linear(96, 2))    # 8-bit from 4096 values


def descend(net: torch.nn.Module, optimizer, steps: int = 10) -> list[torch.Tensor]:
    for step in range(steps):
        draw = torch.Generator().manual_seed(step)
        net(torch.randn(16, 96, generator=draw)).pow(2).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return [p.detach().clone() for p in net.parameters()]


def ours(parse, *flags) -> tuple:
    net = network()
    return net, optimizers.make_optimizer(parse(*FLAGS, *flags), {"unet": net}, 4, "cpu")


@pytest.mark.parametrize("name", ["adamw", "adamw_fused"])
def test_adamw_is_torchs(parse, name):
    net, optimizer = ours(parse, "--optimizer", name)
    assert optimizer.param_groups[0]["fused"] is True
    plain = network()
    wanted = descend(plain, torch.optim.AdamW(plain.parameters(), **GIVEN, foreach=False, fused=False))
    for mine, theirs in zip(descend(net, optimizer), wanted, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)
    assert not torch.equal(wanted[0], network()[0].weight)


@pytest.mark.parametrize("flags", [("--optimizer", "adamw_8bit"), ("--use_8bit_adam",), ("--optimizer", "AdamW8bit")], ids=str)
def test_8_bit_adam_is_bitsandbytes_and_runs_on_a_cpu(parse, flags):
    net, optimizer = ours(parse, *flags)
    assert type(optimizer) is AdamW8bit
    plain = network()
    wanted = descend(plain, AdamW8bit(plain.parameters(), **GIVEN))
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(descend(net, optimizer), wanted, strict=True))
    large = optimizer.state[net[0].weight]
    assert large["state1"].dtype == large["state2"].dtype == torch.uint8
    exact = network()
    full = descend(exact, torch.optim.AdamW(exact.parameters(), **GIVEN))
    moved = (full[0] - network()[0].weight).abs().mean()
    assert 0 < (wanted[0] - full[0]).abs().mean() < 0.2 * moved    # rounded, not another optimizer


def test_adafactor_is_transformers_with_the_rate_as_given(parse):
    net, optimizer = ours(parse, "--optimizer", "AdaFactor")
    assert type(optimizer) is Adafactor
    plain = network()
    wanted = descend(plain, Adafactor(plain.parameters(), lr=3e-3, scale_parameter=False, relative_step=False,
                                      warmup_init=False, weight_decay=0.2))
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(descend(net, optimizer), wanted, strict=True))
    start = network()[0].weight.detach()
    whole, half = (descend(*ours(parse, "--optimizer", "adafactor", "--learning_rate", rate), 1)[0] - start
                   for rate in (2e-3, 1e-3))
    torch.testing.assert_close(2 * half, whole, rtol=1e-3, atol=1e-6)    # no step size of its own


def test_each_network_has_its_rate(parse):
    nets = {name: network(seed) for seed, name in enumerate(("unet", "text_encoder", "text_encoder_2"))}
    nets["unet"][0].bias.requires_grad_(False)

    def groups(*flags):
        made = optimizers.make_optimizer(parse(*FLAGS, "--train_text_encoder", *flags), nets, 6, "cpu").param_groups
        return [group["lr"] for group in made], [len(group["params"]) for group in made]

    assert groups() == ([3e-3, 3e-3, 3e-3], [3, 4, 4])    # what is frozen is left out
    assert groups("--learning_rate_te1", 1e-5, "--learning_rate_te2", 0)[0] == [3e-3, 1e-5, 0]
    assert groups("--learning_rate_te2", 2e-5)[0] == [3e-3, 3e-3, 2e-5]
    assert groups("--learning_rate_te1", 1e-5, "--scale_lr")[0] == pytest.approx([18e-3, 6e-5, 18e-3])


@pytest.mark.parametrize(("flags", "device", "words"), [
    (("--optimizer", "adamw_fused"), "npu", "--optimizer adamw_fused.*npu.*use adamw"),
    (("--optimizer", "adamw_8bit"), "mps", "--optimizer adamw_8bit.*mps.*use adamw or adafactor"),
    (("--use_8bit_adam",), "npu", "--optimizer adamw_8bit.*npu")], ids=str)
def test_what_a_device_cannot_run_is_refused(parse, flags, device, words):
    with pytest.raises(UserError, match=words):
        optimizers.check_optimizer(parse(*flags), device)
    optimizers.check_optimizer(parse(*flags), "cuda")
    optimizers.check_optimizer(parse(*flags), "cpu")


def test_8_bit_adam_without_bitsandbytes_is_refused(parse, monkeypatch):
    monkeypatch.setattr(optimizers.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="--use_8bit_adam.*pip install bitsandbytes"):
        optimizers.check_optimizer(parse("--use_8bit_adam"), "cuda")


def curve(make) -> list[float]:
    """The rate of each of STEPS optimizer steps and of one more."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=2.0)
    schedule, rates = make(optimizer), []
    for _ in range(STEPS + 1):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return rates


def ours_over(parse, *flags) -> list[float]:
    return curve(lambda optimizer: optimizers.make_lr_schedule(parse(*flags), optimizer, STEPS))


@pytest.mark.parametrize(("flags", "given"), [
    (("linear", "--lr_warmup_steps", 5), {"num_warmup_steps": 5}),
    (("cosine", "--lr_warmup_steps", 5), {"num_warmup_steps": 5}),
    (("cosine_with_restarts", "--lr_warmup_steps", 4, "--lr_num_cycles", 3), {"num_warmup_steps": 4, "num_cycles": 3}),
    (("polynomial", "--lr_warmup_steps", 4, "--lr_power", 2.5), {"num_warmup_steps": 4, "power": 2.5}),
    (("constant", "--lr_warmup_steps", 7), {}),
    (("constant_with_warmup", "--lr_warmup_steps", 7), {"num_warmup_steps": 7}),
    (("piecewise_constant", "--lr_step_rules", "1:10,0.1:20,0.01"), {"step_rules": "1:10,0.1:20,0.01"})], ids=str)
def test_schedules_of_diffusers(parse, flags, given):
    wanted = curve(lambda optimizer: get_scheduler(flags[0], optimizer, num_training_steps=STEPS, **given))
    assert ours_over(parse, "--lr_scheduler", *flags) == wanted


@pytest.mark.parametrize(("flags", "warmup", "given"), [
    (("inverse_sqrt", "--lr_warmup_steps", 5, "--lr_scheduler_timescale", 9), 5, {"timescale": 9}),
    (("inverse_sqrt", "--lr_warmup_steps", 5), 5, {}),
    (("cosine_with_min_lr", "--lr_warmup_steps", 5, "--lr_scheduler_min_lr_ratio", 0.2), 5, {"min_lr_rate": 0.2}),
    (("warmup_stable_decay", "--lr_warmup_steps", 5, "--lr_decay_steps", 10, "--lr_scheduler_min_lr_ratio", 0.1), 5,
     {"num_decay_steps": 10, "min_lr_ratio": 0.1})], ids=str)
def test_schedules_of_transformers(parse, flags, warmup, given):
    wanted = curve(lambda optimizer: transformers.get_scheduler(flags[0], optimizer, num_warmup_steps=warmup,
                                                                num_training_steps=STEPS, scheduler_specific_kwargs=given))
    assert ours_over(parse, "--lr_scheduler", *flags) == wanted


def test_schedules_in_closed_form(parse):
    """What the two libraries agree on could still be handed the wrong numbers."""
    cosine = ours_over(parse, "--lr_scheduler", "cosine", "--lr_warmup_steps", 10)
    assert cosine[:11] == pytest.approx([0.2 * step for step in range(11)])
    assert cosine[10:] == pytest.approx([1 + math.cos(math.pi * step / 30) for step in range(31)], abs=1e-12)
    least = ours_over(parse, "--lr_scheduler", "cosine_with_min_lr", "--lr_warmup_steps", 0, "--lr_scheduler_min_lr_ratio", 0.25)
    assert (least[0], least[20], least[40]) == pytest.approx((2, 1.25, 0.5))
    stable = ours_over(parse, "--lr_scheduler", "warmup_stable_decay", "--lr_warmup_steps", 0.25, "--lr_decay_steps", 0.5)
    assert stable[:11] == pytest.approx([0.2 * step for step in range(11)])
    assert stable[10:21] == [2] * 11 and stable[30] == pytest.approx(1) and stable[40] == 0
    assert ours_over(parse, "--lr_scheduler", "polynomial", "--lr_warmup_steps", 0)[20] == pytest.approx(1, abs=1e-6)


def test_a_warmup_below_one_is_a_share(parse):
    for name in ("linear", "cosine", "constant_with_warmup", "inverse_sqrt"):
        share = ours_over(parse, "--lr_scheduler", name, "--lr_warmup_steps", 0.2)
        assert share == ours_over(parse, "--lr_scheduler", name, "--lr_warmup_steps", 8) and share[8] == 2
        assert share != ours_over(parse, "--lr_scheduler", name, "--lr_warmup_steps", 9)


def test_a_warmup_longer_than_the_run_is_said(parse, capsys):
    def say(*flags):
        args = parse("--lr_warmup_steps", STEPS + 1, *flags)
        optimizers.make_lr_schedule(args, torch.optim.AdamW(network().parameters()), STEPS)
        return capsys.readouterr().out

    assert "--lr_warmup_steps 41 is longer than the 40 steps" in say("--lr_scheduler", "cosine")
    assert say("--lr_scheduler", "constant") == ""
    assert say("--lr_scheduler", "cosine", "--lr_warmup_steps", STEPS) == ""


@pytest.mark.parametrize(("flags", "words"), [
    (("piecewise_constant",), "--lr_scheduler piecewise_constant needs --lr_step_rules"),
    (("piecewise_constant", "--lr_step_rules", "1-10"), "--lr_step_rules '1-10' is not like"),
    (("warmup_stable_decay", "--lr_warmup_steps", 30, "--lr_decay_steps", 20),
     "--lr_warmup_steps 30 and --lr_decay_steps 20 exceed the 40 steps")], ids=str)
def test_schedules_that_do_not_fit_are_refused(parse, flags, words):
    with pytest.raises(UserError, match=words):
        ours_over(parse, "--lr_scheduler", *flags)


def test_the_schedule_counts_optimizer_steps_whatever_the_accumulation(train, tmp_path):
    """D7. diffusers' script: cosine over 100 steps at accumulation 4 peaks at step 40 instead of 10 and never comes down."""
    flags = ("--lr_scheduler", "cosine", "--lr_warmup_steps", 2, "--max_train_steps", 6, "--learning_rate", 1e-3)
    rates = {}
    for batch, accumulation in ((3, 1), (1, 3)):
        out = train("--train_batch_size", batch, "--gradient_accumulation_steps", accumulation, "--output_dir",
                    tmp_path / str(accumulation), *flags)
        rates[accumulation] = [json.loads(line)["lr"] for line in (out / "metrics.jsonl").open()]
        state = torch.load(out / "checkpoint-6" / "training_state.pt")
        assert state["lr_schedule"]["last_epoch"] == 6 and state["optimizer"]["param_groups"][0]["lr"] == 0
    wanted = [1e-3 * (step / 2 if step < 2 else (1 + math.cos(math.pi * (step - 2) / 4)) / 2) for step in range(6)]
    assert rates[1] == rates[3] == pytest.approx(wanted)

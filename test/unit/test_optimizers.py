"""Optimizers and learning rates against the libraries they come from."""

import copy
import importlib
import inspect
import io
import json
import math
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from bitsandbytes.optim import AdamW8bit
from diffusers.optimization import get_scheduler
from transformers.optimization import Adafactor

from library import dialects
from library import flags as declared
from library.errors import UserError
from library.training import optimizers

STEPS = 40
GIVEN = {"lr": 3e-3, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.2}
FLAGS = ("--learning_rate", 3e-3, "--adam_beta1", 0.8, "--adam_beta2", 0.95, "--adam_epsilon", 1e-6, "--adam_weight_decay", 0.2)
TABLE = optimizers.TABLE
COMPILED = [name for name in TABLE if name.startswith("ao-")]    # each compiles for ten seconds: one test, below
HERE = [name for name, entry in TABLE.items() if "cpu" in entry.devices and name not in COMPILED]
PRECISIONS = [(name, torch.float32) for name in HERE] + [(name, torch.bfloat16) for name in HERE if TABLE[name].bf16]
# Learning rates at which the small regression below is learned in 60 steps.
RATES = dict.fromkeys(TABLE, 3e-3) | {name: 1.0 for name in TABLE if name.startswith(("prodigy", "dadapt"))} | {
    "sgd": 0.05, "optimi-sgd": 0.05, "bnb-sgd": 0.05, "bnb-sgd8bit": 0.05, "sgd-schedulefree": 0.05, "bnb-adagrad": 0.05,
    "bnb-adagrad8bit": 0.05, "radam-schedulefree": 0.03, "muon": 0.01, "optimi-ranger": 0.01}


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
    (("--optimizer", "adamw_8bit"), "mps", "--optimizer adamw_8bit does not run on mps.*use adamw, adafactor or flashadamw"),
    (("--use_8bit_adam",), "npu", "--optimizer adamw_8bit .--use_8bit_adam. does not run on npu"),
    (("--optimizer", "soap"), "mps", "--optimizer soap does not run on mps, only on cuda, xpu, cpu"),
    (("--optimizer", "ao-adamw4bit"), "npu", "--optimizer ao-adamw4bit does not run on npu")], ids=str)
def test_what_a_device_cannot_run_is_refused(parse, flags, device, words):
    with pytest.raises(UserError, match=words):
        optimizers.check_optimizer(parse(*flags), device)
    optimizers.check_optimizer(parse(*flags), "cuda")
    optimizers.check_optimizer(parse(*flags), "cpu")


@pytest.mark.parametrize("name", [name for name in TABLE if "cpu" not in TABLE[name].devices])
def test_what_needs_a_gpu_is_refused_on_a_cpu(parse, name):
    """bitsandbytes has no fallback for its paged AdEMAMix."""
    with pytest.raises(UserError, match=f"--optimizer {name} does not run on cpu, only on cuda, xpu; use {name[:-6]}"):
        optimizers.check_optimizer(parse("--optimizer", name), "cpu")
    optimizers.check_optimizer(parse("--optimizer", name), "cuda")


@pytest.mark.parametrize(("flags", "package"), [
    (("--use_8bit_adam",), "bitsandbytes"), (("--optimizer", "optimi-adan"), "torch-optimi"),
    (("--optimizer", "adamw_bf16"), "torch-optimi"), (("--optimizer", "prodigy"), "pytorch-optimizer"),
    (("--optimizer", "ao-adamw8bit"), "torchao")], ids=str)
def test_a_library_that_is_not_installed_is_named(parse, monkeypatch, flags, package):
    monkeypatch.setattr(optimizers.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=f"{flags[0]}.* needs .*: pip install {package}$"):
        optimizers.check_optimizer(parse(*flags), "cuda")
    optimizers.check_optimizer(parse("--optimizer", "adamw"), "cuda")
    optimizers.check_optimizer(parse("--optimizer", "adafactor"), "cuda")


def test_compiled_ones_need_a_compiler(parse, monkeypatch):
    optimizers.check_optimizer(parse("--optimizer", "ao-adamw8bit"), "cpu")
    monkeypatch.setattr(optimizers.shutil, "which", lambda name: None)
    with pytest.raises(UserError, match="--optimizer ao-adamw8bit is compiled .* no C.. compiler: install g.."):
        optimizers.check_optimizer(parse("--optimizer", "ao-adamw8bit"), "cpu")


# the table

def chosen(name: str, rate: float | None = None, *keywords: str, **given) -> SimpleNamespace:
    """Arguments that an optimizer is made from, without a whole command line."""
    return SimpleNamespace(**{
        "optimizer": name, "use_8bit_adam": False, "learning_rate": RATES[name] if rate is None else rate, "scale_lr": False,
        "learning_rate_te1": None, "learning_rate_te2": None, "train_text_encoder": False, "lr_scheduler": "constant",
        "optimizer_args": list(keywords), "adam_beta1": None, "adam_beta2": None, "adam_epsilon": None,
        "adam_weight_decay": None} | given)


def regress(net: torch.nn.Module, optimizer, steps: range, schedule=None) -> list[float]:
    """Losses of a small regression, before each step."""
    draw, dtype = torch.Generator().manual_seed(1), next(net.parameters()).dtype
    x = torch.randn(64, 96, generator=draw)
    x, y = x.to(dtype), (torch.sin(2 * x[:, :2]) + x[:, 2:4]).to(dtype)
    losses = []
    for step in steps:
        rows = slice(16 * (step % 4), 16 * (step % 4) + 16)
        loss = (net(x[rows]) - y[rows]).float().pow(2).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if schedule:
            schedule.step()
        losses.append(loss.item())
    return losses


def of_table(name: str, dtype=torch.float32, rate: float | None = None) -> tuple:
    net = network().to(torch.bfloat16).to(dtype)    # float32 starts where bfloat16 does
    return net, optimizers.make_optimizer(chosen(name, rate), {"unet": net}, 1, "cpu")


def nbytes(state) -> int:
    """Of all tensors in a state, but for bitsandbytes' and torchao's maps of 256 values, which all parameters share."""
    if isinstance(state, dict):
        return sum(nbytes(value) for name, value in state.items() if not str(name).startswith("qmap"))
    if isinstance(state, (list, tuple)):
        return sum(map(nbytes, state))
    if hasattr(state, "__tensor_flatten__") and type(state) is not torch.Tensor:    # torchao's
        return sum(getattr(state, part).nbytes for part in state.__tensor_flatten__()[0] if part != "qmap")
    return state.nbytes if isinstance(state, torch.Tensor) else 0


def test_the_table_and_the_flag_have_the_same_names():
    assert tuple(TABLE) == declared.OPTIMIZERS
    for name, entry in TABLE.items():
        module, kind = entry.path.rsplit(".", 1)
        taken = inspect.signature(getattr(importlib.import_module(module), kind)).parameters
        assert entry.own.keys() <= taken.keys() and set(entry.devices) <= set(optimizers.EVERY), name


@pytest.mark.parametrize("name", HERE)
def test_each_optimizer_lowers_the_loss(name):
    net, optimizer = of_table(name)
    losses = regress(net, optimizer, range(300 if name == "dadapt-adagrad" else 60))    # that one finds its rate slowly
    with optimizers.evaluated(optimizer):
        last = regress(net, torch.optim.SGD(net.parameters(), lr=0), range(4))
    assert sum(last) / 4 < 0.5 * losses[0], losses
    assert all(torch.isfinite(p).all() for p in net.parameters())


@pytest.mark.parametrize(("name", "dtype"), PRECISIONS, ids=str)
def test_bytes_of_state_are_those_of_the_table(name, dtype):
    layer = torch.nn.Linear(512, 512, bias=False, dtype=dtype)
    args = chosen(name)
    optimizer = optimizers.make_optimizer(args, {"unet": layer}, 1, "cpu")
    for _ in range(2):
        layer.weight.grad = torch.randn(512, 512).to(dtype)
        optimizer.step()
    promised = optimizers.state_bytes(args, dtype)
    assert nbytes(dict(optimizer.state)) / layer.weight.numel() == pytest.approx(promised, rel=0.02, abs=0.005)
    assert promised == (TABLE[name].state if dtype == torch.float32 else TABLE[name].bf16)


@pytest.mark.parametrize(("name", "dtype"), PRECISIONS, ids=str)
def test_a_reloaded_optimizer_goes_on_bit_by_bit(name, dtype):
    """Also what it keeps in its groups beside the settings: Prodigy's distance, a schedule-free one's sum of weights."""
    def made(net):
        optimizer = optimizers.make_optimizer(chosen(name), {"unet": net}, 1, "cpu")
        return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + 0.1 * step))

    whole = network().to(dtype)
    optimizer, schedule = made(whole)
    regress(whole, optimizer, range(12), schedule)
    kept = io.BytesIO()
    torch.save({"net": whole.state_dict(), "optimizer": optimizer.state_dict(), "schedule": schedule.state_dict()}, kept)
    regress(whole, optimizer, range(12, 15), schedule)

    kept.seek(0)
    state = torch.load(kept, weights_only=True)
    again = network(1).to(dtype)
    again.load_state_dict(state["net"])
    optimizer, schedule = made(again)
    optimizers.load_state(optimizer, state["optimizer"])
    schedule.load_state_dict(state["schedule"])
    for group, rate in zip(optimizer.param_groups, schedule.get_last_lr(), strict=True):
        group["lr"] = rate
    regress(again, optimizer, range(12, 15), schedule)
    for mine, theirs in zip(again.parameters(), whole.parameters(), strict=True):
        assert torch.equal(mine, theirs)
    assert not torch.equal(whole[0].weight, state["net"]["0.weight"])


def test_settings_of_a_reloaded_optimizer_are_those_of_the_new_run():
    net = network()
    old = optimizers.make_optimizer(chosen("prodigy", None, "d_coef=2", "weight_decay=0.1"), {"unet": net}, 1, "cpu")
    regress(net, old, range(12))
    new = optimizers.make_optimizer(chosen("prodigy", 0.5, adam_beta1=0.7), {"unet": net}, 1, "cpu")
    optimizers.load_state(SimpleNamespace(optimizer=new, load_state_dict=new.load_state_dict), old.state_dict())    # as wrapped
    was, now = old.param_groups[0], new.param_groups[0]
    assert (now["d_coef"], now["weight_decay"], now["betas"], now["lr"]) == (1.0, 0.0, (0.7, 0.999), 0.5)
    assert (now["d"], now["d_max"], now["step"]) == (was["d"], was["d_max"], was["step"]) and now["d"] > now["d0"]
    kahan = optimizers.make_optimizer(chosen("optimi-adamw"), {"unet": network()}, 1, "cpu")
    regress(network(), kahan, range(1))
    kahan.param_groups[0]["triton"] = "decided"    # what the flags leave open
    fresh = optimizers.make_optimizer(chosen("optimi-adamw", adam_beta2=0.9), {"unet": network()}, 1, "cpu")
    optimizers.load_state(fresh, kahan.state_dict())
    assert (fresh.param_groups[0]["triton"], fresh.param_groups[0]["beta2"]) == ("decided", 0.9)


def fall(name: str, dtype, kind=None) -> float:
    """By how much 100 steps at a rate below bfloat16's resolution lower the loss."""
    net, optimizer = of_table(name, dtype, 1e-4 if "sgd" in name else 1e-5) if kind is None else (network().to(dtype), None)
    losses = regress(net, optimizer or kind(net.parameters(), lr=1e-5), range(100))
    return sum(losses[:4]) - sum(losses[-4:])


def test_what_decides_where_a_step_lies_is_this_runs(monkeypatch):
    """torch puts a step beside its parameter for the fused kernel alone: a checkpoint may come from a device without it."""
    def made(fused):
        p = torch.nn.Parameter(torch.ones(2))
        p.grad = torch.ones(2)
        optimizer = torch.optim.AdamW([p], fused=fused)
        optimizer.step()
        return optimizer

    seen, policy = [], "_process_value_according_to_param_policy"
    original = getattr(torch.optim.Optimizer, policy)

    def placed(param, value, place, groups, key=None):
        seen.append(groups[0]["fused"])
        return original(param, value, place, groups, key)

    monkeypatch.setattr(torch.optim.Optimizer, policy, staticmethod(placed))
    for own in (True, False):
        new = made(own)
        optimizers.load_state(SimpleNamespace(optimizer=new, load_state_dict=new.load_state_dict), made(not own).state_dict())
        assert set(seen) == {own} and new.param_groups[0]["fused"] == own
        seen.clear()


@pytest.mark.parametrize("name", [name for name in HERE if TABLE[name].bf16])
def test_bfloat16_weights_learn_as_float32_ones_do(name):
    assert fall(name, torch.bfloat16) == pytest.approx(fall(name, torch.float32), rel=0.2)


def test_plain_adamw_is_stuck_in_bfloat16_and_refused():
    assert fall("adamw", torch.bfloat16, torch.optim.AdamW) < 0.2 * fall("adamw", torch.float32)
    for name in (name for name in TABLE if not TABLE[name].bf16):
        assert not optimizers.compensates(chosen(name))
        with pytest.raises(UserError, match=f"--optimizer {name} .* rounding of torch.bfloat16 weights: .*adamw_bf16"):
            optimizers.make_optimizer(chosen(name), {"unet": network().bfloat16()}, 1, "cpu")
    assert optimizers.compensates(chosen("adamw_bf16"))
    with pytest.raises(UserError, match="torch.float16"):
        optimizers.make_optimizer(chosen("adamw_bf16"), {"unet": network().half()}, 1, "cpu")


def test_adamw_bf16_has_adamws_settings(capsys):
    nets = network(), network()
    ours = optimizers.make_optimizer(chosen("adamw_bf16"), {"unet": nets[0]}, 1, "cpu")
    assert "the trained weights are float32" in capsys.readouterr().out
    regress(nets[0], ours, range(10))
    regress(nets[1], torch.optim.AdamW(nets[1].parameters(), lr=3e-3), range(10))
    for mine, theirs in zip(nets[0].parameters(), nets[1].parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", HERE)
def test_a_rate_of_zero_moves_nothing(name):
    """So begins every warm-up; the steps after it are finite."""
    net, optimizer = of_table(name)
    start = copy.deepcopy(net.state_dict())
    rates = [group["lr"] for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    regress(net, optimizer, range(2))
    assert all(torch.equal(value, start[key]) for key, value in net.state_dict().items())
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    assert all(map(math.isfinite, regress(net, optimizer, range(2, 6))))


@pytest.mark.parametrize("name", ["ao-adamw8bit"])
def test_a_compiled_optimizer(name):
    """Its rate follows the schedule as a number, and its state is kept in 8 bits through a checkpoint."""
    def made(net):
        optimizer = optimizers.make_optimizer(chosen(name), {"unet": net}, 1, "cpu")
        return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))

    net = torch.nn.Linear(96, 96), torch.nn.Linear(96, 96)
    net[1].load_state_dict(net[0].state_dict())
    optimizer, schedule = made(net[0])
    for step in range(4):
        if step == 2:
            kept = io.BytesIO()
            torch.save({"optimizer": optimizer.state_dict(), "net": net[0].state_dict()}, kept)
            last = schedule.state_dict()
        net[0].weight.grad = torch.full((96, 96), 0.1 + step)
        optimizer.step()
        schedule.step()
        assert optimizer.param_groups[0]["lr"] == schedule.get_last_lr()[0] == 3e-3 / (2 + step)
    assert nbytes(optimizer.state[net[0].weight]) / 96 ** 2 == pytest.approx(TABLE[name].state, rel=0.02)

    kept.seek(0)
    state = torch.load(kept, weights_only=True)
    net[1].load_state_dict(state["net"])
    optimizer, schedule = made(net[1])
    optimizers.load_state(optimizer, state["optimizer"])
    schedule.load_state_dict(last)
    optimizer.param_groups[0]["lr"] = schedule.get_last_lr()[0]
    for step in (2, 3):
        net[1].weight.grad = torch.full((96, 96), 0.1 + step)
        optimizer.step()
        schedule.step()
    assert torch.equal(net[0].weight, net[1].weight) and not torch.equal(net[0].weight, state["net"]["weight"])


# keywords and spellings

@pytest.mark.parametrize(("given", "name"), [
    ("AdamW8bit", "adamw_8bit"), ("PagedAdamW", "bnb-adamw-paged"), ("PagedAdamW8bit", "bnb-adamw8bit-paged"),
    ("PagedAdamW32bit", "bnb-adamw-paged"), ("Lion", "lion"), ("Lion8bit", "bnb-lion8bit"),
    ("PagedLion8bit", "bnb-lion8bit-paged"), ("AdEMAMix8bit", "bnb-ademamix8bit"), ("SGDNesterov", "sgd"),
    ("PagedAdEMAMix8bit", "bnb-ademamix8bit-paged"), ("SGDNesterov8bit", "bnb-sgd8bit"), ("DAdaptation", "dadapt-adam"),
    ("DAdaptAdam", "dadapt-adam"), ("DAdaptLion", "dadapt-lion"), ("DAdaptSGD", "dadapt-sgd"), ("AdaFactor", "adafactor"),
    ("DAdaptAdaGrad", "dadapt-adagrad"), ("DAdaptAdan", "dadapt-adan"), ("Prodigy", "prodigy"), ("CAME", "came"),
    ("AdamWScheduleFree", "adamw-schedulefree"), ("RAdamScheduleFree", "radam-schedulefree"),
    ("SGDScheduleFree", "sgd-schedulefree"), ("torch.optim.AdamW", "adamw"), ("torch-adamw", "adamw"),
    ("adamw_schedulefree", "adamw-schedulefree"), ("bnb-adamw8bit", "adamw_8bit"),
    *((name, name) for name in declared.OPTIMIZERS)])
def test_kohyas_and_simpletuners_spellings(parse, given, name):
    assert parse("--optimizer_type", given).optimizer == name
    assert set(dialects.VALUES["optimizer"].values()) <= set(declared.OPTIMIZERS)


@pytest.mark.parametrize(("flags", "name", "wanted"), [
    (("--optimizer", "Prodigy", "--optimizer_args", "decouple=True", "weight_decay=0.01", "d_coef=2", "use_bias_correction=True",
      "safeguard_warmup=True", "betas=0.9,0.99"), "prodigy",
     {"weight_decouple": True, "weight_decay": 0.01, "d_coef": 2, "bias_correction": True, "safeguard_warmup": True,
      "betas": (0.9, 0.99)}),
    (("--optimizer", "adafactor", "--optimizer_args", "scale_parameter=False", "relative_step=false", "warmup_init=False"),
     "adafactor", {"scale_parameter": False, "relative_step": False, "warmup_init": False, "weight_decay": 1e-2}),
    (("--optimizer", "optimi-stableadamw", "--optimizer_config", "weight_decay=0.1,eps=1e-7,max_lr=none"), "optimi-stableadamw",
     {"weight_decay": 0.1, "eps": 1e-7, "max_lr": None}),
    (("--optimizer", "adamw", "--optimizer_config=betas=(0.8,0.9),eps=1e-7"), "adamw", {"betas": (0.8, 0.9), "eps": 1e-7}),
    (("--optimizer", "sgd", "--optimizer_args", "momentum=0.5", "nesterov=False"), "sgd", {"momentum": 0.5, "nesterov": False}),
    (("--optimizer", "optimi-adan", "--adam_beta1", 0.5), "optimi-adan", {"beta1": 0.5, "beta2": 0.92, "beta3": 0.99}),
    (("--optimizer", "bnb-lion8bit", "--adam_beta2", 0.5), "bnb-lion8bit", {"betas": (0.9, 0.5), "weight_decay": 0}),
    (("--optimizer", "dadapt-adam", "--optimizer_args", "growth_rate=inf"), "dadapt-adam", {"growth_rate": math.inf}),
    (("--optimizer", "muon", "--adam_beta1", 0.5, "--adam_weight_decay", 0.3, "--optimizer_args", "ns_steps=3"), "muon",
     {"ns_steps": 3, "weight_decay": 0.3, "use_adjusted_lr": True})], ids=str)
def test_optimizer_args_reach_the_optimizer(parse, flags, name, wanted):
    args = parse("--learning_rate", 1, *flags)
    optimizers.check_optimizer(args, "cpu")
    optimizer = optimizers.make_optimizer(args, {"unet": network()}, 1, "cpu")
    assert args.optimizer == name and optimizer.param_groups[0].items() >= wanted.items()


@pytest.mark.parametrize(("flags", "words"), [
    (("--optimizer", "prodigi"), "--optimizer: there is no optimizer prodigi; did you mean prodigy?"),
    (("--optimizer", "optimi-adamw8bit"), "there is no optimizer optimi-adamw8bit; did you mean"),
    (("--optimizer", "DAdaptAdanIP"), "did you mean dadapt-adan?"), (("--optimizer", "zzz"), "zzz; see --help"),
    (("--optimizer_args", "d_coef"), "'d_coef' is not like d_coef=2"),
    (("--optimizer_args", "betas=(0.9,"), "'betas=(0.9,' is not like"),
    (("--optimizer_args", "eps=1", "eps=2"), "--optimizer_args gives eps twice"),
    (("--use_ema", "--optimizer", "AdamWScheduleFree"), "--use_ema and --optimizer adamw-schedulefree exclude")], ids=str)
def test_mistakes_that_the_parser_finds(parse, capsys, flags, words):
    with pytest.raises(SystemExit):
        parse(*flags)
    assert words in capsys.readouterr().err


@pytest.mark.parametrize(("flags", "words"), [
    (("prodigy", "--optimizer_args", "d_coeff=2"),
     "--optimizer_args d_coeff=2: prodigy has no d_coeff; did you mean d_coef. It takes betas, beta3, d0, d_coef, growth_rate,"),
    (("adamw", "--optimizer_args", "lr=1"), "adamw has no lr.*It takes betas, eps, weight_decay.*The rate is --learning_rate"),
    (("bnb-adamw", "--optimizer_args", "optim_bits=8"), "bnb-adamw has no optim_bits"),
    (("adamw", "--optimizer_args", "betas=0.9,1.5"), "--optimizer adamw betas=0.9,1.5: .*1.5"),
    (("lion", "--optimizer_args", "betas=word"), "--optimizer lion betas=word: "),
    (("adafactor", "--optimizer_args", "relative_step=True"), "--optimizer adafactor relative_step=True: .*manual `lr`"),
    (("adamw", "--adam_beta1", 0.5, "--optimizer_args", "betas=0.9,0.9"), "betas=0.9,0.9 and the flag of the same meaning"),
    (("adamw", "--adam_beta1", 1), "--optimizer adamw .*beta"),
    (("prodigy", "--train_text_encoder", "--learning_rate_te1", 0.5), "finds one step size.*0.0001, 0.5, 0.0001: give one rate")],
    ids=str)
def test_keywords_that_the_optimizer_does_not_take(parse, flags, words):
    with pytest.raises(UserError, match=words):
        optimizers.check_optimizer(parse("--optimizer", *flags), "cpu")


@pytest.mark.parametrize(("flags", "words"), [
    (("bnb-adamw8bit-paged",), "--optimizer bnb-adamw8bit-paged has nothing to page to on a CPU"),
    (("adamw-schedulefree", "--lr_scheduler", "cosine"), "meant to run at a constant rate, and --lr_scheduler is cosine"),
    (("prodigy", "--learning_rate", 1e-4), "multiplies it by --learning_rate, which is 0.0001: 1 is usual"),
    (("dadapt-lion",), "--optimizer dadapt-lion finds its own step size"),
    (("adafactor", "--adam_beta1", 0.8), "--adam_beta1 has no effect with --optimizer adafactor"),
    (("adafactor", "--adam_epsilon", 0.8), "--adam_epsilon has no effect with --optimizer adafactor"),
    (("sgd", "--adam_beta2", 0.8), "--adam_beta2 has no effect with --optimizer sgd")], ids=str)
def test_what_is_said_before_a_run(parse, capsys, flags, words):
    optimizers.check_optimizer(parse("--optimizer", *flags), "cpu")
    assert words in capsys.readouterr().out


@pytest.mark.parametrize("flags", [
    (), ("--use_8bit_adam",), ("--adam_beta1", 0.8), ("--optimizer", "bnb-lion8bit"),
    ("--optimizer", "prodigy", "--learning_rate", 1), ("--optimizer", "adafactor", "--adam_weight_decay", 0.1),
    ("--optimizer", "muon", "--adam_beta1", 0.8, "--adam_epsilon", 1e-6),
    ("--optimizer", "adamw-schedulefree", "--lr_scheduler", "constant_with_warmup")], ids=str)
def test_nothing_is_said_of_what_is_right(parse, capsys, flags):
    optimizers.check_optimizer(parse(*flags), "cpu")
    assert capsys.readouterr().out == ""


# what is particular

def test_one_that_finds_its_rate_leaves_networks_of_rate_zero_alone():
    nets = {"unet": network(), "text_encoder": network(1)}
    start = copy.deepcopy(nets["text_encoder"].state_dict())
    made = optimizers.make_optimizer(chosen("prodigy", learning_rate_te1=0), nets, 1, "cpu")
    for net in nets.values():
        regress(net, made, range(5))
    assert all(torch.equal(value, start[name]) for name, value in nets["text_encoder"].state_dict().items())
    with pytest.raises(UserError, match="0.5, 1: give one rate"):
        optimizers.from_groups(chosen("dadapt-sgd"), [{"params": net.parameters(), "lr": rate}
                                                      for net, rate in zip(nets.values(), (0.5, 1.0), strict=True)], "cpu")


def test_muon_takes_matrices_and_leaves_the_rest_to_adamw():
    net = torch.nn.ModuleDict({"words": torch.nn.Embedding(8, 16), "linear": torch.nn.Linear(16, 12),
                               "conv": torch.nn.Conv2d(4, 4, 3)})
    start = {name: p.detach().clone() for name, p in net.named_parameters()}
    optimizer = optimizers.make_optimizer(chosen("muon", 1e-2), {"unet": net}, 1, "cpu")
    plain = [torch.nn.Parameter(value.clone()) for value in start.values()]
    adamw = torch.optim.AdamW(plain, lr=1e-2)
    for mine, theirs in zip(net.parameters(), plain, strict=True):
        mine.grad = torch.randn_like(mine)
        theirs.grad = mine.grad.clone()
    optimizer.step()
    adamw.step()
    for (name, mine), theirs in zip(net.named_parameters(), plain, strict=True):
        if name != "linear.weight":
            torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6)
    step = (net["linear"].weight - (1 - 1e-4) * start["linear.weight"]) / 1e-2    # the decay is 1e-2 of the rate
    singular = torch.linalg.svdvals(step) / (0.2 * 16 ** 0.5)    # all alike, so large that the mean square is about 0.2
    assert 0.6 < singular.min() and singular.max() < 1.3
    assert [len(group["params"]) for group in optimizer.param_groups] == [1, 4]


@pytest.mark.parametrize("name", [name for name in TABLE if name.endswith("schedulefree")])
def test_schedule_free_weights_are_averaged_for_evaluation_alone(name):
    """And training goes on bit by bit as if nobody had looked."""
    nets, ends = (network(), network()), []
    for net, looks in zip(nets, (False, True), strict=True):
        optimizer = optimizers.make_optimizer(chosen(name), {"unet": net}, 1, "cpu")
        wrapped = SimpleNamespace(optimizer=optimizer)    # as accelerate does
        for step in range(8):
            regress(net, optimizer, range(step, step + 1))
            before = [p.detach().clone() for p in net.parameters()]
            if looks:
                group = optimizer.param_groups[0]
                beta = group["betas"][0] if "betas" in group else group["momentum"]
                with pytest.raises(KeyError), optimizers.evaluated(wrapped), optimizers.evaluated(wrapped):
                    for p, y in zip(net.parameters(), before, strict=True):    # y = beta x + (1 - beta) z
                        x = (y - (1 - beta) * optimizer.state[p]["z"]) / beta
                        torch.testing.assert_close(p, x, rtol=1e-4, atol=1e-5)
                    raise KeyError
                assert all(torch.equal(p, y) for p, y in zip(net.parameters(), before, strict=True))
        ends.append(before)
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(*ends, strict=True))


def test_other_optimizers_have_no_weights_for_evaluation():
    net, optimizer = of_table("adamw")
    regress(net, optimizer, range(2))
    start = net[0].weight.detach().clone()
    with optimizers.evaluated(optimizer):
        assert torch.equal(net[0].weight, start)


@pytest.mark.parametrize("flags", [
    ("prodigy", "--learning_rate", 1, "--optimizer_args", "d0=1e-4", "d_coef=10"),
    ("dadapt-adam", "--learning_rate", 1, "--optimizer_args", "d0=1e-4"),
    ("adamw-schedulefree", "--learning_rate", 1e-3), ("optimi-ranger", "--learning_rate", 1e-3),
    ("bnb-ademamix8bit", "--learning_rate", 1e-3), ("muon", "--learning_rate", 1e-3)], ids=lambda flags: flags[0])
def test_a_run_goes_on_from_its_checkpoint_bit_by_bit(train, tmp_path, flags):
    """Through accelerate's wrapper, and though the first run saved a model on its way."""
    given = ("--optimizer", *flags)
    whole = train("--max_train_steps", 5, "--output_dir", tmp_path / "whole", "--save_every_n_steps", 2, *given)
    train("--max_train_steps", 3, "--output_dir", tmp_path / "halves", *given)
    halves = train("--max_train_steps", 5, "--output_dir", tmp_path / "halves", "--resume_from_checkpoint", "latest", *given)
    unet = "unet/diffusion_pytorch_model.safetensors"
    for name in (unet, f"checkpoint-5/{unet}"):
        assert (whole / name).read_bytes() == (halves / name).read_bytes()
    averaged = "schedulefree" in flags[0]    # a model is saved with them, a checkpoint with the weights in training
    assert ((whole / unet).read_bytes() != (whole / f"checkpoint-5/{unet}").read_bytes()) == averaged


PAGE = Path(__file__).resolve().parents[2] / "docs" / "optimizers.md"


def rows() -> list[str]:
    """The table of the page: one line an optimizer."""
    libraries = {"torch": "torch", "transformers": "transformers"} | optimizers.PIP
    return [f"| `{name}` | {libraries[entry.path.split('.')[0]]} | {entry.state:g} | {entry.bf16 or 'refused'} | "
            f"{'all' if entry.devices == optimizers.EVERY else ', '.join(entry.devices)} | {entry.use} |"
            for name, entry in TABLE.items()]


def test_the_page_has_the_table():
    found = re.findall(r"^\| `.*\|$", PAGE.read_text().split("## Other trainers' names")[0], flags=re.MULTILINE)
    assert found == rows(), "\n".join(["put this into docs/optimizers.md:", *rows()])


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

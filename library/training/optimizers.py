"""Optimizers by name. State a parameter in bytes, for float32 weights: AdamW 8, AdamW 8-bit 2, Adafactor 0.02."""

import importlib.util

import torch

from library.errors import UserError
from library.training import devices
from library.training.accelerator import say


def name_of(args) -> str:
    return "adamw_8bit" if args.use_8bit_adam else args.optimizer


def check_optimizer(args, device: str) -> None:
    """Refuse what this machine cannot run, before anything is loaded. Raises `UserError`."""
    name = name_of(args)
    if name == "adamw_fused" and not devices.fused_adamw(device):
        raise UserError(f"--optimizer adamw_fused: torch has no fused AdamW for {device}; use adamw")
    if name == "adamw_8bit":
        if not importlib.util.find_spec("bitsandbytes"):
            raise UserError("--optimizer adamw_8bit (--use_8bit_adam) needs bitsandbytes: pip install bitsandbytes")
        if device in ("mps", "npu"):
            raise UserError(f"--optimizer adamw_8bit: bitsandbytes has no 8-bit kernel for {device}; use adamw or adafactor")


def learning_rates(args, global_batch: int) -> dict[str, float]:
    """Peak rate of each trained network; a text encoder without one has the UNet's."""
    own = {"unet": args.learning_rate, "text_encoder": args.learning_rate_te1, "text_encoder_2": args.learning_rate_te2}
    factor = global_batch if args.scale_lr else 1
    return {name: factor * (args.learning_rate if rate is None else rate) for name, rate in own.items()}


def make_optimizer(args, networks: dict[str, torch.nn.Module], global_batch: int, device: str) -> torch.optim.Optimizer:
    """The optimizer of all parameters that want a gradient, one group a network.

    adafactor is transformers' with the given rate as it is: no relative step, no scaling by the parameters, as kohya
    sets it.
    """
    rates = learning_rates(args, global_batch)
    groups = [{"params": [p for p in network.parameters() if p.requires_grad], "lr": rates[name]}
              for name, network in networks.items()]
    name, betas, eps, weight_decay = name_of(args), (args.adam_beta1, args.adam_beta2), args.adam_epsilon, args.adam_weight_decay
    if name == "adamw_8bit":
        from bitsandbytes.optim import AdamW8bit
        return AdamW8bit(groups, betas=betas, eps=eps, weight_decay=weight_decay)
    if name == "adafactor":
        from transformers.optimization import Adafactor
        return Adafactor(groups, weight_decay=weight_decay, relative_step=False, scale_parameter=False)
    fused = name == "adamw_fused" or devices.fused_adamw(device)
    return torch.optim.AdamW(groups, betas=betas, eps=eps, weight_decay=weight_decay, fused=fused)


def make_lr_schedule(args, optimizer: torch.optim.Optimizer, steps: int):
    """Learning rate over optimizer steps -> a torch LRScheduler, to be stepped once an optimizer step.

    Warm-up and decay are steps, or shares of `steps` when below 1. diffusers' schedules, and transformers' three
    that kohya also offers. Raises `UserError` for what does not fit together.
    """
    name, rules, min_ratio = args.lr_scheduler, args.lr_step_rules, args.lr_scheduler_min_lr_ratio
    warmup, decay = (round(n * steps) if n < 1 else int(n) for n in (args.lr_warmup_steps, args.lr_decay_steps))
    if warmup > steps and name not in ("constant", "piecewise_constant"):
        say(f"--lr_warmup_steps {warmup} is longer than the {steps} steps of the run: the rate never reaches its peak")
    if name in ("inverse_sqrt", "cosine_with_min_lr", "warmup_stable_decay"):
        from transformers import optimization
        if name == "inverse_sqrt":
            return optimization.get_inverse_sqrt_schedule(optimizer, warmup, timescale=args.lr_scheduler_timescale)
        if name == "cosine_with_min_lr":
            return optimization.get_cosine_with_min_lr_schedule_with_warmup(optimizer, warmup, steps, min_lr_rate=min_ratio)
        if warmup + decay > steps:
            raise UserError(f"--lr_warmup_steps {warmup} and --lr_decay_steps {decay} exceed the {steps} steps of the run")
        return optimization.get_wsd_schedule(optimizer, warmup, decay, num_training_steps=steps, min_lr_ratio=min_ratio)
    from diffusers import optimization
    if name == "piecewise_constant":
        if not rules:
            raise UserError("--lr_scheduler piecewise_constant needs --lr_step_rules, such as 1:10,0.1:20,0.01")
        try:
            return optimization.get_piecewise_constant_schedule(optimizer, rules)
        except ValueError as error:
            raise UserError(f"--lr_step_rules {rules!r} is not like 1:10,0.1:20,0.01: {error}") from None
    try:
        return optimization.get_scheduler(name, optimizer, num_warmup_steps=warmup, num_training_steps=steps,
                                          num_cycles=args.lr_num_cycles, power=args.lr_power)
    except ValueError as error:
        raise UserError(f"--lr_scheduler {name}: {error}") from None

"""Learning rate over optimizer steps: diffusers' schedules, and transformers' three that kohya also offers."""

import torch

from library.errors import UserError
from library.training.accelerator import say


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

"""What optimizers keep from step to step: reloaded from a checkpoint, and exchanged for what is to be evaluated."""

import contextlib
import inspect

import torch


def load_state(optimizer: torch.optim.Optimizer, saved: dict) -> None:
    """Moments and everything else that steps have found are those of `saved`, a state_dict; settings are this run's.

    Some keep what they have found in the groups, beside the settings: Prodigy its distance, schedule-free ones their weights'
    sum. A setting is what the class takes as a keyword; where it is None the optimizer decided, and that decision stays.
    """
    inner = getattr(optimizer, "optimizer", optimizer)    # accelerate wraps it
    names = inspect.signature(type(inner)).parameters.keys() | {"initial_lr", "betas", "beta1", "beta2", "beta3", "eps"}
    own = [{name: value for name, value in group.items() if name in names - {"params"} and value is not None}
           for group in inner.param_groups]
    optimizer.load_state_dict(saved)
    for group, settings in zip(inner.param_groups, own, strict=True):
        device = group["params"][0].device
        group.update({name: value.to(device) for name, value in group.items()
                      if isinstance(value, torch.Tensor) and value.is_floating_point()} | settings)


@contextlib.contextmanager
def evaluated(optimizer: torch.optim.Optimizer):
    """Within this context the weights are those that a schedule-free optimizer averages; others leave them alone.

    Afterwards the weights are bit by bit what they were: to compute them back would round them.
    """
    inner = getattr(optimizer, "optimizer", optimizer)
    if not hasattr(inner, "eval"):
        yield
        return
    parameters = [p for group in inner.param_groups for p in group["params"]]
    own = [p.detach().clone() for p in parameters]
    inner.eval()
    try:
        yield
    finally:
        inner.train()
        with torch.no_grad():
            torch._foreach_copy_(parameters, own)

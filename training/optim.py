"""Learning rates as functions of the step alone, so that a resumed run needs no scheduler state."""

from __future__ import annotations

import math

import torch


def one_cycle(step: int, num_steps: int, peak: float, warmup: float = 0.03) -> float:
    """Linear warm-up over the first ``warmup`` share of the run, then cosine decay to 0."""
    part = (step + 1) / num_steps
    if part < warmup:
        return peak * part / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * min(1.0, (part - warmup) / (1 - warmup))))


def trapezoid(step: int, num_steps: int, peak: float, warmup: int = 100, decay: float = 0.2) -> float:
    """Warm up, stay at ``peak``, then fall linearly to 0 over the last ``decay`` share of the run.

    Until the decay begins nothing depends on ``num_steps``, so a run can be made longer while it runs.
    """
    left = (num_steps - step) / (decay * num_steps) if decay else 1.0
    return peak * min(1.0, (step + 1) / warmup, left)


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set the learning rate of every parameter group."""
    for group in optimizer.param_groups:
        group["lr"] = lr

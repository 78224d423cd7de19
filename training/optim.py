"""Learning rates as functions of the step alone, so that a resumed run needs no scheduler state."""

from __future__ import annotations

import math

import torch


def one_cycle(step: int, num_steps: int, peak: float, warmup: float = 0.03) -> float:
    """Linear warm-up over the first ``warmup`` share of the run, then a cosine down to 0."""
    part = (step + 1) / num_steps
    if part < warmup:
        return peak * part / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * min(1.0, (part - warmup) / (1 - warmup))))


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Give every parameter group the learning rate ``lr``."""
    for group in optimizer.param_groups:
        group["lr"] = lr

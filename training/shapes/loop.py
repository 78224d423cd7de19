"""The loop that trains one small model of the starter world; interrupted, it resumes from its checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from training import checkpoint
from training.optim import set_lr
from training.progress import steps
from training.steplog import StepLog


def fit(
    name: str,
    path: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    loss: Callable[[int], Tensor],
    lr: Callable[[int], float],
    num_steps: int,
    *,
    save_every: int,
    log_every: int,
) -> None:
    """Take steps on ``loss(step)`` up to ``num_steps``, from the checkpoint at ``path`` if there is one.

    The checkpoint is written every ``save_every`` steps, and a log beside it every ``log_every``. The gradient of what
    the optimizer trains is clipped to norm 1.
    """
    first = 0
    if (saved := checkpoint.load(path)) is not None:
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        first = saved["step"]
    trained = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    log = StepLog(path.with_suffix(".jsonl"), first)
    for step in steps(name, first, num_steps):
        value = loss(step)
        set_lr(optimizer, lr(step))
        optimizer.zero_grad()
        value.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        if step % log_every == 0:
            log.write(step, loss=value.item())
        if (step + 1) % save_every == 0:
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step + 1}
            checkpoint.save(path, state)
    log.close()

"""The tensors of a sharded run's checkpoint, which each process writes and reads its own slices of."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from training.offload import MOMENTS, first_slot
from training.rats.roles import Roles


def slices(
    roles: Roles, optimizer: torch.optim.Optimizer, best: Mapping[str, Tensor], far: bool
) -> tuple[dict[str, Mapping[str, Tensor]], list[float]]:
    """All tensors, in groups, and how many steps the optimizer has made with each parameter; ``far``: its moments are
    in main memory.
    """
    moments: dict[str, dict[str, Tensor]] = {name: {} for name in MOMENTS}
    adam_steps = []
    for i, parameter in enumerate(roles.trainable):
        slot: dict[str, Any] = optimizer.state[parameter]
        if not slot:  # no step was made yet, which is the same as one of zeros
            slot.update(first_slot(parameter, far))
        adam_steps.append(float(slot["step"]))
        for name, kept in moments.items():
            kept[str(i)] = slot[name].detach()
    return {**roles.live(), **moments, "best": best}, adam_steps

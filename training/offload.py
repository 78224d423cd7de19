"""AdamW whose moments lie in main memory, so that a GPU holds those of a few parameters at a time.

As in ZeRO-Offload (arXiv 2101.06840), except that the update is computed where the parameters are: its bits are those
of torch's AdamW, for whole parameters and for slices (FSDP2) alike.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from training.processes import buckets

MAIN_MEMORY = "cpu"
PART_BYTES = 256 * 2**20  # of parameters whose moments are on the device at once
MOMENTS = ("exp_avg", "exp_avg_sq")


class OffloadedAdamW(torch.optim.AdamW):
    """torch's AdamW; ``state`` is in main memory before and after ``step``."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update the parameters part by part, each with its moments beside it."""
        assert closure is None
        groups = self.param_groups
        try:
            for group in groups:
                learning = [parameter for parameter in group["params"] if parameter.grad is not None]
                for part in buckets(learning, PART_BYTES):
                    self.param_groups = [{**group, "params": part}]
                    self._update(part)
        finally:
            self.param_groups = groups
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # the copies to pinned memory may still be on their way

    def _update(self, part: list[Tensor]) -> None:
        kept = {parameter: self.state[parameter] or first_slot(parameter) for parameter in part}
        for parameter, slot in kept.items():
            # A copy on a CPU too, so that what is brought back there is what a GPU would bring back.
            near = {name: slot[name].to(parameter.device, non_blocking=True, copy=True) for name in MOMENTS}
            self.state[parameter] = {**slot, **near}
        super().step()
        for parameter, slot in kept.items():
            for name in MOMENTS:
                slot[name].copy_(self.state[parameter][name], non_blocking=True)
            self.state[parameter] = slot

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on from what ``state_dict`` returned, without ever holding it on the device."""
        super().load_state_dict({**state_dict, "state": {}})
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        for at, slot in state_dict["state"].items():
            far = {name: in_main_memory(slot[name].detach().clone()) for name in MOMENTS}
            self.state[parameters[at]] = {"step": slot["step"].clone(), **far}


def first_slot(parameter: Tensor, far: bool = True) -> dict[str, Tensor]:
    """AdamW's state of a parameter before the first step; ``far``: in main memory."""
    zeros = {name: torch.zeros_like(parameter.detach()) for name in MOMENTS}
    kept = {name: in_main_memory(zero) for name, zero in zeros.items()} if far else zeros
    return {"step": torch.tensor(0.0), **kept}


def in_main_memory(value: Tensor) -> Tensor:
    """The tensor in main memory, or this process's slice of it there; pinned where there is a GPU to copy it to."""
    kept = value.to(MAIN_MEMORY)
    if not torch.cuda.is_available():
        return kept
    if isinstance(kept, DTensor):
        kept._local_tensor = kept._local_tensor.pin_memory()
        return kept
    return kept.pin_memory()

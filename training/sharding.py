"""Networks spread over the processes of a run: FSDP2, one unit for each transformer block.

A spread parameter is a DTensor of which each process holds a slice; a block's slices come together while it computes.
Checkpoints hold whole tensors, so that a run may be gone on with by another number of processes.
"""

from __future__ import annotations

from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor


def spread(network: nn.Module, processes: int) -> None:
    """Spread a diffusers transformer over ``processes``, block by block (the classes that it calls unsplittable)."""
    mesh = init_device_mesh("cuda" if torch.cuda.is_available() else "cpu", (processes,))
    blocks = set(network._no_split_modules or ())
    for module in list(network.modules()):
        if type(module).__name__ in blocks:
            fully_shard(module, mesh=mesh)
    fully_shard(network, mesh=mesh)


def whole(tree: Any) -> Any:
    """``tree`` with its spread tensors put together; every process must call it."""
    if isinstance(tree, DTensor):
        return tree.full_tensor()
    if isinstance(tree, dict):
        return {key: whole(value) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return type(tree)(whole(value) for value in tree)
    return tree


def spread_like(value: Tensor, like: Tensor) -> Tensor:
    """A whole tensor, spread as ``like`` is (no change where that is whole, or of another shape)."""
    if isinstance(like, DTensor) and value.shape == like.shape:
        return distribute_tensor(value.to(like.device), like.device_mesh, like.placements)
    return value


def optimizer_like(state: dict[str, Any], parameters: list[nn.Parameter]) -> dict[str, Any]:
    """An optimizer's saved state, its tensors spread as the parameters that they belong to."""

    def slot_like(slot: dict[str, Any], like: Tensor) -> dict[str, Any]:
        return {key: spread_like(value, like) if isinstance(value, Tensor) else value for key, value in slot.items()}

    return {**state, "state": {at: slot_like(slot, parameters[at]) for at, slot in state["state"].items()}}


def empty(plain_class: Any, config: Any) -> Any:
    """A diffusers transformer without memory for its parameters; its buffers are real."""
    with init_empty_weights(include_buffers=False):
        return plain_class.from_config(config)

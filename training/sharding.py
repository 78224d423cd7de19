"""Networks sharded over the processes of a run: FSDP2, one unit for each transformer block.

A sharded parameter is a DTensor of which each process holds a slice; a block's slices come together while it computes,
in bf16 where a run computes in it, which is half of the traffic.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from student.families.two_experts import TwoExperts, networks


def shard(network: Any, processes: int, in_bf16: bool = False) -> None:
    """Shard a diffusers transformer over ``processes``, block by block (the classes that it calls unsplittable).

    ``in_bf16``: its slices come together in that type; they are kept, and gradients are added up, in their own. Inputs
    stay as they are: a time or a place in bf16 would be another one.
    """
    mesh = init_device_mesh("cuda" if torch.cuda.is_available() else "cpu", (processes,))
    policy = MixedPrecisionPolicy(
        param_dtype=torch.bfloat16 if in_bf16 else None,
        reduce_dtype=torch.float32 if in_bf16 else None,
        cast_forward_inputs=False,
    )
    blocks = set(network._no_split_modules or ())
    for module in list(network.modules()):
        if type(module).__name__ in blocks:
            fully_shard(module, mesh=mesh, mp_policy=policy)
    fully_shard(network, mesh=mesh, mp_policy=policy)


def clone(network: Any, processes: int, in_bf16: bool = False, dtype: torch.dtype | None = None) -> Any:
    """A copy of a diffusers transformer, in ``dtype`` where it is given; of a sharded one without ever holding all of
    it.
    """
    if processes == 1:
        made = copy.deepcopy(network)
        return made if dtype is None else nn.Module.to(made, dtype)  # diffusers' own warns of what none here has
    other = nn.Module.to(without_weights(network), dtype or network.dtype).train(network.training).requires_grad_(False)
    shard(other, processes, in_bf16)
    device = next(network.parameters()).device
    other.to_empty(device=device)
    with torch.no_grad():
        for own, value in zip(_tensors(other), _tensors(network), strict=True):
            own.copy_(value)
    return other


@contextmanager
def calls(network: nn.Module, together: bool) -> Iterator[None]:
    """Around calls without gradient; with ``together`` slices come together once for all of them, not once for each.

    At the end everything is slices again. FSDP2 leaves what lies outside of the blocks whole after such calls, and the
    next ones would not see what became of its slices meanwhile.
    """
    units = [part for part in network.modules() if isinstance(part, FSDPModule)]
    blocks = [unit for unit in units if together and unit is not network]
    for block in blocks:
        block.set_reshard_after_forward(False, recurse=False)
    try:
        yield
    finally:
        for block in blocks:
            block.set_reshard_after_forward(True, recurse=False)
        for unit in units:
            unit.reshard()


def reduce_gradients(network: nn.Module, wanted: bool) -> None:
    """Whether the backward calls from here on end in one mean over the processes, or only add up what each has."""
    if isinstance(network, FSDPModule):
        network.set_requires_gradient_sync(wanted)


def _tensors(network: nn.Module) -> list[Tensor]:
    return [*network.parameters(), *network.buffers()]


def unsharded(tree: Any) -> Any:
    """``tree`` with its sharded tensors put together; every process must call it."""
    return _mapped(tree, lambda tensor: tensor.full_tensor() if isinstance(tensor, DTensor) else tensor)


def gathered(tree: Any, keep: bool) -> Any:
    """``unsharded`` in main memory for the process that keeps it, one tensor at a time; every process must call it.

    The others get None for what was sharded, and never hold more than one whole tensor.
    """

    def gather(tensor: Tensor) -> Tensor | None:
        if not isinstance(tensor, DTensor):
            return tensor
        found = tensor.full_tensor()
        return found.cpu() if keep else None

    return _mapped(tree, gather)


def _mapped(tree: Any, change: Callable[[Tensor], Any]) -> Any:
    if isinstance(tree, Tensor):
        return change(tree)
    if isinstance(tree, dict):
        return {key: _mapped(value, change) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return type(tree)(_mapped(value, change) for value in tree)
    return tree


def shard_like(value: Tensor, like: Tensor) -> Tensor:
    """A tensor where ``like`` is, and sharded as it is; one of another shape is left alone."""
    if value.shape != like.shape or isinstance(value, DTensor):
        return value
    if isinstance(like, DTensor):
        return distribute_tensor(value.to(like.device), like.device_mesh, like.placements)
    return value.to(like.device)


def without_weights(network: Any) -> Any:
    """A diffusers transformer, or two experts, like ``network`` without memory for parameters; buffers are real."""
    if isinstance(network, TwoExperts):
        first, second = map(without_weights, networks(network).values())
        return TwoExperts(first, second, network.boundary)
    kind: Any = next(one for one in type(network).__mro__ if not issubclass(one, FSDPModule))
    with init_empty_weights(include_buffers=False):
        return kind.from_config(network.config)

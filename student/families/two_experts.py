"""Two experts that share the way from noise to data: Wan 2.2 14B's, each for the sigmas of its own side of a boundary.

Legend: B videos, C latent channels, F latent frames, H x W latent cells, L tokens, E features.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from student.base import NETWORKS
from student.families.family import Family

TIMESTEPS = 1000


class TwoExperts(nn.Module):
    """Both experts as one network, which is called as each of them is: what is trained, kept and sharded as one."""

    def __init__(self, transformer: Any, transformer_2: Any, boundary: float) -> None:
        super().__init__()
        self.transformer, self.transformer_2, self.boundary = transformer, transformer_2, boundary

    @property
    def config(self) -> Any:
        """The first expert's; the second has the same form."""
        return self.transformer.config

    @property
    def dtype(self) -> torch.dtype:
        """The type of both experts' weights."""
        dtype: torch.dtype = self.transformer.dtype
        return dtype

    @property
    def _no_split_modules(self) -> Sequence[str]:
        blocks: Sequence[str] = self.transformer._no_split_modules
        return blocks

    def forward(
        self, hidden_states: Tensor, timestep: Tensor, encoder_hidden_states: Tensor, return_dict: bool = False
    ) -> tuple[Tensor]:
        """The velocity of each sample by the expert that its timestep belongs to; ``timestep`` is 1000 sigma, (B,)."""
        return (
            by_time(
                (self.transformer, self.transformer_2), self.boundary, hidden_states, timestep, encoder_hidden_states
            ),
        )


def is_high(timestep: Tensor, boundary: float) -> Tensor:
    """Whether a timestep (1000 sigma) belongs to the expert for high noise, in WanPipeline's own arithmetic."""
    return timestep >= boundary * TIMESTEPS


def by_time(experts: Sequence[Any], boundary: float, x: Tensor, timestep_B: Tensor, tokens_BLE: Tensor) -> Tensor:
    """The velocity (B, C, F, H, W) of each sample by its own expert; one call where all samples have the same."""
    high_B = is_high(timestep_B, boundary)
    first, second = experts
    if bool(high_B.all()):
        return called(first, x, timestep_B, tokens_BLE)
    if not bool(high_B.any()):
        return called(second, x, timestep_B, tokens_BLE)
    rows = [high_B.nonzero().flatten(), (~high_B).nonzero().flatten()]
    parts = [
        called(expert, x[row], timestep_B[row], tokens_BLE[row]) for expert, row in zip(experts, rows, strict=True)
    ]
    return torch.cat(parts)[torch.cat(rows).argsort()]


def called(transformer: Any, x: Tensor, timestep_B: Tensor, tokens_BLE: Tensor) -> Tensor:
    """One call of a Wan transformer."""
    v_BCFHW: Tensor = transformer(
        hidden_states=x, timestep=timestep_B, encoder_hidden_states=tokens_BLE, return_dict=False
    )[0]
    return v_BCFHW


def joined(model: Family) -> Family:
    """The family itself; where it has two experts, they become its ``transformer`` as one network."""
    whole: Any = model
    if getattr(whole, NETWORKS[1], None) is not None:
        whole.transformer = TwoExperts(whole.transformer, whole.transformer_2, whole.boundary)
        whole.transformer_2 = whole.boundary = None
    return model


def transformer_of(pipe: Any) -> Any:
    """A pipeline's transformer, or both of its experts as one network."""
    second = getattr(pipe, NETWORKS[1], None)
    return pipe.transformer if second is None else TwoExperts(pipe.transformer, second, pipe.config.boundary_ratio)


def networks(transformer: Any) -> dict[str, Any]:
    """The diffusers transformers that a network is made of, by the names of their folders in a pipeline."""
    if isinstance(transformer, TwoExperts):
        return {name: getattr(transformer, name) for name in NETWORKS}
    return {NETWORKS[0]: transformer}


def called_at(sigmas: Sequence[float], boundary: float | None) -> tuple[str, ...]:
    """The names of the networks that are called at any of these sigmas; without a boundary there is one."""
    if boundary is None:
        return NETWORKS[:1]
    high = is_high(torch.tensor(sigmas, dtype=torch.float32) * TIMESTEPS, boundary)
    return tuple(name for name, wanted in zip(NETWORKS, (high.any(), (~high).any()), strict=True) if wanted)

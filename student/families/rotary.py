"""Rotary position embeddings in real numbers, for diffusers' transformers that multiply by complex ones.

ONNX has no complex numbers. These transformers compute ``view_as_complex(x) * turns.unsqueeze(axis)``; with a ``Turns``
that is the same product, through the complex tensor's real view, which has an ONNX form.
Legend: S positions of a sequence, A half the features of a head.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Turns:
    """cos and sin of each position's angles, (..., S, A)."""

    cos: Tensor
    sin: Tensor

    @staticmethod
    def by(angles: Tensor) -> Turns:
        """The rotations by these angles."""
        return Turns(angles.cos(), angles.sin())

    @staticmethod
    def joined(parts: Sequence[Turns], dim: int) -> Turns:
        """Several sequences, concatenated."""
        return Turns(torch.cat([part.cos for part in parts], dim), torch.cat([part.sin for part in parts], dim))

    def unsqueeze(self, dim: int) -> Turns:
        """With one more axis, for the heads."""
        return Turns(self.cos.unsqueeze(dim), self.sin.unsqueeze(dim))

    def __rmul__(self, x: Tensor) -> Tensor:
        """The complex ``x (cos + i sin)``."""
        real, imaginary = torch.view_as_real(x).unbind(-1)
        turned = (real * self.cos - imaginary * self.sin, real * self.sin + imaginary * self.cos)
        return torch.view_as_complex(torch.stack(turned, dim=-1))

"""The three stages of a student as torch modules: for export, and for serving a stage that could not be exported.

Legend: B images or videos, C latent channels, H x W latent cells, L tokens, E token features, P pooled features.
"""

from __future__ import annotations

from torch import Tensor, nn

from student.families.family import Condition, Family
from student.runtimes.experts import STEPS
from student.runtimes.manifest import DECODER, TEXT


class Text(nn.Module):
    """Token ids (and Wan's mask) -> tokens_BLE and, where the family has it, pooled_BP."""

    def __init__(self, model: Family) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor, ids_2: Tensor, ids_3: Tensor | None = None) -> tuple[Tensor, ...]:
        """One argument for each array of the student's tokens."""
        condition = self.model.encode_ids(*(part for part in (ids, ids_2, ids_3) if part is not None))
        return (condition.tokens_BLE,) if condition.pooled_BP is None else (condition.tokens_BLE, condition.pooled_BP)


class Step(nn.Module):
    """Latents at sigma_B -> the velocity there."""

    def __init__(self, model: Family) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor, sigma_B: Tensor, tokens_BLE: Tensor, pooled_BP: Tensor | None = None) -> Tensor:
        """One call of the transformer."""
        return self.model.velocity(x, sigma_B, Condition(tokens_BLE, pooled_BP))


class Decoder(nn.Module):
    """Latents -> images_BCHW (videos BFCHW) in [0, 1]."""

    def __init__(self, model: Family) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        """One call of the autoencoder's decoder."""
        return self.model.decode(x)


def stage_modules(model: Family) -> dict[str, nn.Module]:
    """Each stage by name; a family of two experts has a step of each."""
    steps = dict(zip(STEPS, map(Step, model.experts()), strict=False))
    return {TEXT: Text(model), **steps, DECODER: Decoder(model)}

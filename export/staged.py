"""A student in three graphs (text encoders, one step, decoder); the loop over the steps stays outside.

So one set of files serves every step count, and a step can be seen and stopped.
Legend: B images or videos, C latent channels, H x W latent cells, L tokens, E token features, P pooled features.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from export.graph import Part, Signature
from student.bundle import Student
from student.families.family import Condition, Family
from student.runtimes.stages import DECODER, STEP, TEXT, text_outputs
from student.tokens import PromptTokens


class Text(nn.Module):
    """Token ids (and Wan's mask) -> tokens_BLE and, where the family has it, pooled_BP."""

    def __init__(self, model: Family) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor, ids_2: Tensor, ids_3: Tensor | None = None) -> tuple[Tensor, ...]:
        """One argument for each array that the student's tokens give."""
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


def staged_parts(model: Family, student: Student, tokens: PromptTokens) -> dict[str, Part]:
    """What is to be exported, by stage; ``model`` is the student's in float32."""
    t5 = getattr(model, model.encoders[-1])
    if t5 is not None:
        t5.set_attn_implementation("eager")  # T5's sdpa has not always decomposed
    ids = {name: torch.from_numpy(rows) for name, rows in zip(tokens.names, tokens.encode(["a", "b c"]), strict=True)}
    x, sigma_B = torch.zeros(2, *student.latents.shape), torch.ones(2)
    names = text_outputs(student.family)
    with torch.no_grad():
        text = dict(zip(names, Text(model)(*ids.values()), strict=True))
    wanted: dict[str, tuple[nn.Module, Mapping[str, Tensor], tuple[str, ...]]] = {
        TEXT: (Text(model), ids, names),
        STEP: (Step(model), {"latents": x, "sigma": sigma_B, **text}, ("velocity",)),
        DECODER: (Decoder(model), {"latents": x}, ("images",)),
    }
    metadata = {"student": f"{student.id} {student.version}", "source_sha256": student.fingerprint()}
    return {
        stage: Part(module, Signature(f"{student.id}-{stage}", inputs, outputs), metadata | {"stage": stage})
        for stage, (module, inputs, outputs) in wanted.items()
    }

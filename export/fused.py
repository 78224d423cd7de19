"""A student as one function: token ids and noise in, images out; all K steps and the decoder inside.

Legend: B images, C latent channels, H x W latent cells, L tokens.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from export.graph import Part, Signature
from student.bundle import Student
from student.families.family import Family
from student.families.find import family_of_student
from student.sampler import denoise
from student.tokens import PromptTokens

INPUTS = ("clip_ids", "t5_ids", "noise")
OUTPUT = "images"


class Fused(nn.Module):
    """K Euler steps unrolled over one set of weights."""

    def __init__(self, model: Family, sigmas: tuple[float, ...]) -> None:
        super().__init__()
        self.model = model
        self.sigmas = sigmas

    def forward(self, ids_clip_BL: Tensor, ids_t5_BL: Tensor, noise_BCHW: Tensor) -> Tensor:
        """images_BCHW in [0, 1]."""
        condition = self.model.encode_ids(ids_clip_BL, ids_t5_BL)
        x_BCHW = denoise(lambda x, sigma: self.model.velocity(x, sigma, condition), noise_BCHW, self.sigmas)
        return self.model.decode(x_BCHW)


def fused_part(pipe: Any, student: Student, tokens: PromptTokens, steps: int) -> Part:
    """The part to export for ``steps`` steps; ``pipe`` is the student's pipeline in float32."""
    pipe.text_encoder_2.set_attn_implementation("eager")  # T5's sdpa has not always decomposed
    module = Fused(family_of_student(pipe, student), student.sigmas[steps])
    ids_clip_BL, ids_t5_BL = (torch.from_numpy(ids) for ids in tokens.encode(["a", "b c"]))
    noise = torch.zeros(2, *student.latents.shape)
    inputs = dict(zip(INPUTS, (ids_clip_BL, ids_t5_BL, noise), strict=True))
    metadata = {
        "student": f"{student.id} {student.version}",
        "source_sha256": student.fingerprint(),
        "steps": str(steps),
        "sigmas": " ".join(map(repr, student.sigmas[steps])),
    }
    return Part(module, Signature(f"{student.id}-{steps}-steps", inputs, (OUTPUT,)), metadata)

"""What the step's graph will be fed: the inputs that eight-bit scales are measured on."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from export.request import Request
from student.families.family import Family
from student.noise import noise
from student.runtimes.stages import text_outputs
from student.sampler import denoise
from student.tokens import PromptTokens

CALIBRATION_BATCH = 4


@torch.no_grad()
def calibration_feeds(model: Family, request: Request, tokens: PromptTokens) -> Iterator[dict[str, Any]]:
    """What the step's stage will be fed: torch's own path from the noise of seeds, at every trained step count."""
    student, names = request.student, text_outputs(request.student.family)
    for first in range(0, len(request.prompts), CALIBRATION_BATCH):
        prompts = request.prompts[first : first + CALIBRATION_BATCH]
        condition = model.encode_ids(*(torch.from_numpy(ids) for ids in tokens.encode(prompts)))
        parts = [part for part in (condition.tokens_BLE, condition.pooled_BP) if part is not None]
        text = {name: part.numpy() for name, part in zip(names, parts, strict=True)}
        start = torch.from_numpy(noise(range(1000 + first, 1000 + first + len(prompts)), student.latents.shape))
        for steps in student.steps:
            seen: list[dict[str, Any]] = []
            denoise(
                lambda x, sigma, condition=condition: model.velocity(x, sigma, condition),  # type: ignore[misc]
                start,
                student.sigmas[steps],
                _remember(seen, text),
            )
            yield from seen


def _remember(seen: list[dict[str, Any]], text: Mapping[str, Any]) -> Callable[[int, float, Any, Any], None]:
    def look(_: int, sigma: float, x: Any, v: Any) -> None:
        seen.append({"latents": x.numpy(), "sigma": torch.full((len(x),), sigma).numpy(), **text})

    return look

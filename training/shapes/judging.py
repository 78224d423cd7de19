"""The exact judge in the form that evaluations use: a one or zero per prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields

from torch import Tensor

from training.shapes.grammar import parse
from training.shapes.judge import Verdict, judge_batch


def judge_prompts(images_BCHW: Tensor, prompts: Sequence[str]) -> dict[str, list[float]]:
    """Which parts of each prompt its image gets right, with ``right`` and ``right_but_shape``: 1.0 or 0.0 each."""
    verdicts = judge_batch(images_BCHW.numpy(), [parse(prompt) for prompt in prompts])
    names = [f.name for f in fields(Verdict)] + ["right", "right_but_shape"]
    return {name: [float(getattr(verdict, name)) for verdict in verdicts] for name in names}

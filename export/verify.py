"""The proof of an export: the compiled form draws and scores what torch does."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from export.errors import ExportError
from student.bundle import Student
from student.pipeline import reproduce
from student.runtimes.manifest import Parity
from student.runtimes.onnx import FusedGraphs
from student.runtimes.session import Session
from student.runtimes.stages import StagedGraphs

FP32_TOLERANCE = 1e-3  # on images in [0, 1] and on standardised scores
BATCHES = (1, 7)
PROMPTS = (
    "a small red heart above a large blue star on a gray background",
    "a large green ring on a navy background",
    "a small white circle left of a small black cross on a mint background",
    "Yellow triangle",
    "words that no vocabulary knows",
    "",
    "a large purple diamond below a small orange square",
)


def image_parity(graphs: FusedGraphs | StagedGraphs, pipe: Any, student: Student, steps: int) -> Parity:
    """Compare the compiled graphs with diffusers' own loop, from the same seeds.

    Raises:
        ExportError: they differ by more than the tolerance.
    """
    worst = {}
    for batch in BATCHES:
        prompts, seeds = PROMPTS[-batch:], range(batch)
        theirs = reproduce(pipe, student, prompts, seeds, steps)
        worst[batch] = difference(graphs.draw(prompts, seeds, steps), theirs)
    return _within_tolerance(worst, f"the images of {steps} steps")


def score_parity(session: Session, module: nn.Module, std: float, size: tuple[int, int], ids_BL: Any) -> Parity:
    """Compare a compiled scorer with its torch module on noise images; differences are in standardised units.

    Raises:
        ExportError: they differ by more than the tolerance.
    """
    images_BCHW = np.random.default_rng(0).random((len(ids_BL), 3, *size), dtype=np.float32)
    worst = {}
    for batch in BATCHES:
        images, ids = images_BCHW[:batch], ids_BL[:batch]
        with torch.inference_mode():
            theirs = module(torch.from_numpy(images), torch.from_numpy(ids)).numpy()
        worst[batch] = difference(session.run(["score"], {"images": images, "token_ids": ids})[0], theirs) / std
    return _within_tolerance(worst, "the standardised scores")


def difference(ours: NDArray[np.float32], theirs: NDArray[np.float32]) -> float:
    """Largest absolute difference, and infinity where a value is not a number or the shapes differ."""
    if ours.shape != theirs.shape:
        return float("inf")
    gap = np.abs(ours.astype(np.float64) - theirs)
    return float(gap.max()) if np.isfinite(gap).all() else float("inf")


def _within_tolerance(worst: dict[int, float], what: str) -> Parity:
    if not max(worst.values()) <= FP32_TOLERANCE:
        figures = ", ".join(f"{value:.2g} at batch {batch}" for batch, value in worst.items())
        raise ExportError(f"{what} differ from torch by {figures}: accepted is {FP32_TOLERANCE:g}; nothing was written")
    return Parity(worst, FP32_TOLERANCE)

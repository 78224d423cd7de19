"""Which step graph computes the velocity at a sigma: Wan 2.2 14B has two experts, every other model one transformer."""

from __future__ import annotations

import numpy as np

from student.bundle import Student
from student.runtimes.manifest import DECODER, STEP, STEP_2, TEXT

STEPS = (STEP, STEP_2)
TIMESTEPS = np.float32(1000)


def step_stage(sigma: float, boundary: float | None) -> str:
    """The step stage at a sigma: the second expert's below ``boundary``, in diffusers' own arithmetic (float32)."""
    if boundary is None or np.float32(sigma) * TIMESTEPS >= np.float32(boundary * 1000):
        return STEP
    return STEP_2


def stages_of(student: Student, boundary: float | None) -> tuple[str, ...]:
    """The stages that a student needs, in their order: an expert that none of its sigmas reaches has no graph."""
    reached = {step_stage(sigma, boundary) for sigmas in student.sigmas.values() for sigma in sigmas}
    return (TEXT, *(stage for stage in STEPS if stage in reached), DECODER)

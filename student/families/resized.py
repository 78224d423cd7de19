"""A student at another size than its own, with the sigmas that its schedule has there."""

from __future__ import annotations

from collections.abc import Sequence

from student.bundle import Student
from student.families.family import Family
from student.runtimes.lengths import at_length
from student.runtimes.manifest import Sigmas
from student.runtimes.sizes import Size, at_size


def resized(model: Family, student: Student, size: Size, frames: int | None = None) -> Student:
    """The student at this size in pixels and, for videos, with this number of frames (its own, if None).

    Raises:
        SizeError: the family does not support it.
    """
    frames = frames or student.image.frames
    latents = model.geometry(*size, frames or 1)
    found = at_size(student, size, (latents.height, latents.width), sigmas_at(model, student, latents.shape))
    return found if frames is None or latents.frames is None else at_length(found, frames, latents.frames)


def sigmas_at(model: Family, student: Student, shape: Sequence[int]) -> Sigmas:
    """The student's sigmas for latents of this shape: its own, where they do not depend on the size."""
    if student.schedule is None or tuple(shape) == student.latents.shape:
        return student.sigmas
    return {nfe: model.sigmas(nfe, shape, student.schedule) for nfe in student.sigmas}

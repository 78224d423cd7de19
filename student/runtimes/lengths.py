"""The numbers of frames that a runtime accepts at each size: a rule that is known before anything is generated.

A compiled graph has one length. The torch runtime accepts every length that the autoencoder can divide into latent
frames, up to what fits in memory beside the weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from student.bundle import Student

LONGEST = 1024  # frames, whatever memory there is


@dataclass(frozen=True)
class Lengths:
    """``first``, ``first + step``, ... up to ``most`` frames."""

    first: int
    most: int
    step: int = 1

    def __contains__(self, frames: int) -> bool:
        return self.first <= frames <= self.most and (frames - self.first) % self.step == 0

    def record(self) -> list[int]:
        """The form of a worker's report; ``read_lengths`` reads it."""
        return [self.first, self.most, self.step]


def read_lengths(said: object) -> Lengths | None:
    """The inverse of ``Lengths.record``; None for what no release writes."""
    if not isinstance(said, Sequence) or len(said) != 3 or not all(isinstance(part, int) and part > 0 for part in said):
        return None
    return Lengths(*said)


def own_length(student: Student) -> Lengths | None:
    """The one length of a compiled video student; None for a student of pictures."""
    frames = student.image.frames
    return None if frames is None else Lengths(frames, frames)


def frame_step(student: Student) -> int | None:
    """The number of frames in each latent frame but the first; None where the student's own length does not tell."""
    frames, latents = student.image.frames, student.latents.frames
    if frames is None or latents is None or latents < 2:
        return None
    return (frames - 1) // (latents - 1)


def at_length(student: Student, frames: int, latent_frames: int) -> Student:
    """The same student with videos of another length."""
    latents, image = replace(student.latents, frames=latent_frames), replace(student.image, frames=frames)
    return replace(student, latents=latents, image=image)


def longest(room_bytes: int | None, fixed_bytes: int, frame_bytes: int, step: int) -> int:
    """The most frames, 1 plus a multiple of ``step``, that fit into memory: ``fixed_bytes`` plus ``frame_bytes`` each.

    ``room_bytes`` is the available memory, or None if it is unknown.
    """
    frames = LONGEST if room_bytes is None else min(LONGEST, max(0, room_bytes - fixed_bytes) // max(1, frame_bytes))
    return 1 + max(0, frames - 1) // step * step

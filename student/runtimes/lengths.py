"""How many frames a runtime draws of each size: a rule for requests, known before anything is drawn.

What a compiled graph draws is its own length. What torch draws is every length that the autoencoder can cut into
latent frames, up to what memory holds beside the weights.
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
        """For a worker's report; ``read_lengths`` reads it."""
        return [self.first, self.most, self.step]


def read_lengths(said: object) -> Lengths | None:
    """The inverse of ``Lengths.told``; None for what no release writes."""
    if not isinstance(said, Sequence) or len(said) != 3 or not all(isinstance(part, int) and part > 0 for part in said):
        return None
    return Lengths(*said)


def own_length(student: Student) -> Lengths | None:
    """The one length of a student that was compiled; None for a student of pictures."""
    frames = student.image.frames
    return None if frames is None else Lengths(frames, frames)


def frame_step(student: Student) -> int | None:
    """Frames of each latent frame but the first, as a video of several tells; None where it cannot be told."""
    frames, latents = student.image.frames, student.latents.frames
    if frames is None or latents is None or latents < 2:
        return None
    return (frames - 1) // (latents - 1)


def at_length(student: Student, frames: int, latent_frames: int) -> Student:
    """The same student drawing videos of another length."""
    latents, image = replace(student.latents, frames=latent_frames), replace(student.image, frames=frames)
    return replace(student, latents=latents, image=image)


def longest(room_bytes: int | None, fixed_bytes: int, frame_bytes: int, step: int) -> int:
    """The most frames, 1 plus a multiple of ``step``, for which there is ``frame_bytes`` each beside ``fixed_bytes``.

    ``room_bytes`` None: nobody knows how much memory there is.
    """
    frames = LONGEST if room_bytes is None else min(LONGEST, max(0, room_bytes - fixed_bytes) // max(1, frame_bytes))
    return 1 + max(0, frames - 1) // step * step

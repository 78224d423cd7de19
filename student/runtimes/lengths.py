"""The numbers of frames that a runtime accepts at each size: a rule that is known before anything is generated.

A compiled graph has one length, and a runtime may have graphs for several. The torch runtime accepts every length that
the autoencoder can divide into latent frames, up to what fits in memory beside the weights.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from student.bundle import Student

COMPILED = "compiled"
LONGEST = 1024  # frames, whatever memory there is


@dataclass(frozen=True)
class Lengths:
    """``first``, ``first + step``, ... up to ``most`` frames; of these only ``compiled``, if there are any."""

    first: int
    most: int
    step: int = 1
    compiled: tuple[int, ...] = ()

    def __contains__(self, frames: int) -> bool:
        if self.compiled:
            return frames in self.compiled
        return self.first <= frames <= self.most and (frames - self.first) % self.step == 0

    def record(self) -> list[int] | dict[str, list[int]]:
        """The form of a worker's report; ``read_lengths`` reads it."""
        return {COMPILED: list(self.compiled)} if self.compiled else [self.first, self.most, self.step]


def read_lengths(said: object) -> Lengths | None:
    """The inverse of ``Lengths.record``; None for what no release writes."""
    numbers = said.get(COMPILED) if isinstance(said, Mapping) else said
    if not isinstance(numbers, Sequence) or not all(isinstance(part, int) and part > 0 for part in numbers):
        return None
    if isinstance(said, Mapping):
        return compiled_lengths(numbers) if numbers else None
    return Lengths(*numbers) if len(numbers) == 3 else None


def compiled_lengths(counts: Iterable[int]) -> Lengths:
    """The lengths (at least one) that there are graphs for; their ``step`` divides the distances between them."""
    known = tuple(sorted(set(counts)))
    step = math.gcd(*(count - known[0] for count in known))
    return Lengths(known[0], known[-1], step or 1, known)


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

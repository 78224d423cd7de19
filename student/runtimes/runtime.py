"""What every way of running a student answers to.

Legend: B images, C = 3 colour channels, H x W pixels; of a video B is videos, and F frames stand before C.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from student.bundle import Student
from student.runtimes.lengths import Lengths

FloatArray = NDArray[np.float32]
Preview = Callable[[Sequence[int]], FloatArray]
Watch = Callable[[int, Preview], None]


@dataclass
class Company:
    """Whether other workers of this machine draw at this moment; whoever calls the sessions says so before a call.

    A call that has the machine to itself is fastest on all cores; where several draw side by side, all of them together
    are fastest on their share of the cores each.
    """

    crowded: bool = False
    allowed: bool = True  # no longer, once a picture's bytes were found to depend on it


class Runtime(Protocol):
    """A student that is loaded and ready to draw; not to be called from two threads at once."""

    @property
    def name(self) -> str:
        """The runtime's folder name ("onnx-fused-fp32"), or "torch" or "fake"."""

    @property
    def student(self) -> Student:
        """The manifest of the bundle that draws."""

    @property
    def max_batch(self) -> int:
        """The largest number of images that one call takes."""

    def draw(self, prompts: Sequence[str], seeds: Sequence[int], steps: int) -> FloatArray:
        """One image for each (prompt, seed): images_BCHW, float32 in [0, 1]; an image never depends on the others.
        A student of videos gives videos_BFCHW.

        Raises:
            ValueError: prompts and seeds of different lengths, an empty or too large batch, a seed out of range,
                a step count that the student was not trained for.
        """

    def score(self, images_BCHW: FloatArray, prompts: Sequence[str]) -> dict[str, FloatArray]:
        """Standardised scores_B (0 = the teacher's mean) of each scorer that can be had, by scorer name.

        It takes pictures of every size (videos: images_BFCHW) and never raises: where a scorer fails on a picture, its
        score is not a number (see ``student.reference.verdicts``).
        """


@runtime_checkable
class StepwiseRuntime(Runtime, Protocol):
    """A runtime that shows its steps (staged, not fused): it has previews, and can be stopped between two steps."""

    def draw_watched(self, prompts: Sequence[str], seeds: Sequence[int], steps: int, watch: Watch) -> FloatArray:
        """The same bytes as ``draw``; ``watch(i, preview)`` is called after the network's call in step i, from 0, in
        each step but the last.

        ``preview(rows)`` decodes what the network predicts there for these rows of the batch (``x0 = x - sigma v``):
        images_BCHW, float32 in [0, 1], or videos_BFCHW of at least their first frame. It costs a decoder call, if it is
        called. Whatever ``watch`` raises ends the drawing and comes out of here. (``student.sampler.denoise`` has a
        callback that this can be built on.)
        """


@runtime_checkable
class SizedRuntime(Runtime, Protocol):
    """A runtime that was compiled for more sizes than the student's own; each is a static bucket."""

    @property
    def sizes(self) -> tuple[tuple[int, int], ...]:
        """(height, width) in pixels of what it draws, the student's own first."""

    def draw(
        self, prompts: Sequence[str], seeds: Sequence[int], steps: int, size: tuple[int, int] | None = None
    ) -> FloatArray:
        """See ``Runtime.draw``; ``size`` is one of ``sizes``, else it raises ValueError with their names.

        Where it shows its steps, ``draw_watched`` takes ``size`` last too.
        """


@runtime_checkable
class VideoRuntime(SizedRuntime, Protocol):
    """A runtime that draws videos of several lengths."""

    @property
    def lengths(self) -> Mapping[tuple[int, int], Lengths]:
        """The numbers of frames of each of ``sizes`` that it has the memory for."""

    def draw(
        self, prompts: Sequence[str], seeds: Sequence[int], steps: int, size: tuple[int, int] | None = None,
        frames: int | None = None,
    ) -> FloatArray:  # fmt: skip
        """See ``SizedRuntime.draw``: videos_BFCHW; ``frames`` is one of the size's ``lengths``, else ValueError."""


def check_call(student: Student, prompts: Sequence[str], seeds: Sequence[int], steps: int, max_batch: int) -> None:
    """Raise the errors of ``Runtime.draw`` (but for a seed's range, which the noise checks)."""
    if not prompts or len(prompts) != len(seeds):
        raise ValueError(f"prompts and seeds are {len(prompts)} and {len(seeds)}: accepted is one seed for each prompt")
    if len(prompts) > max_batch:
        raise ValueError(f"the batch has {len(prompts)} images: accepted is 1 to {max_batch}")
    if steps not in student.sigmas:
        raise ValueError(f"steps is {steps}: {student.id} was trained for {', '.join(map(str, student.steps))}")

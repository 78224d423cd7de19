"""The interface of every runtime of a student.

Legend: B images, C = 3 colour channels, H x W pixels; for videos B counts videos, and F frames come before C.
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
class CpuSharing:
    """Whether other workers of this machine are busy now; the caller of the sessions sets it before each call.

    A call that has the machine to itself is fastest on all cores; several workers side by side are fastest in total if
    each uses its share of the cores.
    """

    crowded: bool = False
    allowed: bool = True  # no longer, once a picture's bytes were found to depend on it


class Runtime(Protocol):
    """A student that is loaded and ready to generate; not to be called from two threads at once."""

    @property
    def name(self) -> str:
        """The runtime's folder name ("onnx-fused-fp32"), or "torch" or "fake"."""

    @property
    def student(self) -> Student:
        """The manifest of the bundle."""

    @property
    def max_batch(self) -> int:
        """The largest number of images that one call takes."""

    def draw(self, prompts: Sequence[str], seeds: Sequence[int], steps: int) -> FloatArray:
        """One image for each (prompt, seed): images_BCHW, float32 in [0, 1]; an image never depends on the others.
        A video student returns videos_BFCHW.

        Raises:
            ValueError: prompts and seeds of different lengths, an empty or too large batch, a seed out of range, or
                a step count that the student was not trained for.
        """

    def score(self, images_BCHW: FloatArray, prompts: Sequence[str]) -> dict[str, FloatArray]:
        """Standardised scores_B (0 = the teacher's mean) of each available scorer, by its name.

        It takes pictures of every size (videos: images_BFCHW) and never raises: where a scorer fails on a picture, its
        score is NaN (see ``student.reference.verdicts``).
        """


@runtime_checkable
class StepwiseRuntime(Runtime, Protocol):
    """A runtime that runs step by step (staged, not fused): it has previews, and can be stopped between two steps."""

    def draw_watched(self, prompts: Sequence[str], seeds: Sequence[int], steps: int, watch: Watch) -> FloatArray:
        """The same bytes as ``draw``; ``watch(i, preview)`` is called after the network's call in step i, from 0, in
        each step but the last.

        ``preview(rows)`` decodes the network's prediction at that point for these rows of the batch
        (``x0 = x - sigma v``): images_BCHW, float32 in [0, 1], or videos_BFCHW with at least the first frame. Each
        call of it costs a decoder call. An exception from ``watch`` ends the call and is passed on.
        (``student.sampler.denoise`` has a callback that this can be built on.)
        """


@runtime_checkable
class SizedRuntime(Runtime, Protocol):
    """A runtime that was compiled for more sizes than the student's own; each is a fixed bucket."""

    @property
    def sizes(self) -> tuple[tuple[int, int], ...]:
        """(height, width) in pixels of the sizes that it accepts, the student's own first."""

    def draw(
        self, prompts: Sequence[str], seeds: Sequence[int], steps: int, size: tuple[int, int] | None = None
    ) -> FloatArray:
        """See ``Runtime.draw``; ``size`` is one of ``sizes``, else it raises ValueError with their names.

        If it is stepwise, ``draw_watched`` takes ``size`` last too.
        """


@runtime_checkable
class VideoRuntime(SizedRuntime, Protocol):
    """A runtime for videos of several lengths."""

    @property
    def lengths(self) -> Mapping[tuple[int, int], Lengths]:
        """The numbers of frames at each of ``sizes`` for which there is enough memory."""

    def draw(
        self, prompts: Sequence[str], seeds: Sequence[int], steps: int, size: tuple[int, int] | None = None,
        frames: int | None = None,
    ) -> FloatArray:  # fmt: skip
        """See ``SizedRuntime.draw``: videos_BFCHW; ``frames`` is one of the size's ``lengths``, else ValueError."""


def check_call(student: Student, prompts: Sequence[str], seeds: Sequence[int], steps: int, max_batch: int) -> None:
    """Raise the errors of ``Runtime.draw`` (except for a seed's range, which the noise checks)."""
    if not prompts or len(prompts) != len(seeds):
        raise ValueError(f"prompts and seeds are {len(prompts)} and {len(seeds)}: accepted is one seed for each prompt")
    if len(prompts) > max_batch:
        raise ValueError(f"the batch has {len(prompts)} images: accepted is 1 to {max_batch}")
    if steps not in student.sigmas:
        raise ValueError(f"steps is {steps}: {student.id} was trained for {', '.join(map(str, student.steps))}")

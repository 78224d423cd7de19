"""A runtime without a network: each picture is a hash of its request, so that a mix-up is noticed at once.

The whole service can be tried and tested with it. Words in a prompt make it misbehave: ``fake:sleep=0.2`` (the call
takes 0.2 s longer), ``fake:step=0.2`` (each of its steps does), ``fake:image=0.2`` (each step does for each such
image), ``fake:score=0.2`` (scoring does), ``fake:raise`` (the call fails), ``fake:nan`` (that picture is not finite),
``fake:oom`` (a call of more than two images runs out of memory), ``fake:die`` (the process dies in the middle of the
call). ``fake-video`` makes videos of such pictures, a hash for each frame.

Legend: B images or videos, C = 3 colour channels, F frames, H x W pixels.
"""

from __future__ import annotations

import hashlib
import os
import re
import signal
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from statistics import NormalDist

import numpy as np

from student.bundle import ImageSize, Latents, RewardReference, Scorer, Student
from student.noise import SEED_LIMIT
from student.runtimes.lengths import Lengths
from student.runtimes.runtime import FloatArray, Watch
from student.runtimes.sizes import Size, own_size
from student.schedule import sigmas

SIDE_PX = 64
CELLS = 8
MAX_BATCH = 8
# A score is a mean of as many even bytes as there are cells, times 4: next to normal.
DEVIATION = 4 * (1 / 12) ** 0.5 / CELLS
POINTS = (1, 5, *range(10, 100, 10), 95, 99)
FAKE_VIDEO = "fake-video"
FRAMES, LATENT_FRAMES, MOST_FRAMES, FPS = 9, 3, 33, 8
STEPS = (4, 1, 2)  # the first is what a request without a count gets
SLEEP = re.compile(r"fake:sleep=([0-9.]+)")
STEP = re.compile(r"fake:step=([0-9.]+)")
IMAGE = re.compile(r"fake:image=([0-9.]+)")
SCORE = re.compile(r"fake:score=([0-9.]+)")


def fake_student() -> Student:
    """A manifest without a bundle."""
    return Student(
        id="fake",
        version="1",
        family="fake",
        steps=STEPS,
        sigmas={steps: sigmas(steps) for steps in STEPS},
        latents=Latents(height=8, width=8, channels=16, packing=2, scaling_factor=1.0, shift_factor=0.0),
        image=ImageSize(SIDE_PX, SIDE_PX),
        max_tokens=24,
        baked={},
        teacher="fake",
        scorers={
            "trained": Scorer("scorers/trained.onnx", mean=0.0, std=1.0, role="trained"),
            "heldout": Scorer("scorers/heldout.onnx", mean=0.0, std=1.0, role="heldout"),
        },
        reward_reference={name: _reference() for name in ("trained", "heldout")},
    )


def _reference() -> RewardReference:
    normal = NormalDist(0.0, DEVIATION)
    return RewardReference(0.0, DEVIATION, {str(point): normal.inv_cdf(point / 100) for point in POINTS})


def fake_video_student() -> Student:
    """The same for videos of 9 frames, of which each latent frame but the first holds 4."""
    latents = replace(fake_student().latents, frames=LATENT_FRAMES)
    return replace(fake_student(), id=FAKE_VIDEO, latents=latents, image=ImageSize(SIDE_PX, SIDE_PX, FRAMES, FPS))


def fake_image(prompt: str, seed: int, steps: int, who: str = "") -> FloatArray:
    """The picture of a request, (C, H, W): 8 x 8 squares of colours that survive a PNG exactly.

    ``who`` names the student; it is empty for the fake student itself.
    """
    digest = hashlib.shake_256(f"{who}{steps}/{seed}/{prompt}".encode()).digest(CELLS * CELLS * 3)
    cells_CHW = np.frombuffer(digest, np.uint8).reshape(3, CELLS, CELLS).astype(np.float32) / np.float32(255)
    side = SIDE_PX // CELLS
    image_CHW: FloatArray = cells_CHW.repeat(side, axis=1).repeat(side, axis=2)
    return image_CHW


def fake_video(prompt: str, seed: int, steps: int, frames: int, who: str = "") -> FloatArray:
    """The video of a request, (F, C, H, W): frame k is the picture of the prompt followed by k."""
    return np.stack([fake_image(f"{prompt} {k}", seed, steps, who) for k in range(frames)])


def fake_preview(prompt: str, seed: int, steps: int, step: int, who: str = "") -> FloatArray:
    """The preview of a picture after step number ``step``, (C, H, W): less gray with every step."""
    share = np.float32((step + 1) / steps)
    preview_CHW: FloatArray = fake_image(prompt, seed, steps, who) * share + np.float32(0.5) * (1 - share)
    return preview_CHW


class FakeRuntime:
    """Draws hashes; see the module's description. It is stepwise."""

    def __init__(self, student: Student | None = None) -> None:
        self.name = "fake"
        self.student = student or fake_student()
        self._who = f"{student.id}/{student.version}/" if student else ""
        self.max_batch = MAX_BATCH

    @property
    def lengths(self) -> Mapping[Size, Lengths]:
        """For a video student: see ``VideoRuntime.lengths``."""
        own = self.student.image.frames
        return {} if own is None else {own_size(self.student): Lengths(1, MOST_FRAMES, 4)}

    def draw(
        self, prompts: Sequence[str], seeds: Sequence[int], steps: int, size: Size | None = None,
        frames: int | None = None,
    ) -> FloatArray:  # fmt: skip
        """images_BCHW of the prompts and seeds, or videos_BFCHW; see ``Runtime.draw``."""
        sized = {} if size is None and frames is None else {"size": size, "frames": frames}
        return self.draw_watched(prompts, seeds, steps, lambda step, preview: None, **sized)  # type: ignore[arg-type]

    def draw_watched(
        self, prompts: Sequence[str], seeds: Sequence[int], steps: int, watch: Watch, size: Size | None = None,
        frames: int | None = None,
    ) -> FloatArray:  # fmt: skip
        """The same, watched; see ``StepwiseRuntime.draw_watched``."""
        assert size in (None, own_size(self.student))
        frames = frames or self.student.image.frames
        self._check(prompts, seeds, steps)
        words = " ".join(prompts)
        _misbehave(words, len(prompts))
        for step in range(steps):
            _sleep(STEP, words)
            time.sleep(sum(map(float, IMAGE.findall(words))))
            if step < steps - 1:
                watch(step, lambda rows, step=step: self._previews(prompts, seeds, steps, step, rows))  # type: ignore[misc]
        images_BCHW = np.stack([self._drawn(p, s, steps, frames) for p, s in zip(prompts, seeds, strict=True)])
        images_BCHW *= np.float32(self.student.baked.get("dim", 1.0))
        images_BCHW[["fake:nan" in prompt for prompt in prompts]] = np.nan
        return images_BCHW

    def score(self, images_BCHW: FloatArray, prompts: Sequence[str]) -> dict[str, FloatArray]:
        """Two scores of each picture: its redness is the trained score, its blueness the held-out one.

        A student with a baked ``dim`` below 1 scores worse.
        """
        _sleep(SCORE, " ".join(prompts))
        means_BC = images_BCHW.mean(axis=(2, 3), dtype=np.float32) * 4 - 2
        return {"trained": means_BC[:, 0], "heldout": means_BC[:, 2]}

    def _previews(
        self, prompts: Sequence[str], seeds: Sequence[int], steps: int, step: int, rows: Sequence[int]
    ) -> FloatArray:
        if self.student.image.frames is None:
            return np.stack([fake_preview(prompts[row], seeds[row], steps, step, self._who) for row in rows])
        firsts = [fake_preview(f"{prompts[row]} 0", seeds[row], steps, step, self._who) for row in rows]
        return np.stack(firsts)[:, None]

    def _drawn(self, prompt: str, seed: int, steps: int, frames: int | None) -> FloatArray:
        if frames is None:
            return fake_image(prompt, seed, steps, self._who)
        return fake_video(prompt, seed, steps, frames, self._who)

    def _check(self, prompts: Sequence[str], seeds: Sequence[int], steps: int) -> None:
        if len(prompts) != len(seeds):
            raise ValueError(f"{len(prompts)} prompts and {len(seeds)} seeds: accepted is one seed for each prompt")
        if not 1 <= len(prompts) <= self.max_batch:
            raise ValueError(f"batch of {len(prompts)}: accepted is 1 to {self.max_batch}")
        if any(not 0 <= seed < SEED_LIMIT for seed in seeds):
            raise ValueError("a seed is out of range: accepted is 0 <= seed < 2^32")
        if steps not in self.student.steps:
            raise ValueError(f"steps is {steps}: accepted is {self.student.steps}")


def _sleep(words_of_it: re.Pattern[str], words: str) -> None:
    time.sleep(max([float(seconds) for seconds in words_of_it.findall(words)], default=0.0))


def _misbehave(words: str, images: int) -> None:
    _sleep(SLEEP, words)
    if "fake:die" in words:
        os.kill(os.getpid(), signal.SIGKILL)
    if "fake:oom" in words and images > 2:
        raise MemoryError
    if "fake:raise" in words:
        raise RuntimeError("the prompt asked for a failure")

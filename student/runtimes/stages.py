"""The names of a staged student's graphs, and the loop that runs them step by step, without torch.

Legend: B images, C latent channels, H x W latent cells (a video has frames F before them).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from student.bundle import Student
from student.noise import noise
from student.runtimes.batches import split
from student.runtimes.experts import STEPS, stages_of, step_stage
from student.runtimes.manifest import DECODER, TEXT
from student.runtimes.runtime import FloatArray, Watch
from student.runtimes.session import Session
from student.sampler import denoise
from student.tokens import PromptTokens

POOLED = frozenset({"flux", "sd3"})  # families whose text encoders give one more vector for the whole prompt
Opener = Callable[[Path], Session]


def text_outputs(family: str) -> tuple[str, ...]:
    """The outputs of the text stage, which are inputs of the step stage."""
    return ("tokens", "pooled") if family in POOLED else ("tokens",)


class StagedGraphs:
    """The compiled stages of one student, for every step count that it has sigmas for.

    ``in_torch`` has the stages that are not compiled, ``boundary`` is the manifest's. ``together`` are the batch sizes
    that do not change an image's bytes (see ``batches.split``); if empty, a batch goes through each stage in one call.
    """

    def __init__(
        self, bundle: Path, student: Student, files: Mapping[str, Path], open_: Opener,
        in_torch: Mapping[str, Session] = MappingProxyType({}), boundary: float | None = None,
    ) -> None:  # fmt: skip
        self.tokens = PromptTokens(bundle, student.max_tokens, student.family)
        self.together: tuple[int, ...] = ()
        self.boundary = boundary
        self._student = student
        self.stages = stages_of(student, boundary)
        self._sessions = {stage: in_torch[stage] if stage in in_torch else open_(files[stage]) for stage in self.stages}

    def draw(self, prompts: Sequence[str], seeds: Sequence[int], steps: int, watch: Watch | None = None) -> FloatArray:
        """images_BCHW, with one call of the step graph after another; ``watch`` as for ``draw_watched``."""
        text = self._placed(self.encode(prompts))

        def on_step(i: int, sigma: float, x_BCHW: Any, v_BCHW: Any) -> None:
            if watch is not None and i < steps - 1:
                watch(i, lambda rows: self.decode((x_BCHW - v_BCHW * np.float32(sigma))[list(rows)]))

        start_BCHW: Any = noise(seeds, self._student.latents.shape)
        x_BCHW: Any = denoise(
            lambda x, sigma: self.velocity(x, sigma, text), start_BCHW, self._student.sigmas[steps], on_step
        )
        return self.decode(x_BCHW)

    def encode(self, prompts: Sequence[str]) -> dict[str, Any]:
        """The text stage: the text inputs of the step stage, by name."""
        ids = dict(zip(self.tokens.names, self.tokens.encode(prompts), strict=True))
        names = text_outputs(self._student.family)
        return dict(zip(names, self._run(TEXT, names, ids), strict=True))

    def velocity(self, x_BCHW: Any, sigma: float, text: Mapping[str, Any]) -> Any:
        """The step stage at one sigma for the whole batch."""
        sigma_B = np.full(len(x_BCHW), sigma, dtype=np.float32)
        stage = step_stage(sigma, self.boundary)
        return self._run(stage, ["velocity"], {"latents": x_BCHW, "sigma": sigma_B, **text})[0]

    def decode(self, x_BCHW: Any) -> FloatArray:
        """The decoder stage."""
        images_BCHW: FloatArray = self._run(DECODER, ["images"], {"latents": x_BCHW})[0]
        return images_BCHW

    def _placed(self, text: Mapping[str, Any]) -> Mapping[str, Any]:
        """The text on the step graphs' device, if that is another: every step reads the same text."""
        places = [getattr(session, "place", None) for stage, session in self._sessions.items() if stage in STEPS]
        place = places[0]
        if place is None or None in places or self.together:
            return text
        return {name: place(array) for name, array in text.items()}

    def _run(self, stage: str, names: Sequence[str], feed: Mapping[str, Any]) -> list[Any]:
        session = self._sessions[stage]
        if not self.together:
            return list(session.run(names, feed))
        parts = split(len(next(iter(feed.values()))), self.together)
        rows = [session.run(names, {name: array[part] for name, array in feed.items()}) for part in parts]
        return [np.concatenate(answers) for answers in zip(*rows, strict=True)]

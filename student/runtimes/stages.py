"""The names of a staged student's graphs, and the loop that runs them: torch-free, step by step.

Legend: B images, C latent channels, H x W latent cells.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from student.bundle import Student
from student.noise import noise
from student.runtimes.runtime import FloatArray
from student.runtimes.session import open_session
from student.sampler import denoise
from student.tokens import PromptTokens

TEXT, STEP, DECODER = STAGES = ("text", "step", "decoder")


class StagedGraphs:
    """The compiled stages of one student, for every step count that it knows sigmas of."""

    def __init__(self, bundle: Path, student: Student, files: Mapping[str, Path], threads: int) -> None:
        self.tokens = PromptTokens(bundle, student.max_tokens, student.family)
        self._student = student
        self._sessions = {stage: open_session(files[stage], threads) for stage in STAGES}

    def draw(self, prompts: Sequence[str], seeds: Sequence[int], steps: int) -> FloatArray:
        """images_BCHW, one call of the step's graph after the other."""
        ids = dict(zip(self.tokens.names, self.tokens.encode(prompts), strict=True))
        tokens_BLE, pooled_BP = self._sessions[TEXT].run(["tokens", "pooled"], ids)

        def velocity(x_BCHW: Any, sigma: float) -> Any:
            sigma_B = np.full(len(prompts), sigma, dtype=np.float32)
            feed = {"latents": x_BCHW, "sigma": sigma_B, "tokens": tokens_BLE, "pooled": pooled_BP}
            return self._sessions[STEP].run(["velocity"], feed)[0]

        start_BCHW: Any = noise(seeds, self._student.latents.shape)
        x_BCHW: Any = denoise(velocity, start_BCHW, self._student.sigmas[steps])
        images_BCHW: FloatArray = self._sessions[DECODER].run(["images"], {"latents": x_BCHW})[0]
        return images_BCHW

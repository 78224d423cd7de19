"""The bundle's own pipeline behind the runtime's protocol: serves a student as soon as it is trained.

Only this module and what it imports need torch; ``load`` imports it when it is asked for.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from student.bundle import Student
from student.families.find import family_of_student
from student.noise import noise
from student.pipeline import open_pipeline
from student.runtimes.runtime import FloatArray, check_call
from student.runtimes.scoring import Scorers
from student.sampler import denoise
from student.tokens import PromptTokens


class TorchRuntime:
    """Draws image by image: torch picks another matrix kernel for another batch, and bytes would follow it."""

    name = "torch"
    max_batch = 8

    def __init__(self, bundle: Path, student: Student, threads: int) -> None:
        torch.set_num_threads(threads)
        self.student = student
        self._tokens = PromptTokens(bundle, student.max_tokens, student.family)
        self._model = family_of_student(open_pipeline(bundle), student)
        self.scorers = Scorers(bundle, student, threads)

    def draw(self, prompts: Sequence[str], seeds: Sequence[int], steps: int) -> FloatArray:
        """See ``Runtime.draw``."""
        check_call(self.student, prompts, seeds, steps, self.max_batch)
        x_BCHW = torch.from_numpy(noise(seeds, self.student.latents.shape))
        ids = [torch.from_numpy(ids_BL) for ids_BL in self._tokens.encode(prompts)]
        rows = [self._draw([part[b : b + 1] for part in ids], x_BCHW[b : b + 1], steps) for b in range(len(prompts))]
        images_BCHW: FloatArray = torch.cat(rows).numpy()
        return images_BCHW

    def score(self, images_BCHW: FloatArray, prompts: Sequence[str]) -> dict[str, FloatArray]:
        """See ``Runtime.score``."""
        return self.scorers.score(images_BCHW, prompts)

    @torch.inference_mode()
    def _draw(self, ids: list[torch.Tensor], x: torch.Tensor, steps: int) -> torch.Tensor:
        condition = self._model.encode_ids(*ids)
        x = denoise(lambda x, sigma: self._model.velocity(x, sigma, condition), x, self.student.sigmas[steps])
        return self._model.decode(x)

"""A student in ONNX Runtime on the CPU, fused (one call from token ids and noise to images) or staged; no torch.

Legend: B images.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from student.bundle import Student, verify_files
from student.noise import noise
from student.runtimes.manifest import RUNTIMES, RuntimeManifest, check_runtime, read_manifest
from student.runtimes.runtime import FloatArray, check_call
from student.runtimes.scoring import Scorers
from student.runtimes.session import open_session
from student.runtimes.stages import StagedGraphs
from student.tokens import PromptTokens

FUSED_FP32, STAGED_FP32 = FORMS = ("onnx-fused-fp32", "onnx-staged-fp32")
OUTPUT = "images"


class FusedGraphs:
    """The compiled graphs of one student, one for each step count, with the tokens and the noise that they take."""

    def __init__(self, bundle: Path, student: Student, files: Mapping[int, Path], threads: int) -> None:
        self.tokens = PromptTokens(bundle, student.max_tokens)
        self._shape = student.latents.shape
        self._sessions = {steps: open_session(file, threads) for steps, file in files.items()}

    def draw(self, prompts: Sequence[str], seeds: Sequence[int], steps: int) -> FloatArray:
        """images_BCHW of one call of the graph."""
        ids = zip(self.tokens.names, self.tokens.encode(prompts), strict=True)
        feed = {**dict(ids), "noise": noise(seeds, self._shape)}
        images_BCHW: FloatArray = self._sessions[steps].run([OUTPUT], feed)[0]
        return images_BCHW


def compiled_form(bundle: Path) -> str:
    """The ONNX runtime of a bundle: the fused one where both are there or none."""
    return next((name for name in FORMS if (bundle / RUNTIMES / name).is_dir()), FUSED_FP32)


def _open(bundle: Path, student: Student, manifest: RuntimeManifest, threads: int) -> FusedGraphs | StagedGraphs:
    folder = bundle / RUNTIMES / manifest.name
    if manifest.form == "staged":
        stages = {name: folder / graph.file for name, graph in manifest.stages.items()}
        return StagedGraphs(bundle, student, stages, threads)
    files = {steps: folder / graph.file for steps, graph in manifest.graphs.items()}
    return FusedGraphs(bundle, student, files, threads)


class OnnxRuntime:
    """Draws a whole batch in one call where this machine's kernels allow it, else image by image.

    The kernels of a matrix product may be chosen by the number of its rows, so whether an image depends on its batch
    mates is a property of the machine. It is tried out once, at every batch size, which warms each of them up too.
    """

    max_batch = 8

    def __init__(self, bundle: Path, student: Student, threads: int, name: str | None = None) -> None:
        name = name or compiled_form(bundle)
        folder = bundle / RUNTIMES / name
        manifest = read_manifest(folder)
        check_runtime(folder, student, manifest)
        verify_files(bundle, student, inside=("tokenizer", "tokenizer_2", "tokenizer_3"))
        self.name = name
        self.student = student
        self._graphs = _open(bundle, student, manifest, threads)
        self._scorers = Scorers(bundle, student, self._graphs.tokens, threads)
        started = time.perf_counter()
        self.batches_are_independent = self._warm_up()
        self.warm_up_s = time.perf_counter() - started

    def draw(self, prompts: Sequence[str], seeds: Sequence[int], steps: int) -> FloatArray:
        """See ``Runtime.draw``."""
        check_call(self.student, prompts, seeds, steps, self.max_batch)
        if self.batches_are_independent:
            return self._graphs.draw(prompts, seeds, steps)
        return np.concatenate([self._graphs.draw([p], [s], steps) for p, s in zip(prompts, seeds, strict=True)])

    def score(self, images_BCHW: FloatArray, prompts: Sequence[str]) -> dict[str, FloatArray]:
        """See ``Runtime.score``."""
        return self._scorers.score(images_BCHW, prompts)

    def _warm_up(self) -> bool:
        """Draw batches of every size; True if each image is bit for bit the one that is drawn alone."""
        prompts = [" ".join(["a"] * b) for b in range(self.max_batch)]
        equal = True
        for steps in self.student.steps:
            alone = np.concatenate([self._graphs.draw([prompts[b]], [b], steps) for b in range(self.max_batch)])
            for size in range(2, self.max_batch + 1):
                together = self._graphs.draw(prompts[:size], range(size), steps)
                equal = equal and np.array_equal(together, alone[:size])
        self.score(alone[:1], prompts[:1])
        return equal

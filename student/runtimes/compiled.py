"""A student that export has compiled, fused or staged, whichever library opens its graphs; no torch.

Legend: B images.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from student.bundle import Student, verify_files
from student.noise import noise
from student.runtimes.machine import check_machine, facts
from student.runtimes.manifest import RUNTIMES, RuntimeManifest, check_runtime, read_manifest
from student.runtimes.runtime import FloatArray, Watch, check_call
from student.runtimes.scoring import Scorers
from student.runtimes.stages import Opener, StagedGraphs
from student.tokens import TOKENIZERS, PromptTokens

OUTPUT = "images"


class Graphs(Protocol):
    """What draws: a whole batch in one call of ``draw``."""

    @property
    def tokens(self) -> PromptTokens: ...
    def draw(self, prompts: Sequence[str], seeds: Sequence[int], steps: int) -> FloatArray: ...


class FusedGraphs:
    """The compiled graphs of one student, one for each step count, with the tokens and the noise that they take."""

    def __init__(self, bundle: Path, student: Student, files: Mapping[int, Path], open_: Opener) -> None:
        self.tokens = PromptTokens(bundle, student.max_tokens, student.family)
        self._shape = student.latents.shape
        self._sessions = {steps: open_(file) for steps, file in files.items()}

    def draw(self, prompts: Sequence[str], seeds: Sequence[int], steps: int) -> FloatArray:
        """images_BCHW of one call of the graph."""
        ids = zip(self.tokens.names, self.tokens.encode(prompts), strict=True)
        feed = {**dict(ids), "noise": noise(seeds, self._shape)}
        images_BCHW: FloatArray = self._sessions[steps].run([OUTPUT], feed)[0]
        return images_BCHW


def open_graphs(
    bundle: Path, student: Student, folder: Path, manifest: RuntimeManifest, open_: Opener
) -> FusedGraphs | StagedGraphs:
    """The graphs that a manifest names; nothing is checked."""
    if manifest.form == "staged":
        stages = {name: folder / graph.file for name, graph in manifest.stages.items()}
        return StagedGraphs(bundle, student, stages, open_)
    files = {steps: folder / graph.file for steps, graph in manifest.graphs.items()}
    return FusedGraphs(bundle, student, files, open_)


def checked_manifest(
    bundle: Path, student: Student, name: str, libraries: Mapping[str, str] | None = None
) -> RuntimeManifest:
    """The manifest of a runtime that belongs to this student, this machine and these ``libraries``' versions.

    Raises:
        BundleError: says what does not match.
    """
    folder = bundle / RUNTIMES / name
    manifest = read_manifest(folder)
    if manifest.requires:
        check_machine(folder, manifest.requires, {**facts(), **(libraries or {})})
    check_runtime(folder, student, manifest)
    verify_files(bundle, student, inside=tuple(TOKENIZERS[student.family].values()))
    return manifest


class CompiledRuntime:
    """Draws a whole batch in one call where this machine's kernels allow it, else image by image.

    The kernels of a matrix product may be chosen by the number of its rows, so whether an image depends on its batch
    mates is a property of the machine. It is tried out once, at every batch size, which warms each of them up too.
    """

    max_batch = 8

    def __init__(self, bundle: Path, student: Student, threads: int, name: str, graphs: Graphs) -> None:
        self.name = name
        self.student = student
        self._graphs = graphs
        self._scorers = Scorers(bundle, student, graphs.tokens, threads)
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
        if self.student.image.frames is None:
            self.score(alone[:1], prompts[:1])
        return equal


class SteppedRuntime(CompiledRuntime):
    """A staged one: its steps can be looked at, and it can be stopped between them."""

    _graphs: StagedGraphs

    def draw(self, prompts: Sequence[str], seeds: Sequence[int], steps: int) -> FloatArray:
        """See ``Runtime.draw``."""
        return self.draw_watched(prompts, seeds, steps, None)

    def draw_watched(self, prompts: Sequence[str], seeds: Sequence[int], steps: int, watch: Watch | None) -> FloatArray:
        """See ``StepwiseRuntime.draw_watched``."""
        check_call(self.student, prompts, seeds, steps, self.max_batch)
        return self._graphs.draw(prompts, seeds, steps, watch)

    def _warm_up(self) -> bool:
        independent = super()._warm_up()
        self._graphs.one_by_one = not independent
        return independent


def make_runtime(
    bundle: Path, student: Student, threads: int, name: str, open_: Opener
) -> CompiledRuntime | SteppedRuntime:
    """The runtime of one folder, checked and warm; stepwise where it is staged.

    Raises:
        BundleError: it does not belong to this student or machine, or does not open.
    """
    manifest = checked_manifest(bundle, student, name)
    graphs = open_graphs(bundle, student, bundle / RUNTIMES / name, manifest, open_)
    kind = SteppedRuntime if isinstance(graphs, StagedGraphs) else CompiledRuntime
    return kind(bundle, student, threads, name, graphs)

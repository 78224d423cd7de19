"""A student that export has compiled, fused or staged, whichever library opens its graphs; without torch.

Legend: B images.
"""

from __future__ import annotations

import functools
import importlib.util
import time
from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from types import MappingProxyType
from typing import Protocol

import numpy as np

from student.bundle import BundleError, Student
from student.files import verify_files
from student.noise import noise
from student.prompts import TOKENIZERS
from student.runtimes.batches import independent, split
from student.runtimes.buckets import Bucket, files_of, in_buckets
from student.runtimes.lengths import Lengths, compiled_lengths
from student.runtimes.machine import check_machine, facts
from student.runtimes.manifest import RUNTIMES, RuntimeManifest, check_runtime, read_manifest
from student.runtimes.runtime import CpuSharing, FloatArray, Watch, check_call
from student.runtimes.scoring import Scorers
from student.runtimes.session import Session
from student.runtimes.sizes import Size, own_size, refusal, size_name
from student.runtimes.stages import Opener, StagedGraphs
from student.tokens import PromptTokens

OUTPUT = "images"
CPU_BATCH = 8  # pictures in one call on a CPU, where more are no faster; videos are drawn one by one
IN_TORCH = ("torch", "diffusers", "transformers")  # what a stage needs that is not compiled


class Graphs(Protocol):
    """Compiled graphs that generate a whole batch in one call of ``draw``."""

    @property
    def tokens(self) -> PromptTokens: ...
    def draw(self, prompts: Sequence[str], seeds: Sequence[int], steps: int) -> FloatArray: ...


def cpu_batch(student: Student) -> int:
    """The number of pictures or videos in one call on a CPU."""
    return 1 if (student.image.frames or 1) > 1 else CPU_BATCH


class FusedGraphs:
    """The compiled graphs of one student, one for each step count, with their tokens and noise."""

    def __init__(self, bundle: Path, student: Student, files: Mapping[int, Path], open_: Opener) -> None:
        self.tokens = PromptTokens(bundle, student.max_tokens, student.family)
        self._shape = student.latents.shape
        self._sessions = {steps: open_(file) for steps, file in files.items()}

    def draw(self, prompts: Sequence[str], seeds: Sequence[int], steps: int) -> FloatArray:
        """images_BCHW from one call of the graph."""
        ids = zip(self.tokens.names, self.tokens.encode(prompts), strict=True)
        feed = {**dict(ids), "noise": noise(seeds, self._shape)}
        images_BCHW: FloatArray = self._sessions[steps].run([OUTPUT], feed)[0]
        return images_BCHW


def stages_in_torch(
    bundle: Path, student: Student, manifest: RuntimeManifest, threads: int, device: str = "cpu"
) -> Mapping[str, Session]:
    """The stages that have no compiled form; torch is only imported if there is one."""
    if not manifest.in_torch:
        return {}
    from student.runtimes.torch_stage import torch_stages

    return torch_stages(bundle, student, manifest.in_torch, threads, device)


def checked_manifest(
    bundle: Path, student: Student, name: str, libraries: Mapping[str, str] | None = None
) -> RuntimeManifest:
    """The manifest of a runtime that belongs to this student, this machine and these versions of ``libraries``.

    Raises:
        BundleError: it does not; the message says what differs.
    """
    folder = bundle / RUNTIMES / name
    manifest = read_manifest(folder)
    if manifest.requires:
        check_machine(folder, manifest.requires, {**facts(), **(libraries or {})})
    check_runtime(folder, student, manifest)
    if manifest.in_torch:
        if missing := [name for name in IN_TORCH if importlib.util.find_spec(name) is None]:
            stages = ", ".join(f"{stage} ({reason})" for stage, reason in manifest.in_torch.items())
            raise BundleError(f"{folder} runs a stage in torch, and {missing[0]} is not installed: {stages}")
        verify_files(bundle, student)
    else:
        verify_files(bundle, student, inside=tuple(TOKENIZERS[student.family].values()))
    return manifest


class CompiledRuntime:
    """Generates a whole batch in one call if this machine's kernels allow it, else in the largest calls that they do.

    A library may choose the kernel of a matrix product by its number of rows, so whether an image depends on the rest
    of its batch is a property of the machine. It is tested once at every batch size, which also warms them up.
    """

    def __init__(
        self, bundle: Path, student: Student, threads: int, name: str, graphs: Graphs,
        others: Mapping[Bucket, Graphs] = MappingProxyType({}), max_batch: int | None = None,
        cpu_sharing: CpuSharing | None = None,
    ) -> None:  # fmt: skip
        self.name = name
        self.cpu_sharing = cpu_sharing
        videos = any((bucket.frames or 1) > 1 for bucket in others)
        self.max_batch = max_batch or (1 if videos else cpu_batch(student))
        self.student = student
        self._graphs = graphs
        self._others = others
        self.scorers = Scorers(bundle, student, threads)
        started = time.perf_counter()
        self.together = self._warm_up()
        self.warm_up_s = time.perf_counter() - started

    @property
    def sizes(self) -> tuple[Size, ...]:
        """See ``SizedRuntime.sizes``."""
        return tuple(dict.fromkeys((own_size(self.student), *(bucket.size for bucket in self._others))))

    @property
    def lengths(self) -> Mapping[Size, Lengths]:
        """For a video student: those that each size has graphs for."""
        own = self.student.image.frames
        if own is None:
            return {}
        there = [Bucket(own_size(self.student)), *self._others]
        return {
            size: compiled_lengths(bucket.frames or own for bucket in there if bucket.size == size)
            for size in self.sizes
        }

    def draw(
        self, prompts: Sequence[str], seeds: Sequence[int], steps: int, size: Size | None = None,
        frames: int | None = None,
    ) -> FloatArray:  # fmt: skip
        """See ``Runtime.draw``, and ``VideoRuntime.draw``."""
        check_call(self.student, prompts, seeds, steps, self.max_batch)
        graphs = self._at(size, frames)
        parts = split(len(prompts), self.together)
        return np.concatenate([graphs.draw(prompts[part], seeds[part], steps) for part in parts])

    def _at(self, size: Size | None, frames: int | None) -> Graphs:
        own = self.student.image.frames
        bucket = Bucket(size or own_size(self.student), None if frames == own else frames)
        if bucket == Bucket(own_size(self.student)):
            return self._graphs
        if bucket.size not in self.sizes:
            raise ValueError(refusal(self.student.id, self.sizes))
        if bucket not in self._others:
            raise ValueError(self._refused_length(bucket.size, frames or own))
        return self._others[bucket]

    def _refused_length(self, size: Size, frames: int | None) -> str:
        known = self.lengths.get(size)
        accepted = "images only" if known is None else f"{', '.join(map(str, known.compiled))} at {size_name(size)}"
        return f"frames is {frames}: {self.student.id} was compiled for {accepted}"

    def score(self, images_BCHW: FloatArray, prompts: Sequence[str]) -> dict[str, FloatArray]:
        """See ``Runtime.score``."""
        return self.scorers.score(images_BCHW, prompts)

    @property
    def batches_are_independent(self) -> bool:
        """Whether every batch is generated in one call."""
        return len(self.together) == self.max_batch

    @property
    def _own_graphs(self) -> tuple[int, ...]:
        """The step counts that have graphs of their own."""
        return self.student.steps

    def _warm_up(self) -> tuple[int, ...]:
        """The batch sizes whose images are bit for bit those generated alone, at every size and step count."""
        found = self._independent(self.student.steps)  # whoever records a loop does so here, for each step count
        if self.cpu_sharing is not None:
            found = self._independent_when_shared(self.cpu_sharing, found)
        self.score(self._graphs.draw(["a"], [0], self.student.steps[0]), ["a"])
        return tuple(sorted(found))

    def _independent(self, step_counts: Sequence[int]) -> set[int]:
        every = range(1, self.max_batch + 1)
        found = set(every)
        for graphs, steps in product((*self._others.values(), self._graphs), step_counts):
            found &= set(independent(lambda p, s, graphs=graphs, steps=steps: graphs.draw(p, s, steps), every))  # type: ignore[misc]
        return found

    def _independent_when_shared(self, cpu_sharing: CpuSharing, alone: set[int]) -> set[int]:
        """The same with fewer threads; these are not used if they change a picture."""
        drawn = self._drawn_alone()
        cpu_sharing.crowded = True
        cpu_sharing.allowed = all(map(np.array_equal, drawn, self._drawn_alone()))
        both = alone & self._independent(self._own_graphs)
        cpu_sharing.crowded = False
        return both if cpu_sharing.allowed else alone

    def _drawn_alone(self) -> list[FloatArray]:
        every = product((*self._others.values(), self._graphs), self._own_graphs)
        return [graphs.draw(["a"], [0], steps) for graphs, steps in every]


class SteppedRuntime(CompiledRuntime):
    """A staged runtime: it has previews, and can be stopped between steps."""

    _graphs: StagedGraphs
    _others: Mapping[Bucket, StagedGraphs]

    def draw(
        self, prompts: Sequence[str], seeds: Sequence[int], steps: int, size: Size | None = None,
        frames: int | None = None,
    ) -> FloatArray:  # fmt: skip
        """See ``Runtime.draw``, and ``VideoRuntime.draw``."""
        check_call(self.student, prompts, seeds, steps, self.max_batch)
        return self._at(size, frames).draw(prompts, seeds, steps)

    def draw_watched(
        self, prompts: Sequence[str], seeds: Sequence[int], steps: int, watch: Watch, size: Size | None = None,
        frames: int | None = None,
    ) -> FloatArray:  # fmt: skip
        """See ``StepwiseRuntime.draw_watched``."""
        check_call(self.student, prompts, seeds, steps, self.max_batch)
        graphs = self._at(size, frames)
        assert isinstance(graphs, StagedGraphs)
        return graphs.draw(prompts, seeds, steps, watch)

    @property
    def _own_graphs(self) -> tuple[int, ...]:
        """One is enough: the same graphs run for each."""
        return (min(self.student.steps),)

    def _warm_up(self) -> tuple[int, ...]:
        found = super()._warm_up()
        for graphs in (self._graphs, *self._others.values()):
            graphs.together = () if len(found) == self.max_batch else found
        return found


def make_runtime(
    bundle: Path, student: Student, threads: int, name: str, open_: Opener, cpu_sharing: CpuSharing | None = None
) -> CompiledRuntime | SteppedRuntime:
    """The runtime of one folder, checked and warmed up; stepwise if it is staged. ``cpu_sharing`` is shared with the
    sessions of ``open_``.

    Raises:
        BundleError: it does not belong to this student or machine, or does not open.
    """
    manifest = checked_manifest(bundle, student, name)
    folder, open_once = bundle / RUNTIMES / name, functools.cache(open_)  # every bucket reads the same text stage
    if manifest.form != "staged":
        files = {steps: folder / graph.file for steps, graph in manifest.graphs.items()}
        return CompiledRuntime(
            bundle, student, threads, name, FusedGraphs(bundle, student, files, open_), cpu_sharing=cpu_sharing
        )
    in_torch = stages_in_torch(bundle, student, manifest, threads)

    def at(bucket: Bucket | None, there: Student) -> StagedGraphs:
        files = files_of(folder, manifest, bucket)
        return StagedGraphs(bundle, there, files, open_once, in_torch, manifest.boundary)

    others = {bucket: at(bucket, there) for bucket, there in in_buckets(student, manifest).items()}
    return SteppedRuntime(bundle, student, threads, name, at(None, student), others, cpu_sharing=cpu_sharing)

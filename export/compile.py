"""Compiles a student to one verified runtime in its bundle: graphs, conversion, proof, manifest; all or nothing."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from export.calibrate import calibration_feeds
from export.errors import ExportError, NoOnnxForm
from export.fused import fused_part
from export.graph import OPSET, Part, shapes_of
from export.keys import cache_key, stage_keys
from export.quantise import PRECISIONS as QUANTISED
from export.quantise import quantise
from export.request import Request
from export.staged import bucket_sigmas, in_bucket, staged_parts
from export.store import Store, Stored, versions
from export.targets import Converted, Target
from export.to_tensorrt import TensorRT, profiles
from export.verify import TOLERANCES, Score, prove
from export.writing import whole_folder
from rewards.serving import open_reward
from student.bundle import BundleError, Student
from student.families.family import Family
from student.families.find import family_of_student
from student.files import sha256
from student.pipeline import open_pipeline
from student.runtimes.buckets import read_bucket, stage_name
from student.runtimes.compiled import FusedGraphs
from student.runtimes.experts import STEPS, step_stage
from student.runtimes.manifest import (
    RUNTIMES,
    STAGE_NAMES,
    TEXT,
    Graph,
    Parity,
    RuntimeManifest,
    StageError,
    check_runtime,
    read_manifest,
    write_manifest,
)
from student.runtimes.scoring import Scorers
from student.runtimes.stages import Opener, StagedGraphs
from student.runtimes.torch_stage import torch_stages
from student.tokens import PromptTokens

Proof = tuple[dict[int, Parity], dict[str, StageError], dict[str, dict[int, Parity]]]


@dataclass(frozen=True)
class Made:
    """One stage of a finished export, for the table."""

    name: str
    bytes: int
    seconds: float
    reused: bool


@dataclass(frozen=True)
class Outcome:
    """A runtime's folder; ``made`` is empty if it already existed."""

    folder: Path
    manifest: RuntimeManifest
    made: tuple[Made, ...]
    proof_s: float = 0.0


def compile_student(request: Request, target: Target) -> Outcome:
    """Make the runtime, or return the one that is already there.

    Raises:
        ExportError: it cannot be made here, or failed its proof; then nothing is written.
    """
    folder = request.bundle / RUNTIMES / target.folder(request)
    keys = stage_keys(request)
    whole_key = cache_key(request, target, keys)
    if not request.force and (found := _current(folder, request, whole_key)):
        return Outcome(folder, found, ())
    if reason := target.refuse(request):
        raise ExportError(reason)
    store = Store(request.bundle, fresh=request.force)
    outcome = _Compilation(request, target, store).run(folder, keys, whole_key)
    store.clear()
    return outcome


def _current(folder: Path, request: Request, whole_key: str) -> RuntimeManifest | None:
    """The manifest of an existing runtime that serving accepts and that would come out the same again."""
    try:
        manifest = read_manifest(folder)
        check_runtime(folder, request.student, manifest)
    except BundleError:
        return None
    return manifest if manifest.cache_key == whole_key else None


class _Compilation:
    """One export in progress."""

    def __init__(self, request: Request, target: Target, store: Store) -> None:
        self._request, self._target, self._store = request, target, store
        self._student = request.student
        self._tokens = PromptTokens(request.bundle, self._student.max_tokens, self._student.family)
        self._pipe = open_pipeline(request.bundle)
        self._made: list[Made] = []
        self._not_quantised: dict[str, str] = {}
        self._in_torch: dict[str, str] = {}

    def run(self, folder: Path, keys: Mapping[str, str], whole_key: str) -> Outcome:
        graphs = self._graphs(keys)
        with whole_folder(folder) as unproven:
            converted = {name: self._convert(name, stored, unproven) for name, stored in graphs.items()}
            start = time.monotonic()
            parity, errors, buckets = self._prove(converted)
            proof_s = time.monotonic() - start
            for left_over in unproven.glob(".*"):
                left_over.unlink()
            manifest = self._manifest(folder.name, graphs, converted, parity, errors, buckets, whole_key)
            write_manifest(unproven, manifest)
        return Outcome(folder, manifest, tuple(self._made), proof_s)

    def _graphs(self, keys: Mapping[str, str]) -> dict[str, Stored]:
        """All stages that the exporter accepts; the others stay in torch, if that leaves something to compile."""
        graphs: dict[str, Stored] = {}
        for name, part in self._parts().items():
            try:
                graphs[name] = self._graph(name, part, keys[name])
            except NoOnnxForm as error:
                if self._request.form == "fused" or self._is_quantised(name):
                    raise
                self._in_torch[name] = f"{error}"
                self._request.say(f"{name} stays in torch: {error}")
        if not graphs:
            raise ExportError(f"nothing can be compiled: {'; '.join(self._in_torch.values())}")
        return graphs

    def _parts(self) -> dict[str, Part]:
        if self._request.form == "staged":
            return staged_parts(self._model(), self._student, self._tokens, self._request.buckets)
        return {
            f"{steps}-steps": fused_part(self._pipe, self._student, self._tokens, steps)
            for steps in self._student.steps
        }

    def _model(self) -> Family:
        return family_of_student(self._pipe, self._student)

    def _graph(self, name: str, part: Part, key: str) -> Stored:
        start = time.monotonic()
        stored = self._store.get(key, part.export)
        self._done(f"{name} (graph)", stored.path, start, stored.reused)
        return stored

    def _convert(self, name: str, stored: Stored, folder: Path) -> Converted:
        start = time.monotonic()
        if self._is_quantised(name):
            converted = self._quantise(name, stored.path, folder)
        else:
            converted = self._target.convert(self._request, name, stored.path, folder / name)
        self._done(name, converted.file, start, reused=False)
        return converted

    def _is_quantised(self, name: str) -> bool:
        return self._request.precision in QUANTISED and name.partition("-")[0] in STEPS

    def _quantise(self, name: str, graph: Path, folder: Path) -> Converted:
        """int8 is what ONNX Runtime opens; the rest of an fp8 graph is made bfloat16 by the target."""
        precision, feeds = self._request.precision, self._feeds(name)
        file = folder / (f"{name}.onnx" if precision == "int8" else f".{name}.{precision}.onnx")
        choice = quantise(graph, file, feeds, precision)
        self._request.say(f"{name}: {choice}")
        self._not_quantised |= choice.reasons()
        if precision == "int8":
            return Converted(file, file)
        return self._target.convert(self._request, name, file, folder / name)

    def _feeds(self, name: str) -> Iterator[dict[str, Any]]:
        """The inputs of this step graph: of two experts, each is only called on its side of the boundary."""
        model, (stage, _, bucket) = self._model(), name.partition("-")
        student = in_bucket(model, self._student, read_bucket(bucket)) if bucket else self._student
        feeds = calibration_feeds(model, replace(self._request, student=student), self._tokens)
        return (feed for feed in feeds if step_stage(feed["sigma"][0], model.boundary) == stage)

    def _done(self, name: str, file: Path, start: float, reused: bool) -> None:
        row = Made(name, file.stat().st_size, time.monotonic() - start, reused)
        kept = ", reused" if reused else ""
        self._request.say(f"{name}: {row.bytes / 1e6:.1f} MB in {row.seconds:.0f} s{kept}")
        self._made.append(row)

    def _prove(self, converted: Mapping[str, Converted]) -> Proof:
        opener = self._target.opener(self._request)
        if opener is None:
            return {}, {}, {}
        proofs = {name: one.proof for name, one in converted.items()}
        tolerance, prompts = TOLERANCES[self._request.precision], self._request.prompts
        graphs = self._open(proofs, opener, self._student)
        parity, errors = prove(graphs, self._pipe, self._student, tolerance, prompts, self._score())
        buckets = {}
        for bucket in self._request.buckets:
            student = in_bucket(self._model(), self._student, bucket)
            files = {stage: proofs[name] for stage in STAGE_NAMES if (name := stage_name(stage, bucket)) in proofs}
            found, there = prove(
                self._open(files, opener, student), self._pipe, student, tolerance, prompts, self._score()
            )
            buckets[bucket.name] = found
            errors |= {stage_name(stage, bucket): row for stage, row in there.items() if stage != TEXT}
        return parity, errors, buckets

    def _open(self, files: Mapping[str, Path], opener: Opener, student: Student) -> StagedGraphs | FusedGraphs:
        bundle, boundary = self._request.bundle, self._model().boundary
        if isinstance(self._target, TensorRT):  # with the recorded loop that will serve
            from student.runtimes.engine import Cuda
            from student.runtimes.tensorrt import engine_graphs

            torch_too = torch_stages(bundle, student, self._in_torch, self._request.threads, Cuda.name)
            return engine_graphs(bundle, student, files, self._target.name, torch_too, boundary=boundary)
        if self._request.form == "staged":
            torch_too = torch_stages(bundle, student, self._in_torch, self._request.threads)
            return StagedGraphs(bundle, student, files, opener, torch_too, boundary)
        return FusedGraphs(bundle, student, {int(name.partition("-")[0]): path for name, path in files.items()}, opener)

    def _score(self) -> Score | None:
        if not self._student.scorers:
            return None
        return Scorers(self._request.bundle, self._student, self._request.threads, open_reward).score

    def _manifest(
        self, name: str, graphs: Mapping[str, Stored], converted: Mapping[str, Converted],
        parity: Mapping[int, Parity], errors: Mapping[str, StageError],
        buckets: Mapping[str, Mapping[int, Parity]], whole_key: str,
    ) -> RuntimeManifest:  # fmt: skip
        request, student = self._request, self._student
        rows = {stage: self._row(stage, graphs[stage], converted[stage].file) for stage in graphs}
        staged = request.form == "staged"
        return RuntimeManifest(
            name=name,
            form=request.form,
            precision=request.precision,
            student=f"{student.id} {student.version}",
            source_sha256=student.fingerprint(),
            graphs={} if staged else {int(stage.partition("-")[0]): row for stage, row in rows.items()},
            parity=parity,
            opset=OPSET,
            versions=versions(),
            stages=rows if staged else {},
            stage_errors=errors,
            kept_float32={**self._target.kept_float32(request.precision), **self._not_quantised},
            requires=self._target.requires(request),
            in_torch=self._in_torch,
            profiles=profiles(request.engine.batches) if isinstance(self._target, TensorRT) else (),
            buckets=buckets or {bucket.name: {} for bucket in request.buckets},
            bucket_sigmas=bucket_sigmas(self._model(), student, request.buckets),
            boundary=self._model().boundary,
            cache_key=whole_key,
        )

    def _row(self, stage: str, stored: Stored, file: Path) -> Graph:
        """``key`` only if the file is the float32 graph itself, which another export may reuse."""
        names = (f"{stored.path.name}.data", f"{file.name}.data")  # of the float32 graph itself, and of a converted one
        data = next((path for name in names if (path := file.with_name(name)).is_file()), file.with_name(names[0]))
        sigmas = () if self._request.form == "staged" else self._student.sigmas[int(stage.partition("-")[0])]
        same = file.suffix == ".onnx" and sha256(file) == sha256(stored.path)
        return Graph(
            file=file.name,
            sha256=sha256(file),
            sigmas=sigmas,
            **dict(zip(("inputs", "outputs"), shapes_of(stored.path), strict=True)),
            key=stored.key if same else "",
            data=data.name if data.is_file() else "",
            data_sha256=sha256(data) if data.is_file() else "",
        )

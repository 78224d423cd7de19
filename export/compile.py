"""From a student to one proven runtime in its bundle: graphs, conversion, proof, manifest; whole or not at all."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from export.errors import ExportError
from export.fused import fused_part
from export.graph import OPSET, Part, shapes_of
from export.quantise import PRECISIONS as QUANTISED
from export.quantise import quantise
from export.request import Request
from export.staged import staged_parts
from export.store import CONVERTED, Store, Stored, key_of
from export.targets import Converted, Target
from export.to_tensorrt import TensorRT, profiles
from export.tolerances import TOLERANCES
from export.verify import Score, prove
from export.versions import versions
from export.writing import whole_folder
from student.bundle import BundleError, sha256
from student.families.family import Family
from student.families.find import family_of_student
from student.noise import noise
from student.pipeline import open_pipeline
from student.runtimes.compiled import FusedGraphs
from student.runtimes.manifest import (
    RUNTIMES,
    Graph,
    Parity,
    RuntimeManifest,
    StageError,
    check_runtime,
    read_manifest,
    write_manifest,
)
from student.runtimes.scoring import Scorers
from student.runtimes.stages import STAGES, STEP, Opener, StagedGraphs, text_outputs
from student.sampler import denoise
from student.tokens import PromptTokens

CALIBRATION_BATCH = 4


@dataclass(frozen=True)
class Made:
    """One stage of a finished export, for the table."""

    name: str
    bytes: int
    seconds: float
    reused: bool


@dataclass(frozen=True)
class Outcome:
    """A runtime's folder; ``made`` is empty where it was there already."""

    folder: Path
    manifest: RuntimeManifest
    made: tuple[Made, ...]
    proof_s: float = 0.0


def compile_student(request: Request, target: Target) -> Outcome:
    """Make the runtime, or find that it is there.

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
    outcome = _Making(request, target, store).run(folder, keys, whole_key)
    store.clear()
    return outcome


def stage_keys(request: Request) -> dict[str, str]:
    """The key of each graph: all that its float32 form is made from."""
    student = request.student
    names = STAGES if request.form == "staged" else [f"{steps}-steps" for steps in student.steps]
    return {
        name: key_of({"student": student.fingerprint(), "id": f"{student.id} {student.version}", "graph": name})
        for name in names
    }


def cache_key(request: Request, target: Target, keys: Mapping[str, str]) -> str:
    """sha256 of all that a runtime depends on: graphs, precision, profiles, options, libraries, machine."""
    options = {name: value for name, value in asdict(request.engine).items() if name != "memory_bytes"}
    parts = [dict(keys), target.name, request.form, request.precision, OPSET, options, target.requires(request)]
    return key_of(parts, CONVERTED)


def _current(folder: Path, request: Request, whole_key: str) -> RuntimeManifest | None:
    """The manifest of a runtime that serving would accept and that would come out the same."""
    try:
        manifest = read_manifest(folder)
        check_runtime(folder, request.student, manifest)
    except BundleError:
        return None
    return manifest if manifest.cache_key == whole_key else None


class _Making:
    """One export under way."""

    def __init__(self, request: Request, target: Target, store: Store) -> None:
        self._request, self._target, self._store = request, target, store
        self._student = request.student
        self._tokens = PromptTokens(request.bundle, self._student.max_tokens, self._student.family)
        self._pipe = open_pipeline(request.bundle)
        self._made: list[Made] = []
        self._left_wide: dict[str, str] = {}

    def run(self, folder: Path, keys: Mapping[str, str], whole_key: str) -> Outcome:
        graphs = {name: self._graph(name, part, keys[name]) for name, part in self._parts().items()}
        with whole_folder(folder) as unproven:
            converted = {name: self._convert(name, stored, unproven) for name, stored in graphs.items()}
            start = time.monotonic()
            parity, errors = self._prove(converted)
            proof_s = time.monotonic() - start
            for left_over in unproven.glob(".*"):
                left_over.unlink()
            manifest = self._manifest(folder.name, graphs, converted, parity, errors, whole_key)
            write_manifest(unproven, manifest)
        return Outcome(folder, manifest, tuple(self._made), proof_s)

    def _parts(self) -> dict[str, Part]:
        if self._request.form == "staged":
            return staged_parts(self._model(), self._student, self._tokens)
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
        if self._request.precision in QUANTISED and name == STEP:
            converted = self._quantise(name, stored.path, folder)
        else:
            converted = self._target.convert(self._request, name, stored.path, folder / name)
        self._done(name, converted.file, start, reused=False)
        return converted

    def _quantise(self, name: str, graph: Path, folder: Path) -> Converted:
        """int8 is what ONNX Runtime opens; the rest of an fp8 graph is made bfloat16 by the target."""
        precision, feeds = self._request.precision, calibration_feeds(self._model(), self._request, self._tokens)
        file = folder / (f"{name}.onnx" if precision == "int8" else f".{name}.{precision}.onnx")
        choice = quantise(graph, file, feeds, precision)
        self._request.say(f"{name}: {choice}")
        self._left_wide |= choice.reasons()
        if precision == "int8":
            return Converted(file, file)
        return self._target.convert(self._request, name, file, folder / name)

    def _done(self, name: str, file: Path, start: float, reused: bool) -> None:
        row = Made(name, file.stat().st_size, time.monotonic() - start, reused)
        kept = ", kept from before" if reused else ""
        self._request.say(f"{name}: {row.bytes / 1e6:.1f} MB in {row.seconds:.0f} s{kept}")
        self._made.append(row)

    def _prove(self, converted: Mapping[str, Converted]) -> tuple[dict[int, Parity], dict[str, StageError]]:
        opener = self._target.opener(self._request)
        if opener is None:
            return {}, {}
        graphs = self._open({name: one.proof for name, one in converted.items()}, opener)
        tolerance = TOLERANCES[self._request.precision]
        return prove(graphs, self._pipe, self._student, tolerance, self._request.prompts, self._score())

    def _open(self, files: Mapping[str, Path], opener: Opener) -> StagedGraphs | FusedGraphs:
        bundle, student = self._request.bundle, self._student
        if isinstance(self._target, TensorRT):  # with the recorded loop that will serve
            from student.runtimes.tensorrt import EngineGraphs

            return EngineGraphs(bundle, student, files, self._target.name)
        if self._request.form == "staged":
            return StagedGraphs(bundle, student, files, opener)
        return FusedGraphs(bundle, student, {int(name.partition("-")[0]): path for name, path in files.items()}, opener)

    def _score(self) -> Score | None:
        if not self._student.scorers:
            return None
        return Scorers(self._request.bundle, self._student, self._tokens, self._request.threads).score

    def _manifest(
        self, name: str, graphs: Mapping[str, Stored], converted: Mapping[str, Converted],
        parity: Mapping[int, Parity], errors: Mapping[str, StageError], whole_key: str,
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
            wide={**self._target.wide(request.precision), **self._left_wide},
            requires=self._target.requires(request),
            profiles=profiles(request.engine.batches) if isinstance(self._target, TensorRT) else (),
            cache_key=whole_key,
        )

    def _row(self, stage: str, stored: Stored, file: Path) -> Graph:
        """``key`` only where the file is the float32 graph itself: another export may begin with it."""
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


@torch.no_grad()
def calibration_feeds(model: Family, request: Request, tokens: PromptTokens) -> Iterator[dict[str, Any]]:
    """What the step's stage will be fed: torch's own path from the noise of seeds, at every trained step count."""
    student, names = request.student, text_outputs(request.student.family)
    for first in range(0, len(request.prompts), CALIBRATION_BATCH):
        prompts = request.prompts[first : first + CALIBRATION_BATCH]
        condition = model.encode_ids(*(torch.from_numpy(ids) for ids in tokens.encode(prompts)))
        parts = [part for part in (condition.tokens_BLE, condition.pooled_BP) if part is not None]
        text = {name: part.numpy() for name, part in zip(names, parts, strict=True)}
        start = torch.from_numpy(noise(range(1000 + first, 1000 + first + len(prompts)), student.latents.shape))
        for steps in student.steps:
            seen: list[dict[str, Any]] = []
            denoise(
                lambda x, sigma, condition=condition: model.velocity(x, sigma, condition),  # type: ignore[misc]
                start,
                student.sigmas[steps],
                _remember(seen, text),
            )
            yield from seen


def _remember(seen: list[dict[str, Any]], text: Mapping[str, Any]) -> Callable[[int, float, Any, Any], None]:
    def look(_: int, sigma: float, x: Any, v: Any) -> None:
        seen.append({"latents": x.numpy(), "sigma": torch.full((len(x),), sigma).numpy(), **text})

    return look


def finished(request: Request) -> Sequence[str]:
    """The graphs that a run would find there already."""
    store = Store(request.bundle)
    return [name for name, key in stage_keys(request).items() if store.find(key)]

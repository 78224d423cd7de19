"""manifest.json of a compiled runtime: all that it depends on, and the proof that it gives the student's pictures."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from student.bundle import BundleError, Student
from student.files import sha256

FORMAT = 1
KEPT_FLOAT32 = "wide"  # in the file, whose format earlier releases read too
MANIFEST = "manifest.json"
RUNTIMES = "runtimes"
Sigmas = Mapping[int, tuple[float, ...]]  # by step count
TEXT, STEP, STEP_2, DECODER = STAGE_NAMES = ("text", "step", "step_2", "decoder")
OPENED_TWICE = 256 * 2**20  # bytes of graphs that a worker may hold once for all cores and once for its share of them


@dataclass(frozen=True)
class Graph:
    """One compiled file: the sigmas built into it (none in a stage), and its shapes by name (``batch`` is free).

    ``key`` identifies all that it was made from; ``data`` is the file of its weights if they are stored outside it.
    """

    file: str
    sha256: str
    sigmas: tuple[float, ...]
    inputs: Mapping[str, tuple[int | str, ...]]
    outputs: Mapping[str, tuple[int | str, ...]]
    key: str = ""
    data: str = ""
    data_sha256: str = ""


@dataclass(frozen=True)
class Change:
    """Paired change of a standardised reward, compiled minus torch: mean and standard error over the prompts."""

    mean: float
    error: float
    prompts: int


@dataclass(frozen=True)
class StageError:
    """A stage's error against torch's on the same input: relative norm, and largest absolute difference.

    ``per_step`` are the relative norms at each sigma of the longest schedule; only the step stage has them.
    """

    relative: float
    max_abs: float
    per_step: tuple[float, ...] = ()


@dataclass(frozen=True)
class Parity:
    """Largest absolute difference of an image value (0 to 1) from the torch pipeline's, by batch size.

    ``psnr_db`` over all pictures, and ``picture_db`` of the worst single picture, have lower limits where the precision
    has them; ``reward`` is by scorer.
    """

    max_abs: Mapping[int, float]
    tolerance: float
    psnr_db: float | None = None
    least_psnr_db: float | None = None
    reward: Mapping[str, Change] = field(default_factory=dict)
    picture_db: float | None = None
    least_picture_db: float | None = None


@dataclass(frozen=True)
class RuntimeManifest:
    """``graphs`` and ``parity`` by step count; ``source_sha256`` is the fingerprint of the student compiled.

    A staged runtime has ``stages`` by name rather than a graph for each step count; its sigmas are the student's.
    ``kept_float32`` says which operators were not rounded to the precision, and why; ``requires`` describes the
    machine (see ``student.runtimes.machine``); ``in_torch`` says which stages have no compiled form and why;
    ``profiles`` are the batch sizes (least, best, most) that an engine was built for; ``buckets`` are other sizes
    (WIDTHxHEIGHT) and lengths (WIDTHxHEIGHTxFRAMES) with their parity, and ``bucket_sigmas`` has the sigmas of those
    that do not use the student's.
    Below the sigma ``boundary`` the stage ``step_2`` takes the place of ``step`` (see ``student.runtimes.experts``).
    """

    name: str
    form: str
    precision: str
    student: str
    source_sha256: str
    graphs: Mapping[int, Graph]
    parity: Mapping[int, Parity]
    opset: int
    versions: Mapping[str, str]
    stages: Mapping[str, Graph] = field(default_factory=dict)
    stage_errors: Mapping[str, StageError] = field(default_factory=dict)
    kept_float32: Mapping[str, str] = field(default_factory=dict)
    requires: Mapping[str, str] = field(default_factory=dict)
    in_torch: Mapping[str, str] = field(default_factory=dict)
    profiles: tuple[tuple[int, int, int], ...] = ()
    buckets: Mapping[str, Mapping[int, Parity]] = field(default_factory=dict)
    bucket_sigmas: Mapping[str, Sigmas] = field(default_factory=dict)
    boundary: float | None = None
    cache_key: str = ""
    format: int = FORMAT


def write_manifest(folder: Path, manifest: RuntimeManifest) -> None:
    """Write the manifest into a runtime's folder."""
    data = asdict(manifest)
    data[KEPT_FLOAT32] = data.pop("kept_float32")
    if not manifest.bucket_sigmas:
        del data["bucket_sigmas"]  # which earlier releases do not know
    if manifest.boundary is None:
        del data["boundary"]  # likewise
    (folder / MANIFEST).write_text(json.dumps(data, indent=2, allow_nan=False) + "\n", "utf-8")


def read_manifest(folder: Path) -> RuntimeManifest:
    """Read a runtime's manifest.

    Raises:
        BundleError: there is no such runtime, or its manifest is of another format.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise BundleError(f"{folder.parent.parent} has no runtime {folder.name}: make it with export.run")
    try:
        data = json.loads(path.read_text("utf-8"))
        if data.get("format") != FORMAT:
            raise ValueError(f"format is {data.get('format')}, this version reads format {FORMAT}")
        graphs = {int(steps): _graph(row) for steps, row in data.pop("graphs").items()}
        stages = {name: _graph(row) for name, row in data.pop("stages", {}).items()}
        parity = {int(steps): _parity(row) for steps, row in data.pop("parity").items()}
        errors = {name: _stage_error(row) for name, row in data.pop("stage_errors", {}).items()}
        buckets = {
            name: {int(steps): _parity(row) for steps, row in rows.items()}
            for name, rows in data.pop("buckets", {}).items()
        }
        sigmas = {
            name: {int(steps): tuple(map(float, row)) for steps, row in rows.items()}
            for name, rows in data.pop("bucket_sigmas", {}).items()
        }
        profiles: Any = tuple(tuple(row) for row in data.pop("profiles", ()))
        parts: dict[str, Any] = {"graphs": graphs, "stages": stages, "parity": parity, "buckets": buckets}
        parts |= {"bucket_sigmas": sigmas}
        parts |= {"stage_errors": errors, "profiles": profiles, "kept_float32": data.pop(KEPT_FLOAT32, {})}
        return RuntimeManifest(**parts, **data)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise BundleError(f"{path} cannot be used: {error}; make the runtime again with export.run") from error


def check_runtime(folder: Path, student: Student, manifest: RuntimeManifest) -> None:
    """Refuse a runtime that would not give this student's pictures.

    Raises:
        BundleError: it does not belong to the student; the message says what differs.
    """
    again = f"make it again with export.run --student {folder.parent.parent}"
    for steps in student.steps:
        for name, rows in manifest.bucket_sigmas.items():
            if steps not in rows:
                raise BundleError(f"{folder} has no sigmas for {steps} steps at {name}: {again}")
        if manifest.form == "fused":
            _check_fused(folder, student, steps, manifest, again)
        for found in (manifest.parity, *manifest.buckets.values()):
            _check_parity(folder, steps, found.get(steps))
    if manifest.source_sha256 != student.fingerprint():
        raise BundleError(f"{folder} was made from another student (source_sha256 differs): {again}")
    for graph in (*manifest.graphs.values(), *manifest.stages.values()):
        check_file(folder / graph.file, graph.sha256, again)
        if graph.data:
            check_file(folder / graph.data, graph.data_sha256, again)


def check_file(path: Path, expected: str, again: str) -> None:
    """Refuse a file that is missing or has changed."""
    if not path.is_file():
        raise BundleError(f"{path} is missing: {again}")
    if sha256(path) != expected:
        raise BundleError(f"{path} has changed since it was made (sha256 differs): {again}")


def _check_fused(folder: Path, student: Student, steps: int, manifest: RuntimeManifest, again: str) -> None:
    if steps not in manifest.graphs:
        raise BundleError(f"{folder} has no graph for {steps} steps: {again}")
    if manifest.graphs[steps].sigmas != student.sigmas[steps]:
        raise BundleError(f"{folder} has other sigmas for {steps} steps than the student: {again}")


def _check_parity(folder: Path, steps: int, parity: Parity | None) -> None:
    if parity is None or not parity.max_abs:
        raise BundleError(f"{folder} was never compared with the torch pipeline at {steps} steps")
    worst = max(parity.max_abs.values())
    if not worst <= parity.tolerance:
        raise BundleError(
            f"{folder} differs from the torch pipeline by {worst} at {steps} steps: accepted is {parity.tolerance}"
        )
    for what, found, floor in (
        ("PSNR", parity.psnr_db, parity.least_psnr_db),
        ("PSNR in its worst picture", parity.picture_db, parity.least_picture_db),
    ):
        if floor is not None and not (found or 0.0) >= floor:
            raise BundleError(f"{folder} has a {what} of {found} dB at {steps} steps: accepted is {floor} or more")


def _graph(row: dict[str, Any]) -> Graph:
    plain = dict(row)
    shapes: dict[str, Any] = {
        key: {name: tuple(dims) for name, dims in plain.pop(key).items()} for key in ("inputs", "outputs")
    }
    return Graph(sigmas=tuple(plain.pop("sigmas")), **shapes, **plain)


def _parity(row: dict[str, Any]) -> Parity:
    plain = dict(row)
    max_abs = {int(batch): float(value) for batch, value in plain.pop("max_abs").items()}
    reward = {name: Change(**change) for name, change in plain.pop("reward", {}).items()}
    return Parity(max_abs, float(plain.pop("tolerance")), reward=reward, **plain)


def _stage_error(row: dict[str, Any]) -> StageError:
    return StageError(row["relative"], row["max_abs"], tuple(row["per_step"]))

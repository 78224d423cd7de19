"""The ONNX runtime of a student, fused or staged, proven against torch, in one folder."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from export.errors import ExportError
from export.fused import INPUTS, OUTPUT, export_fused
from export.graph import OPSET, shapes_of
from export.staged import export_stages
from export.verify import image_parity
from export.versions import versions
from export.writing import whole_folder
from student.bundle import BundleError, Student, sha256
from student.families.find import family_of_student
from student.pipeline import open_pipeline
from student.runtimes.manifest import (
    RUNTIMES,
    Graph,
    Parity,
    RuntimeManifest,
    check_runtime,
    read_manifest,
    write_manifest,
)
from student.runtimes.onnx import FUSED_FP32, STAGED_FP32, FusedGraphs
from student.runtimes.stages import StagedGraphs
from student.tokens import PromptTokens

FORMS = {"fused": FUSED_FP32, "staged": STAGED_FP32}
FAMILIES = {"fused": ("flux",), "staged": ("flux", "sd3")}


def folder(bundle: Path, form: str = "fused") -> Path:
    """Where the runtime lies in the bundle."""
    return bundle / RUNTIMES / FORMS[form]


def is_compiled(bundle: Path, student: Student, form: str = "fused") -> bool:
    """Whether a runtime is there that serving would accept, made by the libraries installed now."""
    try:
        manifest = read_manifest(folder(bundle, form))
        check_runtime(folder(bundle, form), student, manifest)
    except BundleError:
        return False
    return manifest.versions == versions()


def export_student(bundle: Path, student: Student, threads: int, form: str = "fused") -> dict[Path, float]:
    """Compile every trained step count; returns for each file the largest difference of an image from torch.

    Raises:
        ExportError: the family has no such form, or the proof failed; then nothing is written.
    """
    if student.family not in FAMILIES[form]:
        accepted = ", ".join(FAMILIES[form])
        raise ExportError(f"cannot export the family {student.family!r} in {form} form: accepted is {accepted}")
    pipe = open_pipeline(bundle)
    tokens = PromptTokens(bundle, student.max_tokens, student.family)
    place = folder(bundle, form)
    with whole_folder(place) as unproven:
        make = _fused if form == "fused" else _staged
        manifest = make(bundle, student, pipe, tokens, unproven, threads)
        write_manifest(unproven, manifest)
    worst = {steps: max(parity.max_abs.values()) for steps, parity in manifest.parity.items()}
    fused = {place / graph.file: worst[steps] for steps, graph in manifest.graphs.items()}
    return fused | {place / graph.file: max(worst.values()) for graph in manifest.stages.values()}


def _fused(
    bundle: Path, student: Student, pipe: Any, tokens: PromptTokens, place: Path, threads: int
) -> RuntimeManifest:
    files = {steps: place / f"{steps}-steps.onnx" for steps in student.steps}
    for steps, file in files.items():
        file.write_bytes(export_fused(pipe, student, tokens, steps))
    graphs = FusedGraphs(bundle, student, files, threads)
    parity = {steps: image_parity(graphs, pipe, student, steps) for steps in student.steps}
    lengths = [ids_BL.shape[1] for ids_BL in tokens.encode([""])]
    shapes: list[tuple[int | str, ...]] = [("batch", n) for n in lengths] + [("batch", *student.latents.shape)]
    inputs = dict(zip(INPUTS, shapes, strict=True))
    outputs = {OUTPUT: ("batch", 3, student.image.height, student.image.width)}
    manifest = _manifest(student, "fused", parity)
    return replace(
        manifest,
        graphs={
            steps: Graph(file.name, sha256(file), student.sigmas[steps], inputs, outputs)
            for steps, file in files.items()
        },
    )


def _staged(
    bundle: Path, student: Student, pipe: Any, tokens: PromptTokens, place: Path, threads: int
) -> RuntimeManifest:
    made = export_stages(family_of_student(pipe, student), student, tokens)
    files = {stage: place / f"{stage}.onnx" for stage in made}
    for stage, file in files.items():
        file.write_bytes(made[stage])
    graphs = StagedGraphs(bundle, student, files, threads)
    parity = {steps: image_parity(graphs, pipe, student, steps) for steps in student.steps}
    manifest = _manifest(student, "staged", parity)
    return replace(
        manifest,
        stages={stage: Graph(file.name, sha256(file), (), *shapes_of(made[stage])) for stage, file in files.items()},
    )


def _manifest(student: Student, form: str, parity: dict[int, Parity]) -> RuntimeManifest:
    return RuntimeManifest(
        name=FORMS[form],
        form=form,
        precision="fp32",
        student=f"{student.id} {student.version}",
        source_sha256=student.fingerprint(),
        graphs={},
        parity=parity,
        opset=OPSET,
        versions=versions(),
    )

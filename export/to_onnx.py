"""The ONNX runtime of a student: a fused graph for each trained step count, proven against torch, in one folder."""

from __future__ import annotations

from pathlib import Path

from export.errors import ExportError
from export.fused import INPUTS, OUTPUT, export_fused
from export.graph import OPSET
from export.verify import image_parity
from export.versions import versions
from export.writing import whole_folder
from student.bundle import BundleError, Student, sha256
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
from student.runtimes.onnx import FUSED_FP32, FusedGraphs
from student.tokens import PromptTokens


def folder(bundle: Path) -> Path:
    """Where the runtime lies in the bundle."""
    return bundle / RUNTIMES / FUSED_FP32


def is_compiled(bundle: Path, student: Student) -> bool:
    """Whether a runtime is there that serving would accept, made by the libraries installed now."""
    try:
        manifest = read_manifest(folder(bundle))
        check_runtime(folder(bundle), student, manifest)
    except BundleError:
        return False
    return manifest.versions == versions()


def export_student(bundle: Path, student: Student, threads: int) -> dict[Path, float]:
    """Compile every trained step count; returns each file's largest difference from torch.

    Raises:
        ExportError: the family is not known here, or the proof failed; then nothing is written.
    """
    if student.family != "flux":
        raise ExportError(f"cannot export the family {student.family!r}: accepted is flux")
    pipe = open_pipeline(bundle)
    tokens = PromptTokens(bundle, student.max_tokens)
    with whole_folder(folder(bundle)) as unproven:
        files = {steps: unproven / f"{steps}-steps.onnx" for steps in student.steps}
        for steps, file in files.items():
            file.write_bytes(export_fused(pipe, student, tokens, steps))
        graphs = FusedGraphs(bundle, student, files, threads)
        parity = {steps: image_parity(graphs, pipe, student, steps) for steps in student.steps}
        write_manifest(unproven, _manifest(student, tokens, files, parity))
    return {folder(bundle) / file.name: max(parity[steps].max_abs.values()) for steps, file in files.items()}


def _manifest(
    student: Student, tokens: PromptTokens, files: dict[int, Path], parity: dict[int, Parity]
) -> RuntimeManifest:
    lengths = [ids_BL.shape[1] for ids_BL in tokens.encode([""])]
    shapes: list[tuple[int | str, ...]] = [("batch", n) for n in lengths] + [("batch", *student.latents.shape)]
    inputs = dict(zip(INPUTS, shapes, strict=True))
    outputs = {OUTPUT: ("batch", 3, student.image.height, student.image.width)}
    graphs = {
        steps: Graph(file.name, sha256(file), student.sigmas[steps], inputs, outputs) for steps, file in files.items()
    }
    return RuntimeManifest(
        name=FUSED_FP32,
        form="fused",
        precision="fp32",
        student=f"{student.id} {student.version}",
        source_sha256=student.fingerprint(),
        graphs=graphs,
        parity=parity,
        opset=OPSET,
        versions=versions(),
    )

"""A student in ONNX Runtime; without torch."""

from __future__ import annotations

from pathlib import Path

from student.bundle import Student
from student.runtimes.compiled import CompiledRuntime, make_runtime
from student.runtimes.manifest import OPENED_TWICE, RUNTIMES
from student.runtimes.runtime import CpuSharing
from student.runtimes.session import SharingSession, open_session

FUSED_FP32, STAGED_FP32, *_ = FORMS = (
    "onnx-fused-fp32",
    "onnx-staged-fp32",
    "onnx-fused-int8",
    "onnx-staged-int8",
    "onnx-staged-fp16",
)


def compiled_form(bundle: Path) -> str:
    """The ONNX runtime of a bundle: the first of ``FORMS`` that is there, or the first if none is."""
    return next((name for name in FORMS if (bundle / RUNTIMES / name).is_dir()), FUSED_FP32)


def onnx_runtime(
    bundle: Path, student: Student, threads: int, name: str | None = None, tensorrt: bool = False,
    crowded_threads: int = 0,
) -> CompiledRuntime:  # fmt: skip
    """The bundle's ONNX runtime, or the one in the folder ``name``; see ``make_runtime`` and ``open_session``."""
    name = name or compiled_form(bundle)
    if crowded_threads and sum(file.stat().st_size for file in (bundle / RUNTIMES / name).glob("*")) > OPENED_TWICE:
        threads, crowded_threads = crowded_threads, 0
    if crowded_threads in (0, threads):
        return make_runtime(bundle, student, threads, name, lambda path: open_session(path, threads, tensorrt))
    cpu_sharing = CpuSharing()
    return make_runtime(
        bundle,
        student,
        threads,
        name,
        lambda path: SharingSession(path, threads, crowded_threads, cpu_sharing),
        cpu_sharing,
    )

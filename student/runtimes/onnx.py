"""A student in ONNX Runtime; no torch."""

from __future__ import annotations

from pathlib import Path

from student.bundle import Student
from student.runtimes.compiled import CompiledRuntime, make_runtime
from student.runtimes.manifest import RUNTIMES
from student.runtimes.session import open_session

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
    bundle: Path, student: Student, threads: int, name: str | None = None, tensorrt: bool = False
) -> CompiledRuntime:
    """The bundle's ONNX runtime, or the one in the folder ``name``; see ``make_runtime`` and ``open_session``."""
    name = name or compiled_form(bundle)
    return make_runtime(bundle, student, threads, name, lambda path: open_session(path, threads, tensorrt))

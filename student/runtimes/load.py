"""The one place that turns the name of a runtime into a runtime; each is imported when it is asked for."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable
from pathlib import Path

from student.bundle import BundleError, Student, read_student, verify_files
from student.runtimes.runtime import Runtime
from student.tokens import TOKENIZERS

AUTO = ("onnx", "torch")
log = logging.getLogger(__name__)


def load(bundle: Path, runtime: str = "auto", threads: int = 1) -> Runtime:
    """The runtime asked for, verified and warm; ``auto`` is the first of onnx and torch that the bundle can have.

    Raises:
        BundleError: one sentence that says why there is no such runtime here.
    """
    if runtime == "fake":
        return _fake()
    if runtime != "auto" and runtime not in LOADERS:
        raise BundleError(f"runtime is {runtime!r}: accepted is auto, {', '.join(LOADERS)} or fake")
    student = read_student(bundle)
    if runtime != "auto":
        return LOADERS[runtime](bundle, student, threads)
    reasons: list[str] = []
    for name in AUTO:
        try:
            found = LOADERS[name](bundle, student, threads)
        except BundleError as error:
            reasons.append(f"{name}: {error}")
            continue
        if reasons:
            log.warning("%s serves through %s, because %s", bundle, found.name, "; ".join(reasons))
        return found
    raise BundleError(f"no runtime can serve {bundle}: {'; '.join(reasons)}")


def _fake() -> Runtime:
    from student.runtimes.fake import FakeRuntime

    return FakeRuntime()


def _onnx(bundle: Path, student: Student, threads: int) -> Runtime:
    _require("onnxruntime")
    from student.runtimes.onnx import OnnxRuntime

    return OnnxRuntime(bundle, student, threads)


def _torch(bundle: Path, student: Student, threads: int) -> Runtime:
    _require("torch", "diffusers", "transformers")
    if student.family not in TOKENIZERS:
        raise BundleError(f"family is {student.family!r}: the torch runtime serves {', '.join(TOKENIZERS)}")
    verify_files(bundle, student)
    from student.runtimes.torch import TorchRuntime

    return TorchRuntime(bundle, student, threads)


def _require(*packages: str) -> None:
    for package in packages:
        if importlib.util.find_spec(package) is None:
            raise BundleError(f"{package} is not installed")


LOADERS: dict[str, Callable[[Path, Student, int], Runtime]] = {"onnx": _onnx, "torch": _torch}

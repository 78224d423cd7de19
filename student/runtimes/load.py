"""The one place that turns the name of a runtime into a runtime; each is imported on demand."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable
from pathlib import Path

from student.bundle import BundleError, Student, read_student
from student.files import verify_files
from student.prompts import TOKENIZERS
from student.runtimes.manifest import RUNTIMES
from student.runtimes.options import Options
from student.runtimes.runtime import Runtime

# What serves where nothing is asked for, best first; a kind that the bundle has no folder of is passed over in silence.
AUTO = ("tensorrt", "tensorrt_rtx", "openvino", "onnx", "torch")
ALWAYS_TRIED = ("onnx", "torch")
DEFAULT = Options()
log = logging.getLogger(__name__)


def load(bundle: Path, runtime: str = "auto", threads: int = 1, options: Options = DEFAULT) -> Runtime:
    """The requested runtime, verified and warmed up.

    ``runtime`` is a kind ("onnx"), a folder ("onnx-staged-int8"), several of them separated by commas, of which the
    first that works here serves, or ``auto``: the best kind that the bundle has and this machine can run. Nothing else
    is ever served in its place.

    Raises:
        BundleError: there is no such runtime here; the message says why in one sentence.
    """
    if runtime in ("fake", "fake-video"):
        return _fake(runtime)
    names = runtime.split(",")
    for name in names:
        if name != "auto" and _kind(name) not in LOADERS:
            raise BundleError(f"runtime is {name!r}: accepted are auto, {', '.join(LOADERS)}, fake and fake-video")
    student = read_student(bundle)
    if names == ["auto"]:
        names = [name for name in AUTO if name in ALWAYS_TRIED or _compiled(bundle, name)]
    elif len(names) == 1:
        return _with_rewards(_load(bundle, student, runtime, threads, options), options)
    return _with_rewards(_first(bundle, student, names, threads, options), options)


def _with_rewards(runtime: Runtime, options: Options) -> Runtime:
    if options.open_reward is not None and (scorers := getattr(runtime, "scorers", None)) is not None:
        scorers.open_named(options.open_reward)
    return runtime


def _first(bundle: Path, student: Student, names: list[str], threads: int, options: Options) -> Runtime:
    reasons: list[str] = []
    for name in names:
        try:
            found = _load(bundle, student, name, threads, options)
        except BundleError as error:
            reasons.append(f"{name}: {error}")
            continue
        if reasons:
            log.warning("%s serves through %s, because %s", bundle, found.name, "; ".join(reasons))
        return found
    raise BundleError(f"no runtime can serve {bundle}: {'; '.join(reasons)}")


def _load(bundle: Path, student: Student, name: str, threads: int, options: Options) -> Runtime:
    folder = None if name in LOADERS else name
    if _kind(name) == "onnx":
        return _onnx(bundle, student, threads, folder, options)
    threads = options.crowded_threads or threads  # these cannot change their number
    if name == "torch":
        return _torch(bundle, student, threads, options)
    return LOADERS[_kind(name)](bundle, student, threads, folder)


def _kind(name: str) -> str:
    return name.partition("-")[0]


def _compiled(bundle: Path, kind: str) -> bool:
    return any(path.is_dir() for path in (bundle / RUNTIMES).glob(f"{kind}-*"))


def _fake(name: str) -> Runtime:
    from student.runtimes.fake import FAKE_VIDEO, FakeRuntime, fake_video_student

    runtime = FakeRuntime()
    if name == FAKE_VIDEO:
        runtime.student = fake_video_student()
    return runtime


def _onnx(bundle: Path, student: Student, threads: int, name: str | None, options: Options = DEFAULT) -> Runtime:
    _require("onnxruntime")
    from student.runtimes.onnx import onnx_runtime

    return onnx_runtime(bundle, student, threads, name, crowded_threads=options.crowded_threads)


def _openvino(bundle: Path, student: Student, threads: int, name: str | None) -> Runtime:
    _require("openvino")
    from student.runtimes.openvino import openvino_runtime

    return openvino_runtime(bundle, student, threads, name)


def _tensorrt(bundle: Path, student: Student, threads: int, name: str | None) -> Runtime:
    _require("tensorrt", "torch")
    from student.runtimes.tensorrt import tensorrt_runtime

    return tensorrt_runtime(bundle, student, threads, name, "tensorrt")


def _tensorrt_rtx(bundle: Path, student: Student, threads: int, name: str | None) -> Runtime:
    _require("tensorrt_rtx", "torch")
    from student.runtimes.tensorrt import tensorrt_runtime

    return tensorrt_runtime(bundle, student, threads, name, "tensorrt_rtx")


def _torch(bundle: Path, student: Student, threads: int, options: Options = DEFAULT) -> Runtime:
    _require("torch", "diffusers", "transformers")
    if student.family not in TOKENIZERS:
        raise BundleError(f"family is {student.family!r}: the torch runtime serves {', '.join(TOKENIZERS)}")
    verify_files(bundle, student)
    from student.runtimes.torch import TorchRuntime

    return TorchRuntime(bundle, student, threads, options)


def _require(*packages: str) -> None:
    for package in packages:
        if importlib.util.find_spec(package) is None:
            raise BundleError(f"{package} is not installed")


LOADERS: dict[str, Callable[[Path, Student, int, str | None], Runtime]] = {
    "onnx": _onnx,
    "openvino": _openvino,
    "tensorrt": _tensorrt,
    "tensorrt_rtx": _tensorrt_rtx,
    "torch": lambda bundle, student, threads, name: _torch(bundle, student, threads),
}

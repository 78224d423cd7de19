"""The process that builds one TensorRT engine: ``python -m export.engine ORDER.json``.

It is a separate process because a build may be killed for its memory, and because the library crashes at exit where the
driver is missing. It reports its progress in lines of JSON; the last one has ``plan`` or ``error``.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

Shape = tuple[int | str, ...]


@dataclass(frozen=True)
class Order:
    """One engine to build: ``library`` is the module (tensorrt or tensorrt_rtx), ``profiles`` are batch sizes.

    ``timing_cache`` is a file that is read if it exists and written at the end; empty without a GPU.
    ``tf32``: products of float32 may be computed in TF32.
    """

    library: str
    onnx: str
    plan: str
    inputs: Mapping[str, Sequence[int | str]]
    profiles: Sequence[Sequence[int]]
    workspace_bytes: int
    level: int
    portable: bool = False
    batch_invariant: bool = False
    timing_cache: str = ""
    tf32: bool = False

    def to_json(self) -> str:
        """For the command line's file."""
        return json.dumps(asdict(self))


class BuildError(Exception):
    """A graph that the library does not accept; the message is one sentence."""


def build(order: Order) -> None:
    """Parse, profile, build and write, reporting each phase."""
    trt = importlib.import_module(order.library)
    log = _logger(trt)
    builder = trt.Builder(log)
    network = builder.create_network(_strongly_typed(trt))
    _parse(trt, network, log, Path(order.onnx))
    config = _configure(trt, builder, order)
    for least, best, most in order.profiles:
        profile = builder.create_optimization_profile()
        for name, shape in order.inputs.items():
            rest = tuple(shape[1:])
            profile.set_shape(name, (least, *rest), (best, *rest), (most, *rest))
        config.add_optimization_profile(profile)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise BuildError(f"{order.library} {trt.__version__} cannot build {Path(order.onnx).name}: {log.worst}")
    _write(Path(order.plan), memoryview(plan))
    if order.timing_cache:
        _write(Path(order.timing_cache), memoryview(config.get_timing_cache().serialize()))
    _say(plan=order.plan, bytes=Path(order.plan).stat().st_size, layers=network.num_layers, version=trt.__version__)


def _configure(trt: Any, builder: Any, order: Order) -> Any:
    config = builder.create_builder_config()
    config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, order.workspace_bytes)
    config.builder_optimization_level = order.level
    config.progress_monitor = _monitor(trt)
    if not order.tf32:
        config.clear_flag(trt.BuilderFlag.TF32)  # float32 means float32, as in the proof
    if order.portable:
        config.hardware_compatibility_level = trt.HardwareCompatibilityLevel.AMPERE_PLUS
    if order.batch_invariant:
        config.set_flag(trt.BuilderFlag.DISTRIBUTIVE_INDEPENDENCE)
    if order.timing_cache:
        before = Path(order.timing_cache)
        cache = config.create_timing_cache(before.read_bytes() if before.is_file() else b"")
        config.set_timing_cache(cache, ignore_mismatch=False)
    return config


def _strongly_typed(trt: Any) -> int:
    """The graph determines precision; TensorRT 11 always follows it, TensorRT 10 needs a flag."""
    flag = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    return 0 if flag is None else 1 << int(flag)


def _parse(trt: Any, network: Any, log: Any, path: Path) -> None:
    parser = trt.OnnxParser(network, log)
    if parser.parse_from_file(str(path)):
        return
    error = parser.get_error(0)
    operator, node = error.node_operator(), error.node_name()
    raise BuildError(f"{trt.__name__} cannot read {path.name}: the operator {operator} ({node}): {error.desc()}")


def _logger(trt: Any) -> Any:
    class Logger(trt.ILogger):  # type: ignore[misc]
        """Keeps the last error for the sentence."""

        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.worst = "it gave no reason"

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.Severity.ERROR, trt.ILogger.Severity.INTERNAL_ERROR):
                self.worst = " ".join(message.split())

    return Logger()


def _monitor(trt: Any) -> Any:
    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        """Reports each phase; SIGTERM ends the build at the next step."""

        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.cancelled = False
            signal.signal(signal.SIGTERM, self.cancel)

        def cancel(self, *_: object) -> None:
            self.cancelled = True

        def phase_start(self, name: str, parent: str | None, steps: int) -> None:
            if parent is None:
                _say(phase=name, steps=steps)

        def step_complete(self, name: str, step: int) -> bool:
            return not self.cancelled

        def phase_finish(self, name: str) -> None:
            pass

    return Monitor()


def _write(path: Path, data: Any) -> None:
    unfinished = path.with_name(f".{path.name}.part")
    unfinished.write_bytes(data)
    unfinished.replace(path)


def _say(**what: object) -> None:
    print(json.dumps(what), flush=True)


def main() -> None:
    """Build the engine described by the file in the first argument."""
    try:
        build(Order(**json.loads(Path(sys.argv[1]).read_text("utf-8"))))
        code = 0
    except (BuildError, ImportError, OSError, MemoryError) as error:
        _say(error=" ".join(str(error).split()) or type(error).__name__)
        code = 1
    os._exit(code)  # the library's own clean-up crashes where there is no driver


if __name__ == "__main__":
    main()

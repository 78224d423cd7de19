"""A student in OpenVINO on the CPU: the same ONNX graphs, computed in float32 or in bfloat16; without torch."""

from __future__ import annotations

import importlib
import importlib.metadata
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from student.bundle import BundleError, Student
from student.runtimes.compiled import CompiledRuntime, make_runtime
from student.runtimes.machine import has_amx
from student.runtimes.manifest import RUNTIMES
from student.runtimes.stages import Opener

PRECISIONS = {"fp32": "f32", "bf16": "bf16"}
# The faster precision first; a bfloat16 without AMX is emulated or slow, so that it is served only by its name.
NAMES = ("openvino-fused-bf16", "openvino-staged-bf16", "openvino-fused-fp32", "openvino-staged-fp32")


class OpenVinoSession:
    """One graph; inputs by name, outputs as new numpy arrays."""

    def __init__(self, compiled: Any) -> None:
        self._request = compiled.create_infer_request()
        self._ports = {name: port for port in compiled.outputs for name in port.get_names()}

    def run(self, output_names: Sequence[str], feed: Mapping[str, Any], /) -> list[Any]:
        """See ``Session``."""
        results = self._request.infer({name: np.ascontiguousarray(array) for name, array in feed.items()})
        return [np.array(results[self._ports[name]], copy=True) for name in output_names]


@cache
def core() -> Any:
    """OpenVINO, once for a process and never closed: its plugin for CPUs gives the thread that loads it an alternate
    signal stack, which closing it in another thread unmaps, and the next signal then ends the process."""
    return importlib.import_module("openvino").Core()


def open_openvino(path: Path, threads: int, precision: str) -> OpenVinoSession:
    """Compile a graph for this CPU.

    Raises:
        BundleError: OpenVINO cannot open it, or this CPU has no bfloat16.
    """
    if precision == "bf16" and "BF16" not in core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        raise BundleError(f"{path.parent} computes in bfloat16, which this CPU does not support")
    hints = {
        "INFERENCE_PRECISION_HINT": PRECISIONS[precision],
        "INFERENCE_NUM_THREADS": str(threads),
        "NUM_STREAMS": "1",
        "PERFORMANCE_HINT": "LATENCY",
        "ENABLE_CPU_PINNING": "NO",  # the worker shares its cores with the HTTP process and the queue
    }
    try:
        return OpenVinoSession(core().compile_model(core().read_model(path), "CPU", hints))
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        version = importlib.metadata.version("openvino")
        raise BundleError(f"{path} does not open in openvino {version}: {reason}") from error


def opener(threads: int, precision: str) -> Opener:
    """A function that opens this precision's graphs, for verification and for the runtime."""
    return lambda path: open_openvino(path, threads, precision)


def openvino_runtime(bundle: Path, student: Student, threads: int, name: str | None = None) -> CompiledRuntime:
    """The bundle's OpenVINO runtime, or the one in the folder ``name``; bfloat16 by default only on a CPU with AMX.

    Raises:
        BundleError: there is none, or it does not belong to this student or machine.
    """
    there = [candidate for candidate in NAMES if (bundle / RUNTIMES / candidate).is_dir()]
    if name is None and there and not has_amx():
        fitting = [candidate for candidate in there if candidate.endswith("fp32")]
        if not fitting:
            raise BundleError(f"{bundle}/{RUNTIMES}/{there[0]} computes in bfloat16, and this CPU has no AMX")
        there = fitting
    name = name or (there[0] if there else NAMES[-1])
    return make_runtime(bundle, student, threads, name, opener(threads, name.rpartition("-")[2]))

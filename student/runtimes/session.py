"""How this project opens an ONNX Runtime session on the CPU."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import onnxruntime as ort  # type: ignore[import-untyped]

from student.bundle import BundleError


class Session(Protocol):
    """The one method of an InferenceSession that is used."""

    def run(self, output_names: Sequence[str], feed: Mapping[str, Any], /) -> Any: ...


def open_session(path: Path, threads: int) -> Session:
    """A session of ``threads`` threads, the caller's among them, that sleep between two pieces of work.

    Threads that spin instead took 226 ms for a batch of 8, against 120 ms, where two cores were busy with other work
    beside it: and the worker shares its machine with the HTTP process and the queue.

    Raises:
        BundleError: the installed onnxruntime cannot open it.
    """
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.log_severity_level = 3
    try:
        session: Session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's own exceptions share no public base
        reason = " ".join(str(error).split())
        raise BundleError(f"{path} does not open in onnxruntime {ort.__version__}: {reason}") from error
    return session

"""How this project opens an ONNX Runtime session on the CPU."""

from __future__ import annotations

from pathlib import Path

from onnxruntime import (  # type: ignore[import-untyped]
    ExecutionMode,
    GraphOptimizationLevel,
    InferenceSession,
    SessionOptions,
)


def open_session(path: Path, threads: int) -> InferenceSession:
    """A session of ``threads`` threads, the caller's among them; what it computes never depends on the clock."""
    options = SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.execution_mode = ExecutionMode.ORT_SEQUENTIAL
    options.graph_optimization_level = GraphOptimizationLevel.ORT_ENABLE_ALL
    options.log_severity_level = 3
    return InferenceSession(str(path), options, providers=["CPUExecutionProvider"])

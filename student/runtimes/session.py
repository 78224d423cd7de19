"""Opens ONNX Runtime sessions on the CPU or, where onnxruntime-gpu finds one, on a GPU."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import onnxruntime as ort  # type: ignore[import-untyped]

from student.bundle import BundleError
from student.runtimes.runtime import CpuSharing

# Full float32 products: TF32 would fail the proof that was made on a CPU.
CUDA = ("CUDAExecutionProvider", {"use_tf32": "0"})
CPU = "CPUExecutionProvider"
# Only where it is asked for: it builds an engine for each shape at every start, and may round products to TF32.
TENSORRT = ("TensorrtExecutionProvider", {"trt_fp16_enable": "0", "trt_bf16_enable": "0", "trt_int8_enable": "0"})


class Session(Protocol):
    """A compiled graph, whichever library runs it."""

    def run(self, output_names: Sequence[str], feed: Mapping[str, Any], /) -> Any: ...


class OrtSession:
    """An InferenceSession with its inputs and outputs bound: nothing is copied on a CPU, and once each way on a GPU.

    ``place`` puts an array on the graph's device, for an input that many calls share.
    """

    def __init__(self, session: Any, device: str) -> None:
        self._session = session
        self._device = device

    def place(self, array: Any) -> Any:
        """The array on the graph's device."""
        return ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array), self._device, 0)

    def run(self, output_names: Sequence[str], feed: Mapping[str, Any], /) -> list[Any]:
        """The outputs as numpy arrays; an input is a numpy array or a result of ``place``."""
        binding = self._session.io_binding()
        for name, value in feed.items():
            binding.bind_ortvalue_input(name, value if isinstance(value, ort.OrtValue) else self.place(value))
        for name in output_names:
            binding.bind_output(name, self._device)
        self._session.run_with_iobinding(binding)
        arrays: list[Any] = binding.copy_outputs_to_cpu()
        return arrays


class SharingSession:
    """A graph that is opened twice, for all cores and for a share of them; CPU only."""

    def __init__(self, path: Path, threads: int, crowded_threads: int, cpu_sharing: CpuSharing) -> None:
        self._cpu_sharing = cpu_sharing
        self._alone, self._crowded = open_session(path, threads), open_session(path, crowded_threads)

    def place(self, array: Any) -> Any:
        """See ``OrtSession.place``; both read it."""
        return self._alone.place(array)

    def run(self, output_names: Sequence[str], feed: Mapping[str, Any], /) -> list[Any]:
        """See ``OrtSession.run``."""
        crowded = self._cpu_sharing.crowded and self._cpu_sharing.allowed
        return (self._crowded if crowded else self._alone).run(output_names, feed)


def providers(available: Sequence[str], tensorrt: bool) -> list[Any]:
    """The execution providers in order of preference: TensorRT if requested, CUDA if available, the CPU."""
    wanted = [*([TENSORRT] if tensorrt else []), CUDA]
    return [*(one for one in wanted if one[0] in available), CPU]


def open_session(path: Path, threads: int, tensorrt: bool = False) -> OrtSession:
    """A session of ``threads`` threads, including the caller's, that sleep between two pieces of work.

    Spinning threads took 226 ms for a batch of 8, against 120 ms, while two cores were busy with other work, and the
    worker shares its machine with the HTTP process and the queue.

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
        chosen = providers(ort.get_available_providers(), tensorrt)
        session = ort.InferenceSession(str(path), options, providers=chosen)
    except Exception as error:  # onnxruntime's own exceptions share no public base
        reason = " ".join(str(error).split())
        raise BundleError(f"{path} does not open in onnxruntime {ort.__version__}: {reason}") from error
    on_gpu = {CUDA[0], TENSORRT[0]} & set(session.get_providers())
    return OrtSession(session, "cuda" if on_gpu else "cpu")

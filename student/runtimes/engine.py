"""One TensorRT plan, bound to torch's memory; and the device that it runs on: a GPU, or the host in tests.

A plan contains code: it is only opened after its bundle's hashes were verified (``checked_manifest``).
Legend: B images.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from student.bundle import BundleError

WARM_UP = 3  # runs before a CUDA graph is recorded, as torch advises
TYPES = {"FLOAT": torch.float32, "HALF": torch.float16, "BF16": torch.bfloat16, "INT64": torch.int64}
Run = Callable[[], None]


class Device(Protocol):
    """The device that engines run on."""

    name: str

    @property
    def handle(self) -> int:
        """The stream's handle for TensorRT."""
        ...

    def use(self) -> contextlib.AbstractContextManager[Any]:
        """A context whose launches go to the stream."""
        ...

    def record(self, run: Run) -> Run:
        """The launches of ``run``, recorded so that they can be replayed as one."""
        ...


class Cuda:
    """One stream of the first GPU."""

    name = "cuda:0"

    def __init__(self) -> None:
        self._stream = torch.cuda.Stream(self.name)  # type: ignore[no-untyped-call]

    @property
    def handle(self) -> int:
        """See ``Device``."""
        return int(self._stream.cuda_stream)

    def use(self) -> contextlib.AbstractContextManager[Any]:
        """See ``Device``."""
        return torch.cuda.stream(self._stream)

    def record(self, run: Run) -> Run:
        """See ``Device``: a CUDA graph."""
        for _ in range(WARM_UP):
            run()
        self._stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        # Another thread may draw with another student meanwhile: its allocations would break the recording.
        with torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local"):
            run()
        return graph.replay


class Engine:
    """One plan; for each batch size a context, bound once to its own tensors, which every call reuses.

    A context is never changed after it was bound: a recorded CUDA graph is only valid for the unchanged context. All
    contexts, and engines that run one after another, share one working memory (``share``).
    """

    def __init__(self, path: Path, library: str, device: Device) -> None:
        trt = importlib.import_module(library)
        self._trt, self._device, self._path = trt, device, path
        self._log = trt.Logger(trt.Logger.ERROR)
        self._runtime = trt.Runtime(self._log)
        self._engine = self._runtime.deserialize_cuda_engine(path.read_bytes())
        if self._engine is None:
            raise BundleError(
                f"{path} does not open in {library} {trt.__version__} on this GPU: make it again with export.run"
            )
        names = [self._engine.get_tensor_name(i) for i in range(self._engine.num_io_tensors)]
        is_input = {name: self._engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT for name in names}
        self.inputs = [name for name in names if is_input[name]]
        self.outputs = [name for name in names if not is_input[name]]
        self._scratch: Tensor | None = None
        self._contexts: dict[int, Any] = {}
        self._tensors: dict[int, dict[str, Tensor]] = {}

    @property
    def scratch_bytes(self) -> int:
        """The working memory that a run needs, in bytes."""
        return int(self._engine.device_memory_size_v2)

    def share(self, scratch: Tensor) -> None:
        """Use this working memory (uint8, on the device, at least ``scratch_bytes``)."""
        self._scratch = scratch

    def tensors(self, batch: int) -> dict[str, Tensor]:
        """Every input and output at this batch size: the same tensors for every call."""
        if batch not in self._tensors:
            self._tensors[batch] = {
                name: torch.empty((batch, *self._rest(name)), dtype=self._dtype(name), device=self._device.name)
                for name in (*self.inputs, *self.outputs)
            }
        return self._tensors[batch]

    def bind(self, batch: int) -> dict[str, Tensor]:
        """Create the context of a batch size, the first time; returns the tensors that it reads and writes.

        Raises:
            ValueError: the engine was not built for this batch size.
        """
        if batch in self._contexts:
            return self.tensors(batch)
        profile, tensors = self._profile(batch), self.tensors(batch)
        assert self._scratch is not None
        strategy = self._trt.ExecutionContextAllocationStrategy.USER_MANAGED
        context = self._engine.create_execution_context(strategy)
        context.set_device_memory(self._scratch.data_ptr(), self._scratch.numel())
        self._sure(context.set_optimization_profile_async(profile, self._device.handle), f"its profile {profile}")
        for name in self.inputs:
            shape = tuple(tensors[name].shape)
            self._sure(context.set_input_shape(name, shape), f"{name} of shape {shape}")
        for name, tensor in tensors.items():
            self._sure(context.set_tensor_address(name, tensor.data_ptr()), f"the memory of {name}")
        self._contexts[batch] = context
        return tensors

    def launch(self, batch: int) -> None:
        """Run a bound batch size; nothing is allocated."""
        self._sure(self._contexts[batch].execute_async_v3(self._device.handle), "to run")

    def _sure(self, done: bool, what: str) -> None:
        """TensorRT returns False and writes the reason to its log; that must not go unnoticed."""
        if not done:
            raise RuntimeError(f"TensorRT refused {what} in {self._path.name}: see the reason in its log")

    def _profile(self, batch: int) -> int:
        first = self.inputs[0]
        for number in range(self._engine.num_optimization_profiles):
            least, _, most = self._engine.get_tensor_profile_shape(first, number)
            if least[0] <= batch <= most[0]:
                return number
        raise ValueError(f"the engine was not built for a batch of {batch}: see export.run --batches")

    def _rest(self, name: str) -> tuple[int, ...]:
        return tuple(self._engine.get_tensor_shape(name))[1:]

    def _dtype(self, name: str) -> torch.dtype:
        return TYPES[self._engine.get_tensor_dtype(name).name]


class EngineSession:
    """One engine with the interface of ``Session``: numpy in, numpy out, for the verification of a stage."""

    def __init__(self, engine: Engine, device: Device) -> None:
        self.engine, self._device = engine, device

    def run(self, output_names: Sequence[str], feed: Mapping[str, Any], /) -> list[Any]:
        """See ``Session``."""
        with self._device.use():
            batch = len(next(iter(feed.values())))
            tensors = self.engine.bind(batch)
            for name in self.engine.inputs:
                tensors[name].copy_(torch.from_numpy(np.ascontiguousarray(feed[name])))
            self.engine.launch(batch)
            answers = [tensors[name].float().cpu().numpy() for name in output_names]
        return answers

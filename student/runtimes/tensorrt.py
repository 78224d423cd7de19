"""A student in TensorRT or TensorRT-RTX: engines bound to torch's CUDA memory, and the loop over the steps in a graph.

A plan contains code: it is only opened here after its bundle's hashes were found right (``checked_manifest``).
Legend: B images, C latent channels, H x W latent cells.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from student.bundle import BundleError, Student
from student.noise import noise
from student.runtimes.compiled import CompiledRuntime, SteppedRuntime, checked_manifest, stages_in_torch
from student.runtimes.machine import find_gpu
from student.runtimes.manifest import RUNTIMES
from student.runtimes.runtime import FloatArray, Watch
from student.runtimes.session import Session
from student.runtimes.sizes import Size, buckets, files_of
from student.runtimes.stages import DECODER, STAGES, STEP, TEXT, StagedGraphs
from student.sampler import denoise

WARM_UP = 3  # runs before a CUDA graph is recorded, as torch advises
DEVICE = "cuda:0"


class Engine:
    """One plan; for each batch size a context, bound once to tensors of its own that are used again at each call.

    A context is never changed after it was bound: a recorded CUDA graph is only valid for the context as it was. All
    of them, and engines that run one after another, share one working memory (``use``).
    """

    def __init__(self, path: Path, library: str) -> None:
        trt = importlib.import_module(library)
        self._trt = trt
        self._log = trt.Logger(trt.Logger.ERROR)
        self._runtime = trt.Runtime(self._log)
        self._engine = self._runtime.deserialize_cuda_engine(path.read_bytes())
        if self._engine is None:
            raise BundleError(f"{path} does not open in {library} {trt.__version__} on this GPU: make it again")
        names = [self._engine.get_tensor_name(i) for i in range(self._engine.num_io_tensors)]
        is_input = {name: self._engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT for name in names}
        self.inputs = [name for name in names if is_input[name]]
        self.outputs = [name for name in names if not is_input[name]]
        self._scratch: Tensor | None = None
        self._contexts: dict[int, Any] = {}
        self._tensors: dict[int, dict[str, Tensor]] = {}

    @property
    def scratch_bytes(self) -> int:
        """Working memory that a run needs."""
        return int(self._engine.device_memory_size_v2)

    def use(self, scratch: Tensor) -> None:
        """Work in this memory (uint8, on the GPU, ``scratch_bytes`` or more)."""
        self._scratch = scratch

    def tensors(self, batch: int) -> dict[str, Tensor]:
        """Every input and output at this batch size: the same tensors at every call."""
        if batch not in self._tensors:
            self._tensors[batch] = {
                name: torch.empty((batch, *self._rest(name)), dtype=self._dtype(name), device=DEVICE)
                for name in (*self.inputs, *self.outputs)
            }
        return self._tensors[batch]

    def bind(self, batch: int, stream: torch.cuda.Stream) -> dict[str, Tensor]:
        """Make the context of a batch size, the first time; what it reads and writes is in the tensors returned."""
        tensors = self.tensors(batch)
        if batch not in self._contexts:
            assert self._scratch is not None
            strategy = self._trt.ExecutionContextAllocationStrategy.USER_MANAGED
            context = self._engine.create_execution_context(strategy)
            context.set_device_memory(self._scratch.data_ptr(), self._scratch.numel())
            context.set_optimization_profile_async(self._profile(batch), stream.cuda_stream)
            for name in self.inputs:
                context.set_input_shape(name, tuple(tensors[name].shape))
            for name, tensor in tensors.items():
                context.set_tensor_address(name, tensor.data_ptr())
            self._contexts[batch] = context
        return tensors

    def launch(self, batch: int, stream: torch.cuda.Stream) -> None:
        """Run a batch size that is bound, on this stream; nothing is allocated."""
        if not self._contexts[batch].execute_async_v3(stream.cuda_stream):
            raise RuntimeError("TensorRT refused to run an engine: its own log has the reason")

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
        found = self._engine.get_tensor_dtype(name)
        known = {"FLOAT": torch.float32, "HALF": torch.float16, "BF16": torch.bfloat16, "INT64": torch.int64}
        return known[found.name]


class EngineSession:
    """One engine behind ``Session``: numpy in, numpy out, for the proof of a stage."""

    def __init__(self, engine: Engine, stream: torch.cuda.Stream) -> None:
        self.engine = engine
        self.stream = stream

    def run(self, output_names: Sequence[str], feed: Mapping[str, Any], /) -> list[Any]:
        """See ``Session``."""
        with torch.cuda.stream(self.stream):
            batch = len(next(iter(feed.values())))
            tensors = self.engine.bind(batch, self.stream)
            for name in self.engine.inputs:
                tensors[name].copy_(torch.from_numpy(np.ascontiguousarray(feed[name])))
            self.engine.launch(batch, self.stream)
            answers = [tensors[name].float().cpu().numpy() for name in output_names]
        return answers


def open_engine(path: Path, library: str) -> EngineSession:
    """Open a plan with working memory of its own.

    Raises:
        BundleError: there is no GPU, or the plan is not for it.
    """
    _require_gpu(library)
    engine = Engine(path, library)
    engine.use(torch.empty(max(engine.scratch_bytes, 1), dtype=torch.uint8, device=DEVICE))
    return EngineSession(engine, torch.cuda.Stream(DEVICE))  # type: ignore[no-untyped-call]


@dataclass(frozen=True)
class _Recorded:
    """The loop over the steps as one CUDA graph, with the memory that it reads and writes."""

    graph: torch.cuda.CUDAGraph
    noise: Tensor
    images: Tensor


class EngineGraphs(StagedGraphs):
    """The three engines with one scratch memory and one stream; a CUDA graph for each batch size and step count."""

    def __init__(self, bundle: Path, student: Student, files: Mapping[str, Path], library: str) -> None:
        _require_gpu(library)
        self._stream = torch.cuda.Stream(DEVICE)  # type: ignore[no-untyped-call]
        super().__init__(bundle, student, files, lambda path: EngineSession(Engine(path, library), self._stream))
        self._engines = {stage: self._sessions[stage].engine for stage in STAGES}  # type: ignore[attr-defined]
        most = max(engine.scratch_bytes for engine in self._engines.values())
        self._scratch = torch.empty(max(most, 1), dtype=torch.uint8, device=DEVICE)
        for engine in self._engines.values():
            engine.use(self._scratch)
        self._recorded: dict[tuple[int, int], _Recorded] = {}

    def draw(self, prompts: Sequence[str], seeds: Sequence[int], steps: int, watch: Watch | None = None) -> FloatArray:
        """images_BCHW: text, then the recorded loop and decoder; step by step where it is watched or one by one."""
        if watch is not None or self.one_by_one:
            return super().draw(prompts, seeds, steps, watch)
        ids = zip(self.tokens.names, self.tokens.encode(prompts), strict=True)
        with torch.cuda.stream(self._stream):
            tensors = self._engines[TEXT].bind(len(prompts), self._stream)
            for name, rows in ids:
                tensors[name].copy_(torch.from_numpy(rows))
            recorded = self._loop(len(prompts), steps)
            recorded.noise.copy_(torch.from_numpy(noise(seeds, self._student.latents.shape)))
            recorded.graph.replay()
            images_BCHW: FloatArray = recorded.images.float().cpu().numpy()
        return images_BCHW

    def _loop(self, batch: int, steps: int) -> _Recorded:
        key = (batch, steps)
        if key not in self._recorded:
            self._recorded[key] = self._record(batch, steps)
        return self._recorded[key]

    def _record(self, batch: int, steps: int) -> _Recorded:
        start = torch.zeros(batch, *self._student.latents.shape, device=DEVICE)
        images = torch.empty_like(self._engines[DECODER].tensors(batch)["images"])
        run = self._pass(batch, steps, start, images)
        for _ in range(WARM_UP):
            run()
        self._stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=self._stream):
            run()
        return _Recorded(graph, start, images)

    def _pass(self, batch: int, steps: int, start: Tensor, images: Tensor) -> Callable[[], None]:
        """All that a picture needs after its ids are in place: text, K steps, decoder."""
        text, step, decoder = (self._engines[stage].bind(batch, self._stream) for stage in (TEXT, STEP, DECODER))
        shared = [name for name in self._engines[TEXT].outputs if name in step]

        def velocity(x: Tensor, sigma: float) -> Tensor:
            step["latents"].copy_(x)
            step["sigma"].fill_(sigma)
            self._engines[STEP].launch(batch, self._stream)
            found: Tensor = step["velocity"]
            return found

        def run() -> None:
            self._engines[TEXT].launch(batch, self._stream)
            for name in shared:
                step[name].copy_(text[name])
            decoder["latents"].copy_(denoise(velocity, start, self._student.sigmas[steps]))
            self._engines[DECODER].launch(batch, self._stream)
            images.copy_(decoder["images"])

        return run


def engine_graphs(
    bundle: Path, student: Student, files: Mapping[str, Path], library: str, in_torch: Mapping[str, Session]
) -> StagedGraphs:
    """With the loop recorded, unless a stage stays in torch: then stage by stage."""
    if in_torch:
        return StagedGraphs(bundle, student, files, lambda path: open_engine(path, library), in_torch)
    return EngineGraphs(bundle, student, files, library)


def tensorrt_runtime(bundle: Path, student: Student, threads: int, name: str | None, library: str) -> CompiledRuntime:
    """The bundle's engine runtime for this GPU and library, or the one in the folder ``name``.

    Raises:
        BundleError: there is none that fits this machine; the message says what differs.
    """
    _require_gpu(library)
    folder = name or _fitting(bundle, library)
    manifest = checked_manifest(bundle, student, folder, {library: _version(library)})
    in_torch = stages_in_torch(bundle, student, manifest, threads, DEVICE)

    def at(size: Size | None, resized: Student) -> StagedGraphs:
        files = files_of(bundle / RUNTIMES / folder, manifest, size)
        return engine_graphs(bundle, resized, files, library, in_torch)

    others = {size: at(size, resized) for size, resized in buckets(student, manifest).items()}
    return SteppedRuntime(bundle, student, threads, folder, at(None, student), others)


def _fitting(bundle: Path, library: str) -> str:
    """The folder that names this GPU; else the first, whose refusal will say what differs."""
    gpu, _ = find_gpu()
    there = sorted(path.name for path in (bundle / RUNTIMES).glob(f"{library}-*") if path.is_dir())
    if not there:
        raise BundleError(f"{bundle} has no runtime {library}: make it with export.run --to {library}")
    return next((name for name in there if gpu is not None and f"-{gpu.slug}-" in name), there[0])


def _version(library: str) -> str:
    distribution = library.replace("_", "-")
    for package in (distribution, f"{distribution}-cu13", f"{distribution}-cu12", f"{distribution}-cu13-bindings"):
        try:
            return version(package)
        except PackageNotFoundError:
            continue
    return "unknown"


def _require_gpu(library: str) -> None:
    """Before the library is touched: without a driver its objects crash the process at exit."""
    gpu, reason = find_gpu()
    if gpu is None:
        raise BundleError(f"{library} needs an NVIDIA GPU, and {reason}")
    if not torch.cuda.is_available():
        raise BundleError(f"{library} needs torch with CUDA, and torch {torch.__version__} is without")

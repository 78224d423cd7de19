"""TensorRT and TensorRT-RTX engines from a student's staged graphs: one code path, two libraries."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from export.builder import build_engine
from export.engine import Order
from export.graph import shapes_of
from export.preflight import missing_library
from export.request import Request
from export.targets import Converted, narrowed, reasons
from student.runtimes.machine import facts, find_gpu, library_version
from student.runtimes.manifest import DECODER
from student.runtimes.stages import Opener

ANY_GPU = "anygpu"
SUFFIX = ".engine"


@dataclass(frozen=True)
class TensorRT:
    """``name`` is the library: tensorrt needs a GPU to build; tensorrt_rtx builds without one, but unverified."""

    name: str
    precisions: Mapping[str, tuple[str, ...]] = field(
        default_factory=lambda: {"bf16": ("staged",), "fp16": ("staged",), "fp32": ("staged",), "fp8": ("staged",)}
    )

    def refuse(self, request: Request) -> str | None:
        """A missing library or, for ``tensorrt``, GPU: its objects crash the process at exit without a driver."""
        if reason := missing_library(self.name):
            return reason
        gpu, why_not = find_gpu()
        if gpu is None and self.name == "tensorrt":
            return f"tensorrt builds for the machine's GPU, and {why_not}"
        return None

    def folder(self, request: Request) -> str:
        """``tensorrt-staged-bf16-h100-80gb-hbm3-11.4.0``: an engine runs only on that GPU with that library."""
        gpu, _ = find_gpu()
        where = f"{gpu.slug if gpu else ANY_GPU}-{library_version(self.name)}"
        return f"{self.name}-{request.form}-{request.precision}-{where}"

    def convert(self, request: Request, stage: str, graph: Path, target: Path) -> Converted:
        """Make the narrow graph, then its engine, in a separate process."""
        onnx = target.with_name(f".{stage}.source.onnx")
        made = narrowed(request, stage, graph, onnx)
        plan = target.with_suffix(SUFFIX)
        inputs, _ = shapes_of(made.file)
        order = self._order(request, stage, made.file, plan, inputs)
        build_engine(order, request.engine.memory_bytes, request.say, target.parent)
        return Converted(plan, plan)

    def _order(
        self, request: Request, stage: str, onnx: Path, plan: Path, inputs: Mapping[str, tuple[int | str, ...]]
    ) -> Order:
        options, gpu = request.engine, find_gpu()[0]
        cache = onnx.parent.parent / f".{self.name}-{gpu.slug}.timing" if gpu else None
        return Order(
            library=self.name,
            onnx=str(onnx),
            plan=str(plan),
            inputs=inputs,
            profiles=profiles(options.batches),
            workspace_bytes=options.workspace_bytes,
            level=options.level,
            portable=options.portable,
            batch_invariant=options.batch_invariant,
            timing_cache=str(cache) if cache else "",
            # A decoder that stays in float32 beside bf16 needs no more bits than TF32 has.
            tf32=stage.startswith(DECODER) and request.precision != "fp32",
        )

    def opener(self, request: Request) -> Opener | None:
        """None without a GPU: then nothing can be verified, and serving refuses the runtime until it is."""
        if find_gpu()[0] is None:
            return None
        from student.runtimes.tensorrt import open_engine

        return lambda path: open_engine(path, self.name)

    def kept_float32(self, precision: str) -> dict[str, str]:
        return reasons(precision)

    def requires(self, request: Request) -> dict[str, str]:
        """The machine and the library that the engine needs; a portable one is not bound to one GPU."""
        found = facts() | {self.name: library_version(self.name)}
        if request.engine.portable:
            found = {name: value for name, value in found.items() if name not in ("gpu", "compute_capability")}
        return found


def profiles(batches: tuple[int, ...]) -> tuple[tuple[int, int, int], ...]:
    """One profile for each last batch size, starting after the one before: (1, 2, 4, 8) -> 1, 2, 3-4, 5-8."""
    ordered = sorted(set(batches))
    return tuple((before + 1, last, last) for before, last in zip([0, *ordered], ordered, strict=False))

"""What a student can be compiled to; export/select.py lists all targets.

A target defines its precisions and forms, why it is not available here, how it converts a float32 graph, and how the
result is opened for the proof.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import onnx_ir as ir

from export.errors import ExportError
from export.graph import save
from export.narrow import FLOAT32_STAGES, float32_reasons, narrow
from export.preflight import missing_library
from export.quantise import NOT_QUANTISED
from export.quantise import PRECISIONS as EIGHT_BITS
from export.request import Request
from export.store import link_graph
from student.runtimes.stages import Opener

FORMS = ("staged", "fused")
FUSED_FAMILIES = ("flux",)
STAGED_FAMILIES = ("flux", "flux2", "qwen_image", "sd3", "wan", "z_image")
AROUND = {"fp8": "bf16"}  # the precision of all that is not quantised


@dataclass(frozen=True)
class Converted:
    """The converted graph: its file, and the file that is used in the proof, which differs if no CPU can run it."""

    file: Path
    proof: Path


class Target(Protocol):
    """One way to run a student."""

    @property
    def name(self) -> str: ...
    @property
    def precisions(self) -> Mapping[str, tuple[str, ...]]:
        """The forms of each precision, the default precision first."""
        ...

    def refuse(self, request: Request) -> str | None: ...
    def folder(self, request: Request) -> str: ...
    def convert(self, request: Request, stage: str, graph: Path, target: Path) -> Converted: ...
    def opener(self, request: Request) -> Opener | None: ...
    def kept_float32(self, precision: str) -> dict[str, str]: ...
    def requires(self, request: Request) -> dict[str, str]: ...


def check_request(target: Target, form: str, precision: str, family: str) -> None:
    """Raises ExportError for what this target does not have."""
    if form not in FORMS:
        raise ExportError(f"form is {form!r}: accepted are {', '.join(FORMS)}")
    if precision not in target.precisions:
        accepted = ", ".join(target.precisions)
        raise ExportError(f"precision is {precision!r}: accepted for {target.name} are {accepted}")
    if form not in target.precisions[precision]:
        forms = ", ".join(target.precisions[precision])
        raise ExportError(f"{target.name} in {precision} has no {form} form: accepted is {forms}")
    families = FUSED_FAMILIES if form == "fused" else STAGED_FAMILIES
    if family not in families:
        raise ExportError(f"cannot export the family {family!r} in {form} form: accepted are {', '.join(families)}")


@dataclass(frozen=True)
class Onnx:
    """Graphs for ONNX Runtime; bfloat16 and fp8 ones are for TensorRT (there are no CPU kernels).

    The narrow ones are verified on a CPU with each result rounded.
    """

    name: str = "onnx"
    precisions: Mapping[str, tuple[str, ...]] = field(
        default_factory=lambda: {"fp32": FORMS, **dict.fromkeys(("fp16", "bf16", "int8", "fp8"), ("staged",))}
    )

    def refuse(self, request: Request) -> str | None:
        return missing_library("onnxruntime")

    def folder(self, request: Request) -> str:
        return f"{self.name}-{request.form}-{request.precision}"

    def convert(self, request: Request, stage: str, graph: Path, target: Path) -> Converted:
        """A float32 graph in this precision; the int8 step is made by ``export.compile``, which has its inputs."""
        return narrowed(request, stage, graph, target.with_suffix(".onnx"))

    def opener(self, request: Request) -> Opener | None:
        from student.runtimes.session import open_session

        return lambda path: open_session(path, request.threads)

    def kept_float32(self, precision: str) -> dict[str, str]:
        return reasons(precision)

    def requires(self, request: Request) -> dict[str, str]:
        return {}


@dataclass(frozen=True)
class OpenVino:
    """The float32 graphs, computed by OpenVINO on a CPU in float32 or, with a hint, in bfloat16."""

    name: str = "openvino"
    precisions: Mapping[str, tuple[str, ...]] = field(default_factory=lambda: {"bf16": FORMS, "fp32": FORMS})

    def refuse(self, request: Request) -> str | None:
        return missing_library("openvino")

    def folder(self, request: Request) -> str:
        return f"{self.name}-{request.form}-{request.precision}"

    def convert(self, request: Request, stage: str, graph: Path, target: Path) -> Converted:
        link_graph(graph, target.with_suffix(".onnx"))
        return Converted(target.with_suffix(".onnx"), target.with_suffix(".onnx"))

    def opener(self, request: Request) -> Opener | None:
        from student.runtimes.openvino import opener

        return opener(request.threads, request.precision)

    def kept_float32(self, precision: str) -> dict[str, str]:
        return {}

    def requires(self, request: Request) -> dict[str, str]:
        return {}


def reasons(precision: str) -> dict[str, str]:
    """What stays in a higher precision and why, for the manifest."""
    quantised = NOT_QUANTISED if precision in EIGHT_BITS else {}
    return {**float32_reasons(AROUND.get(precision, precision)), **quantised}


def narrowed(request: Request, stage: str, graph: Path, target: Path) -> Converted:
    """The graph in the request's narrow type, or unchanged if this stage stays float32."""
    precision = AROUND.get(request.precision, request.precision)
    if precision not in FLOAT32_STAGES or stage.partition("-")[0] in FLOAT32_STAGES[precision]:
        link_graph(graph, target)
        return Converted(target, target)
    save(narrow(ir.load(graph), precision), target)
    proof = target.with_name(f".{stage}.proof.onnx")
    save(narrow(ir.load(graph), precision, round_only=True), proof)
    return Converted(target, proof)

"""All targets by name; a new one is another entry of ``known``."""

from __future__ import annotations

from export.errors import ExportError
from export.targets import Onnx, OpenVino, Target
from export.to_tensorrt import TensorRT


def find_target(name: str) -> Target:
    """The target of this name; raises ExportError for an unknown name."""
    known: tuple[Target, ...] = (Onnx(), OpenVino(), TensorRT("tensorrt"), TensorRT("tensorrt_rtx"))
    targets = {target.name: target for target in known}
    if name not in targets:
        raise ExportError(f"cannot compile to {name!r}: accepted are {', '.join(targets)}")
    return targets[name]

"""The step's graph in int8 for CPUs: weights by output channel, activations by one scale each, measured beforehand.

Scales that are fixed keep an image independent of its batch mates, which those found anew in each batch do not.
Only products of tokens with weights are int8; text encoders and decoder stay float32.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
from onnxruntime import quantization  # type: ignore[import-untyped]

from export.graph import save
from export.narrow import widen_weights

QUANTISED = ("MatMul",)  # linear maps of tokens; those of one vector for each image are Gemm
WIDE = {
    "the text stage": "runs once, and every step reads it",
    "the decoder stage": "its errors are pixels",
    "products of two activations": "attention weights are small where they matter",
    "Gemm": "times and modulation are a small part of the work, and every token reads them",
}


class _Feeds(quantization.CalibrationDataReader):  # type: ignore[misc]
    def __init__(self, feeds: Iterable[Mapping[str, Any]]) -> None:
        self._feeds: Iterator[Mapping[str, Any]] = iter(feeds)

    def get_next(self) -> Mapping[str, Any] | None:
        return next(self._feeds, None)


def quantise(graph: Path, target: Path, feeds: Iterable[Mapping[str, Any]]) -> None:
    """Write the int8 form of ``graph``; ``feeds`` are inputs like those that it will get (calibration)."""
    wide = ir.load(graph)
    widen_weights(wide.graph)
    metadata = dict(wide.metadata_props)
    source = target.with_name(f"{target.stem}.wide.onnx")
    save(wide, source)
    root = logging.getLogger()
    level = root.level
    root.setLevel(logging.ERROR)  # advises a pre-processing that this graph has had
    try:
        quantization.quantize_static(
            source,
            target,
            _Feeds(feeds),
            op_types_to_quantize=list(QUANTISED),
            per_channel=True,
            activation_type=quantization.QuantType.QUInt8,
            weight_type=quantization.QuantType.QInt8,
            extra_options={"MatMulConstBOnly": True},
        )
    finally:
        root.setLevel(level)
        for left_over in (source, source.with_name(f"{source.name}.data")):
            left_over.unlink(missing_ok=True)
    _describe(target, metadata)


def _describe(path: Path, metadata: Mapping[str, str]) -> None:
    """The student's own metadata and no clock: the same graph, the same bytes."""
    model = onnx.load(path)
    del model.metadata_props[:]
    model.producer_name, model.producer_version = "fewstep", ""
    for key, value in sorted(metadata.items()):
        model.metadata_props.add(key=key, value=value)
    path.write_bytes(model.SerializeToString(deterministic=True))
    onnx.checker.check_model(path)

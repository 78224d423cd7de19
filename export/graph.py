"""From a torch module to one tidy ONNX graph: the recipe that every exported graph goes through.

Same module, same bytes: nothing of the clock, the machine or a path is kept in the graph.
"""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx
import onnx_ir as ir
import torch
from onnx_ir.passes import common as passes
from onnxscript import optimizer
from torch import Tensor, nn

OPSET = 20  # 23 has native attention, which ONNX Runtime's CPU kernel and tensorrt-rtx take only in part
MAX_BATCH = 63  # diffusers' upsampling branches at a batch of 64
HALVE_FROM = 1024  # numbers; smaller tensors are not worth a Cast
NO_LIMIT = 2**62
Shapes = dict[str, tuple[int | str, ...]]


@dataclass(frozen=True)
class Signature:
    """Names of a graph's inputs (with an example of each, batch 2) and of its outputs."""

    name: str
    inputs: Mapping[str, Tensor]
    outputs: tuple[str, ...]


def export_graph(module: nn.Module, signature: Signature, metadata: Mapping[str, str]) -> bytes:
    """The module as a checked ONNX file; the first dimension of every input and output is ``batch``.

    The exporter's own optimiser is left out: it drops ``x + eps`` for eps <= 1e-8.
    """
    batch = {0: torch.export.Dim("batch", min=1, max=MAX_BATCH)}
    with _quiet():
        program = torch.onnx.export(
            module.eval(),
            tuple(signature.inputs.values()),
            input_names=list(signature.inputs),
            output_names=list(signature.outputs),
            dynamic_shapes=tuple(batch for _ in signature.inputs),
            opset_version=OPSET,
            dynamo=True,
            optimize=False,
            verbose=False,
        )
        assert program is not None
        model = _tidy(program.model)
    _halve(model.graph)
    _describe(model, signature, metadata)
    data: bytes = ir.to_proto(model).SerializeToString(deterministic=True)
    onnx.checker.check_model(onnx.load_from_string(data), full_check=True)
    return data


def shapes_of(data: bytes) -> tuple[Shapes, Shapes]:
    """The shapes of a graph's inputs and outputs, by name."""
    graph = onnx.load_from_string(data).graph
    inputs, outputs = (
        {
            value.name: tuple(dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim)
            for value in values
        }
        for values in (graph.input, graph.output)
    )
    return inputs, outputs


def _tidy(model: ir.Model) -> ir.Model:
    """Fold what is constant and share what is equal: K steps repeat the same constants and the same text work."""
    optimizer.fold_constants(model)
    share: Sequence[ir.passes.PassBase] = (
        passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        passes.DeduplicateInitializersPass(size_limit=NO_LIMIT),
        passes.CommonSubexpressionEliminationPass(),
        passes.RemoveUnusedNodesPass(),
        passes.ClearMetadataAndDocStringPass(),  # source lines of this machine among them
    )
    for step in share:
        model = step(model).model
    graph = model.graph
    for value in (*graph.inputs, *graph.initializers.values(), *(out for node in graph for out in node.outputs)):
        value.metadata_props.clear()
    return model


def _halve(graph: ir.Graph) -> None:
    """Store as float16, with a Cast back, each weight of which that loses nothing.

    So the file of a student whose own weights are float16 on disk is half as large, and no number in it changes.
    """
    first = graph[0]
    for name, wide in list(graph.initializers.items()):
        assert wide.const_value is not None
        weights = wide.const_value.numpy()
        if weights.dtype != np.float32 or weights.size < HALVE_FROM:
            continue
        with np.errstate(over="ignore"):
            half = weights.astype(np.float16)
        if not np.array_equal(half.astype(np.float32), weights):
            continue
        stored = ir.Value(
            name=f"{name}.f16",
            shape=wide.shape,
            type=ir.TensorType(ir.DataType.FLOAT16),
            const_value=ir.tensor(half, name=f"{name}.f16"),
        )
        to_float = [ir.AttrInt64("to", int(ir.DataType.FLOAT))]
        cast = ir.Node("", "Cast", [stored], to_float, num_outputs=1, name=f"widen.{name}")
        graph.initializers.pop(name)
        wide.replace_all_uses_with(cast.outputs[0])
        cast.outputs[0].name, cast.outputs[0].shape, cast.outputs[0].type = name, wide.shape, wide.type
        graph.register_initializer(stored)
        graph.insert_before(first, cast)


def _describe(model: ir.Model, signature: Signature, metadata: Mapping[str, str]) -> None:
    model.producer_name, model.producer_version = "fewstep", ""
    model.graph.name = signature.name
    model.metadata_props.clear()
    model.metadata_props.update(dict(sorted(metadata.items())))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporter's remarks about itself from the user: none of them is about the model."""
    log = logging.getLogger("torch.onnx._internal.exporter._registration")
    level = log.level
    log.setLevel(logging.ERROR)  # says that torchvision is not installed
    try:
        with warnings.catch_warnings(), np.errstate(all="ignore"):
            for category, message in (
                (FutureWarning, ".*treespec.*"),
                (UserWarning, ".*The axis name: batch will not be used.*"),
                (RuntimeWarning, ".*"),  # numpy on the untaken branch of T5's position buckets, while folding
            ):
                warnings.filterwarnings("ignore", message, category)
            yield
    finally:
        log.setLevel(level)

"""Exports a torch module as one tidy ONNX graph; every exported graph goes through this.

The same module gives the same bytes: the graph depends on no clock, machine or path.
"""

from __future__ import annotations

import contextlib
import logging
import re
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import torch
from onnx_ir.passes import common as passes
from onnxscript import optimizer
from torch import Tensor, nn

from export.errors import NoOnnxForm

OPSET = 20  # 23 has native attention, which ONNX Runtime's CPU kernel and tensorrt-rtx take only in part
MAX_SIDE = 2**14  # pixels of a picture that a scorer is shown
MAX_BATCH = 63  # diffusers' upsampling branches at a batch of 64
HALVE_FROM = 1024  # numbers; smaller tensors are not worth a Cast
NO_LIMIT = 2**62
ONE_FILE_BYTES = 2**31 - 2**24  # protobuf ends at 2 GiB, and the nodes need some of it
Shapes = dict[str, tuple[int | str, ...]]


@dataclass(frozen=True)
class Signature:
    """Names of a graph's inputs (with an example of each, batch 2) and of its outputs.

    The first dimension is the batch, except for ``not_batched``; ``free`` names other dimensions that are not fixed.
    """

    name: str
    inputs: Mapping[str, Tensor]
    outputs: tuple[str, ...]
    free: Mapping[str, Mapping[int, str]] = field(default_factory=dict)
    not_batched: tuple[str, ...] = ()

    def dims(self) -> tuple[dict[int, Any], ...]:
        """The dynamic shapes of each input for the exporter; equal names are equal sizes."""
        names = sorted({name for dims in self.free.values() for name in dims.values()})
        known = {name: torch.export.Dim(name, min=1, max=MAX_SIDE) for name in names}
        batch = torch.export.Dim("batch", min=1, max=MAX_BATCH)
        return tuple(
            {
                **({} if name in self.not_batched else {0: batch}),
                **{axis: known[dim] for axis, dim in self.free.get(name, {}).items()},
            }
            for name in self.inputs
        )


@dataclass(frozen=True)
class Part:
    """One graph to export: the module, its signature, and the metadata of its file."""

    module: nn.Module
    signature: Signature
    metadata: Mapping[str, str]

    def export(self, path: Path) -> None:
        """Write the checked ONNX file; see ``trace`` and ``save``."""
        save(trace(self.module, self.signature, self.metadata), path)


def export_graph(module: nn.Module, signature: Signature, metadata: Mapping[str, str]) -> bytes:
    """The module as one checked ONNX file; see ``trace``."""
    data: bytes = ir.to_proto(trace(module, signature, metadata)).SerializeToString(deterministic=True)
    onnx.checker.check_model(onnx.load_from_string(data), full_check=True)
    return data


def save(model: ir.Model, path: Path, limit_bytes: int = ONE_FILE_BYTES) -> None:
    """Write and check a graph; its weights go into ``<path>.data`` if they are more than a protobuf holds."""
    weights = sum(value.const_value.nbytes for value in model.graph.initializers.values() if value.const_value)
    if weights <= limit_bytes:
        path.write_bytes(ir.to_proto(model).SerializeToString(deterministic=True))
    else:
        ir.save(model, path, external_data=f"{path.name}.data")
    onnx.checker.check_model(path, full_check=True)


def trace(module: nn.Module, signature: Signature, metadata: Mapping[str, str]) -> ir.Model:
    """The module as a tidy graph; the first dimension of every input and output is ``batch``.

    The exporter's own optimiser is left out: it drops ``x + eps`` for eps <= 1e-8.

    Raises:
        NoOnnxForm: an operator that has no ONNX form, named with the module that it came from.
    """
    with _quiet():
        try:
            program = torch.onnx.export(
                module.eval(),
                tuple(signature.inputs.values()),
                input_names=list(signature.inputs),
                output_names=list(signature.outputs),
                dynamic_shapes=signature.dims(),
                opset_version=OPSET,
                dynamo=True,
                optimize=False,
                verbose=False,
            )
        except torch.onnx.errors.OnnxExporterError as error:
            raise NoOnnxForm(f"{signature.name} has no ONNX form: {culprit(error)}") from error
        assert program is not None
        model = _tidy(program.model)
    _halve(model.graph)
    _describe(model, signature, metadata)
    return model


def culprit(error: BaseException) -> str:
    """What the exporter did not accept: the operator and the submodule that calls it, as far as known.

    The exception itself does not say where, but the exporter's frame that raised it still has the node.
    """
    chain = [error]
    while chain[-1].__cause__ is not None:
        chain.append(chain[-1].__cause__)
    found = re.search(r"op='([^']+)'", " ".join(map(str, chain)))
    if found is None:
        return next(iter(str(chain[-1]).strip().splitlines()), type(chain[-1]).__name__)
    where = next((place for one in chain if (place := _module_of(one))), None)
    return f"the operator {found[1]}" + (f" in {where}" if where else "")


def _module_of(error: BaseException) -> str | None:
    frame = error.__traceback__
    while frame is not None:
        node = frame.tb_frame.f_locals.get("node")
        if isinstance(node, torch.fx.Node) and (stack := node.meta.get("nn_module_stack")):
            path, kind = list(stack.values())[-1]
            return f"{path or 'the module itself'} ({kind if isinstance(kind, str) else kind.__name__})"
        frame = frame.tb_next
    return None


def shapes_of(path: Path) -> tuple[Shapes, Shapes]:
    """The shapes of a graph's inputs and outputs, by name."""
    graph = onnx.load(path, load_external_data=False).graph
    inputs, outputs = (
        {
            value.name: tuple(dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim)
            for value in values
        }
        for values in (graph.input, graph.output)
    )
    return inputs, outputs


def _tidy(model: ir.Model) -> ir.Model:
    """Fold constants and share equal subexpressions: K steps repeat the same constants and the same text work."""
    _name_transposed(model.graph)
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


def _name_transposed(graph: ir.Graph) -> None:
    """Give weights that folding will transpose a readable name: ``blocks.0.to_q.value.T``."""
    seen: Counter[str] = Counter()
    for node in graph:
        weight = node.inputs[0] if node.op_type == "Transpose" else None
        if weight is not None and weight.is_initializer():
            name = f"{weight.name}.T"
            seen[name] += 1
            node.outputs[0].name = name if seen[name] == 1 else f"{name}.{seen[name]}"  # once in each step


def _halve(graph: ir.Graph) -> None:
    """Store each weight as float16, with a Cast back, if that loses nothing.

    This halves the file of a student whose weights are float16 on disk, without changing any number.
    """
    first = graph[0]
    for name, value in list(graph.initializers.items()):
        assert value.const_value is not None
        weights = value.const_value.numpy()
        if weights.dtype != np.float32 or weights.size < HALVE_FROM:
            continue
        with np.errstate(over="ignore"):
            half = weights.astype(np.float16)
        if not np.array_equal(half.astype(np.float32), weights):
            continue
        stored = ir.Value(
            name=f"{name}.f16",
            shape=value.shape,
            type=ir.TensorType(ir.DataType.FLOAT16),
            const_value=ir.tensor(half, name=f"{name}.f16"),
        )
        to_float = [ir.AttrInt64("to", int(ir.DataType.FLOAT))]
        cast = ir.Node("", "Cast", [stored], to_float, num_outputs=1, name=f"widen.{name}")
        graph.initializers.pop(name)
        value.replace_all_uses_with(cast.outputs[0])
        cast.outputs[0].name, cast.outputs[0].shape, cast.outputs[0].type = name, value.shape, value.type
        graph.register_initializer(stored)
        graph.insert_before(first, cast)


def _describe(model: ir.Model, signature: Signature, metadata: Mapping[str, str]) -> None:
    model.producer_name, model.producer_version = "fewstep", ""
    model.graph.name = signature.name
    model.metadata_props.clear()
    model.metadata_props.update(dict(sorted(metadata.items())))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence the exporter's messages about itself: none of them is about the model."""
    log = logging.getLogger("torch.onnx._internal.exporter._registration")
    level = log.level
    log.setLevel(logging.ERROR)  # says that torchvision is not installed
    try:
        with warnings.catch_warnings(), np.errstate(all="ignore"):
            for category, message in (
                (FutureWarning, ".*treespec.*"),
                (UserWarning, ".*The axis name: .* will not be used.*"),
                (RuntimeWarning, ".*"),  # numpy on the untaken branch of T5's position buckets, while folding
            ):
                warnings.filterwarnings("ignore", message, category)
            yield
    finally:
        log.setLevel(level)

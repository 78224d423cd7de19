"""int8: near, fixed scales (so that an image does not depend on its batch), and the same bytes each time."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from torch import nn

from export.graph import Signature, export_graph
from export.quantise import quantise


@pytest.fixture(scope="module")
def graphs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    folder = tmp_path_factory.mktemp("int8")
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64)).half().float()
    signature = Signature("mlp", {"x": torch.zeros(2, 7, 64)}, ("y",))
    wide, short, again = (folder / f"{name}.onnx" for name in ("wide", "short", "again"))
    wide.write_bytes(export_graph(module, signature, {"student": "tiny 1"}))
    for target in (short, again):
        quantise(wide, target, [{"x": batch(seed)} for seed in range(8)])
    return wide, short, again


def batch(seed: int, size: int = 4) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((size, 7, 64), dtype=np.float32)


def run(path: Path, x: np.ndarray) -> np.ndarray:
    out: np.ndarray = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"]).run(["y"], {"x": x})[0]
    return out


def test_it_is_near_smaller_and_really_int8(graphs: tuple[Path, Path, Path]) -> None:
    wide, short, _ = graphs
    ours, theirs = run(short, batch(99)), run(wide, batch(99))
    assert 1e-4 < np.linalg.norm(ours - theirs) / np.linalg.norm(theirs) < 0.03
    weights = [i for i in onnx.load(short).graph.initializer if np.prod(i.dims) == 64 * 256]
    assert len(weights) == 2 and {w.data_type for w in weights} == {onnx.TensorProto.INT8}


def test_an_image_does_not_depend_on_its_batch_mates(graphs: tuple[Path, Path, Path]) -> None:
    x = batch(5)
    together = run(graphs[1], np.concatenate([x, 100 * batch(6)]))
    np.testing.assert_allclose(together[:4], run(graphs[1], x), atol=1e-6)


def test_two_are_equal_to_the_byte_and_say_whose_they_are(graphs: tuple[Path, Path, Path]) -> None:
    _, short, again = graphs
    assert short.read_bytes() == again.read_bytes()
    assert {p.key: p.value for p in onnx.load(short).metadata_props} == {"student": "tiny 1"}
    assert sorted(path.name for path in short.parent.iterdir()) == ["again.onnx", "short.onnx", "wide.onnx"]

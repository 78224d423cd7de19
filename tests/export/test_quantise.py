"""Eight bits: near, fixed scales (so that an image does not depend on its batch), the same bytes each time, and layers
that do not bear it left out by measurement."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from torch import nn

from export import calibrate
from export import quantise as module
from export.calibrate import observe, opened
from export.graph import Signature, export_graph
from export.qdq import layers, quantised
from export.quantise import CUTS, Choice, choose, quantise
from export.switched import CUT, EIGHT, switched, switches
from export.verify import TOLERANCES


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


class Planted(nn.Module):
    """Two layers: the second one's input has a value a thousand times as large as the others, which no scale serves."""

    def __init__(self, seed: int = 1) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.good, self.bad = nn.Linear(64, 64, bias=False), nn.Linear(64, 64, bias=False)
        with torch.no_grad():
            self.bad.weight[:, 0] *= 1e-3
        self.register_buffer("size", torch.ones(64))
        self.size[0] = 1000.0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.good(x) + self.bad(x * self.size)


def planted(folder: Path) -> Path:
    path = folder / "planted.onnx"
    path.write_bytes(export_graph(Planted(), Signature("planted", {"x": torch.zeros(2, 7, 64)}, ("y",)), {}))
    return path


def test_a_layer_that_does_not_bear_it_is_found_and_left_out(tmp_path: Path) -> None:
    graph, target = planted(tmp_path), tmp_path / "short.onnx"
    feeds = [{"x": batch(seed)} for seed in range(4)]
    choice = quantise(graph, target, feeds)
    assert choice.left_out == ("bad.weight.T",) and choice.all_error > 0.1 > choice.error
    assert choice.sensitivity is not None and choice.sensitivity["good.weight.T"] < 0.02
    stored = {value.name: value.data_type for value in onnx.load(target).graph.initializer}
    assert stored["good.weight.T.int8"] == onnx.TensorProto.INT8 and stored["bad.weight.T"] == onnx.TensorProto.FLOAT
    assert np.linalg.norm(run(target, batch(9)) - run(graph, batch(9))) / np.linalg.norm(run(graph, batch(9))) < 0.05
    assert "quantised alone, it changes the result by" in choice.reasons()["bad.weight.T"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["planted.onnx", "short.onnx"]


def test_the_choice_is_stricter_than_the_gate_that_comes_after_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The gate measures on more images."""
    asked: list[float] = []

    def choose_all(names: Sequence[str], error: object, alone: object, most: float) -> Choice:
        asked.append(most)
        return Choice(len(names), 0.0, 0.0)

    monkeypatch.setattr(module, "choose", choose_all)
    for precision in ("int8", "fp8"):
        quantise(planted(tmp_path), tmp_path / "short.onnx", [{"x": batch(0)}], precision)
    assert asked == [pytest.approx(0.8 * TOLERANCES[precision].stage) for precision in ("int8", "fp8")]


class Several(nn.Module):
    """As many of these side by side."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.parts = nn.ModuleList(Planted(seed) for seed in range(count))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.stack([part(x) for part in self.parts]).sum(dim=0)


@pytest.mark.parametrize("count", [1, 5])
def test_a_graph_is_written_and_opened_as_often_whatever_its_layers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    """Opening a graph of a large model takes minutes: two work copies, however many layers must be left out."""
    graph, opened, written = tmp_path / "several.onnx", list[str](), list[str]()
    graph.write_bytes(export_graph(Several(count), Signature("several", {"x": torch.zeros(2, 7, 64)}, ("y",)), {}))
    session, save = ort.InferenceSession, calibrate.save

    def counted(path: str, *rest: Any, **options: Any) -> Any:
        opened.append(Path(path).name)
        return session(path, *rest, **options)

    def saved(model: ir.Model, path: Path) -> None:
        written.append(path.name)
        save(model, path)

    monkeypatch.setattr(ort, "InferenceSession", counted)
    monkeypatch.setattr(calibrate, "save", saved)
    monkeypatch.setattr(module, "save", saved)
    choice = quantise(graph, tmp_path / "short.onnx", [{"x": batch(seed)} for seed in range(3)])
    assert len(choice.left_out) == count and all("bad" in name for name in choice.left_out)
    assert opened == 2 * [".short.work.onnx"] and written == [*opened, "short.onnx"]


@pytest.mark.parametrize("precision", ["int8", "fp8"])
def test_the_switches_compute_what_the_written_graph_computes(tmp_path: Path, precision: str) -> None:
    """At every cut, with all layers in eight bits and with each one left out; all off is the graph as it was."""
    graph, work = planted(tmp_path), tmp_path / "work.onnx"
    names = list(layers(ir.load(graph).graph))
    inputs = [f"{node.inputs[0].name}" for node in layers(ir.load(graph).graph).values() if node.inputs[0]]
    seen, x = observe(ir.load(graph), inputs, [{"x": batch(1)}], work), batch(2)
    session = opened(switched(ir.load(graph), seen, precision, CUTS), work)

    def answer(left_out: list[str], cut: float) -> np.ndarray:
        how = {EIGHT: switches(names, left_out), CUT: np.asarray(CUTS.index(cut), np.int64)}
        result: np.ndarray = session.run(["y"], {"x": x, **how})[0]
        return result

    for left_out, cut in itertools.product(([], [names[0]], [names[1]]), CUTS):
        ir.save(quantised(ir.load(graph), seen, precision, left_out, cut), work)
        right = run(work, x)
        assert np.linalg.norm(answer(left_out, cut) - right) < 1e-4 * np.linalg.norm(right)
    np.testing.assert_allclose(answer(names, CUTS[1]), run(graph, x), atol=1e-5)
    assert np.abs(answer([], CUTS[0]) - answer([], CUTS[-1])).max() > 1e-3


@pytest.mark.parametrize(
    ("precision", "stored"), [("int8", onnx.TensorProto.INT8), ("fp8", onnx.TensorProto.FLOAT8E4M3FN)]
)
def test_products_of_single_vectors_are_in_eight_bits_too(tmp_path: Path, precision: str, stored: int) -> None:
    """The exporter writes them as Gemm: modulation, a quarter of FLUX's weights. The bias stays as it is."""
    graph, target, x = tmp_path / "gemm.onnx", tmp_path / "short.onnx", batch(3)[:, 0]
    torch.manual_seed(5)
    module = nn.Sequential(nn.Linear(64, 32), nn.SiLU(), nn.Linear(32, 16))
    graph.write_bytes(export_graph(module, Signature("gemm", {"x": torch.zeros(2, 64)}, ("y",)), {}))
    assert [node.op_type for node in onnx.load(graph).graph.node].count("Gemm") == 2
    quantise(graph, target, [{"x": x}], precision)
    weights = {value.name: value.data_type for value in onnx.load(target).graph.initializer if len(value.dims) == 2}
    assert sorted(weights.values()) == [stored, stored]
    right = module(torch.from_numpy(x)).detach().numpy()
    assert 1e-4 < np.linalg.norm(run(target, x) - right) / np.linalg.norm(right) < 0.06


@pytest.mark.parametrize(("prompts", "cycle"), [(8, 15), (1, 15), (30, 12), (3, 1)])
def test_the_choice_is_made_by_inputs_of_every_sigma(prompts: int, cycle: int) -> None:
    """The starter's 15 (4, 1, 2 and 8 steps) for 8 batches of prompts, and others; the worst is often the last."""
    feeds = [{"sigma": index % cycle, "prompt": index // cycle} for index in range(prompts * cycle)]
    sample = module._spread(feeds)
    assert {feed["sigma"] for feed in sample} == set(range(cycle))
    assert len({(feed["sigma"], feed["prompt"]) for feed in sample}) == len(sample) == min(16, len(feeds))


def test_the_fewest_of_the_worst_are_left_out() -> None:
    """Against a model of which the answer is known: errors add up."""
    alone = {"a": 0.01, "b": 0.5, "c": 0.02, "d": 0.3, "e": 0.01}

    def error(left_out: object) -> float:
        return sum(value for name, value in alone.items() if name not in list(left_out))  # type: ignore[call-overload]

    for most, expected in ((1.0, ()), (0.5, ("b",)), (0.05, ("b", "d")), (0.03, ("b", "d", "c"))):
        found = choose(list(alone), error, alone.__getitem__, most)
        assert found.left_out == expected and found.error <= most and found.all_error == pytest.approx(0.84)


@pytest.mark.parametrize(("precision", "dtype"), [("int8", np.int8), ("fp8", ml_dtypes.float8_e4m3fn)])
def test_it_computes_what_the_formats_say(tmp_path: Path, precision: str, dtype: type) -> None:
    """The same product by hand in numpy: the input rounded with one scale, the weight with one for each channel."""
    graph = tmp_path / "one.onnx"
    torch.manual_seed(2)
    module = nn.Linear(64, 32, bias=False)
    graph.write_bytes(export_graph(module, Signature("one", {"x": torch.zeros(2, 7, 64)}, ("y",)), {}))
    model, x = ir.load(graph), batch(3)
    (node,) = layers(model.graph).values()
    seen = observe(model, [f"{node.inputs[0].name}"], [{"x": x}], tmp_path / "work.onnx")  # type: ignore[union-attr]
    ir.save(quantised(model, seen, precision), tmp_path / "short.onnx")
    weight = module.weight.detach().numpy().T
    if precision == "int8":
        scale = np.float32((x.max() - x.min()) / 255)
        zero = np.round(-x.min() / scale)
        ours = (np.clip(np.rint(x / scale) + zero, 0, 255) - zero) * scale
        steps = np.abs(weight).max(axis=0) / np.float32(127)
        theirs = np.clip(np.rint(weight / steps), -127, 127) * steps
    else:
        scale = np.abs(x).max() / np.float32(448)
        scale = scale.astype(ml_dtypes.bfloat16).astype(np.float32)
        ours = np.clip(x / scale, -448, 448).astype(dtype).astype(np.float32) * scale
        steps = (np.abs(weight).max(axis=0) / np.float32(448)).astype(ml_dtypes.bfloat16).astype(np.float32)
        theirs = np.clip(weight / steps, -448, 448).astype(dtype).astype(np.float32) * steps
    np.testing.assert_allclose(run(tmp_path / "short.onnx", x), ours @ theirs, atol=2e-4)
    error = np.linalg.norm(ours @ theirs - x @ weight) / np.linalg.norm(x @ weight)
    assert 1e-3 < error < (0.02 if precision == "int8" else 0.06)

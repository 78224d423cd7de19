"""Finished stages are found again by what they were made from, and only whole."""

from __future__ import annotations

from pathlib import Path

import pytest

from export import run as command
from export import store as storing
from export.store import Store, key_of, link_graph
from student.runtimes.manifest import read_manifest
from tests.student.families import tiny


def write(text: bytes) -> object:
    return lambda path: path.write_bytes(text)


def test_a_finished_stage_is_not_made_again(tmp_path: Path) -> None:
    first = Store(tmp_path).get("k", write(b"graph"))  # type: ignore[arg-type]
    assert (first.reused, first.path.read_bytes()) == (False, b"graph")
    again = Store(tmp_path).get("k", write(b"other"))  # type: ignore[arg-type]
    assert (again.reused, again.path.read_bytes()) == (True, b"graph")
    assert Store(tmp_path).find("l") is None
    assert Store(tmp_path, fresh=True).find("k") is None


def test_one_that_is_damaged_or_half_written_is_made_again(tmp_path: Path) -> None:
    stored = Store(tmp_path).get("k", write(b"graph"))  # type: ignore[arg-type]
    stored.path.write_bytes(b"damaged")
    assert Store(tmp_path).find("k") is None
    assert not Store(tmp_path).get("k", write(b"graph")).reused  # type: ignore[arg-type]

    def killed(path: Path) -> None:
        path.write_bytes(b"ha")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Store(tmp_path).get("half", killed)
    assert Store(tmp_path).find("half") is None


def test_weights_beside_a_graph_go_with_it(tmp_path: Path) -> None:
    def write_both(path: Path) -> None:
        path.write_bytes(b"graph")
        path.with_name(f"{path.name}.data").write_bytes(b"weights")

    stored = Store(tmp_path).get("k", write_both)
    (tmp_path / "runtime").mkdir()
    link_graph(stored.path, tmp_path / "runtime" / "step.onnx")
    assert {path.name: path.read_bytes() for path in (tmp_path / "runtime").iterdir()} == {
        "step.onnx": b"graph",
        "k.onnx.data": b"weights",
    }
    stored.path.with_name("k.onnx.data").write_bytes(b"damaged")
    assert Store(tmp_path).find("k") is None


def test_a_key_is_all_that_a_graph_is_made_from(monkeypatch: pytest.MonkeyPatch) -> None:
    key = key_of({"student": "a", "graph": "step"})
    assert key == key_of({"graph": "step", "student": "a"})
    assert key != key_of({"student": "b", "graph": "step"}) != key_of({"student": "b", "graph": "text"})
    monkeypatch.setattr(storing, "versions", lambda: {"torch": "other"})
    assert key != key_of({"student": "a", "graph": "step"})


def test_only_a_float32_graph_can_be_found_again(tmp_path: Path) -> None:
    """In fp16 the step is another graph than the one that its key names; the other stages stay as they are."""
    bundle = tmp_path / "tiny"
    tiny.build(bundle, tiny.flux())
    command.run(student=bundle, to="onnx", precision="fp16")
    stages = read_manifest(bundle / "runtimes" / "onnx-staged-fp16").stages
    assert {name: Store(bundle).find(graph.key) is not None for name, graph in stages.items()} == {
        "text": True, "step": False, "decoder": True,
    }  # fmt: skip

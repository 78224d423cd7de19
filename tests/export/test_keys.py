"""What a graph and a runtime are found again by: all that they are made from, and nothing else."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest

from export import calibrate, engine, fused, graph, keys, narrow, qdq, quantise, staged, store, switched, targets
from export.keys import cache_key, stage_keys
from export.request import EngineOptions, Request
from export.select import find_target
from export.store import CONVERTED, TRACED, Store, key_of, link
from export.to_tensorrt import TensorRT
from student.bundle import Student
from student.runtimes.manifest import Graph, RuntimeManifest, write_manifest
from tests import tiny

STUDENT = tiny.student({})


@pytest.fixture
def request_(tmp_path: Path) -> Request:
    (tmp_path / "model_index.json").write_text("{}")
    return Request(tmp_path, STUDENT, "staged", "fp32")


CHANGES: list[Callable[[Student], Student]] = [
    lambda one: replace(one, id="other"),
    lambda one: replace(one, version="2"),
    lambda one: replace(one, max_tokens=one.max_tokens + 1),
    lambda one: replace(one, files={"vae/config.json": "0"}),
]


@pytest.mark.parametrize("form", ["staged", "fused"])
def test_each_graph_has_a_key_of_its_own_that_follows_the_student_named_in_it(request_: Request, form: str) -> None:
    request = replace(request_, form=form, sizes=((32, 96),) if form == "staged" else ())
    before = stage_keys(request)
    names = ["text", "step", "decoder", "step-96x32", "decoder-96x32"] if form == "staged" else ["4-steps", "2-steps"]
    assert list(before) == names and len(set(before.values())) == len(names)
    for change in CHANGES:
        after = stage_keys(replace(request, student=change(STUDENT)))
        assert not set(after.values()) & set(before.values())
    assert stage_keys(replace(request, precision="int8", threads=9, force=True)) == before, "of the float32 form"


@pytest.mark.parametrize(("precision", "follows"), [("int8", True), ("fp8", True), ("fp16", False), ("fp32", False)])
def test_prompts_are_part_of_a_runtimes_key_where_its_scales_follow_from_them(
    request_: Request, precision: str, follows: bool
) -> None:
    target, request = find_target("onnx"), replace(request_, precision=precision)
    others = [replace(request, prompts=prompts) for prompts in (("a", "b"), ("b", "a"))]
    assert len({cache_key(each, target, {}) for each in (request, *others)}) == (3 if follows else 1)


def test_two_experts_have_a_key_each(request_: Request) -> None:
    (request_.bundle / "model_index.json").write_text('{"boundary_ratio": 0.875}')
    assert list(stage_keys(request_)) == ["text", "step", "step_2", "decoder"]


def test_a_runtime_has_another_key_with_each_thing_that_it_is_made_with(
    request_: Request, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, target = stage_keys(request_), find_target("onnx")
    key = cache_key(request_, target, made)
    others = {
        cache_key(replace(request_, form="fused"), target, made),
        cache_key(replace(request_, precision="fp16"), target, made),
        cache_key(request_, find_target("openvino"), made),
        cache_key(request_, target, {**made, "text": "0"}),
        cache_key(request_, target, {name: value for name, value in made.items() if name != "text"}),
    }
    engine_: dict[str, Any] = {
        "batches": (1,), "workspace_bytes": 1, "level": 5, "portable": True, "batch_invariant": True,
    }  # fmt: skip
    assert {*engine_, "memory_bytes"} == {one.name for one in fields(EngineOptions)}
    for name, value in engine_.items():
        others.add(cache_key(replace(request_, engine=replace(EngineOptions(), **{name: value})), target, made))
    assert cache_key(replace(request_, engine=EngineOptions(memory_bytes=1)), target, made) == key
    monkeypatch.setattr(keys, "OPSET", 99)
    others.add(cache_key(request_, target, made))
    assert key not in others and len(others) == 11


def test_a_key_follows_the_code_that_makes_a_graph(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each file that takes part, and for a graph before its conversion those alone."""
    made: list[tuple[Any, tuple[str, ...]]] = [
        (fused.fused_part, TRACED), (staged.staged_parts, TRACED), (graph.trace, TRACED),
        (narrow.narrow, CONVERTED), (calibrate.observe, CONVERTED), (qdq.quantised, CONVERTED),
        (switched.switched, CONVERTED), (quantise.choose, CONVERTED), (targets.narrowed, CONVERTED),
        (TensorRT.convert, CONVERTED), (engine.build, CONVERTED),
    ]  # fmt: skip
    for code in (TRACED, CONVERTED):
        assert {Path(inspect.getfile(one)).name for one, of in made if of is code} == set(code)
    sha256 = store.sha256
    request = Request(tmp_path, STUDENT, "fused", "fp32")
    whole = cache_key(request, find_target("onnx"), {})
    for code in (TRACED, CONVERTED):
        before = key_of({}, code)
        for name in (*TRACED, *CONVERTED):
            monkeypatch.setattr(store, "sha256", lambda path, name=name: "0" if path.name == name else sha256(path))
            assert (key_of({}, code) != before) is (name in code)
            assert (cache_key(request, find_target("onnx"), {}) != whole) is (name in CONVERTED)
            monkeypatch.setattr(store, "sha256", sha256)


def finished(bundle: Path, name: str, **rows: Graph) -> Path:
    folder = bundle / "runtimes" / name
    folder.mkdir(parents=True)
    for row in rows.values():
        (folder / row.file).write_bytes(row.file.encode())
    write_manifest(folder, RuntimeManifest(name, "staged", "fp32", "x", "0", {}, {}, 20, {}, stages=rows))
    return folder


def test_a_finished_runtimes_graph_is_found_by_its_key_if_it_is_whole(tmp_path: Path) -> None:
    """An unfinished folder, a broken manifest and a graph without a key are passed over."""
    from hashlib import sha256

    row = Graph("step.onnx", sha256(b"step.onnx").hexdigest(), (), {}, {}, key="k")
    folder = finished(
        tmp_path,
        "onnx-staged-fp32",
        step=row,
        text=replace(row, file="text.onnx", sha256=sha256(b"text.onnx").hexdigest(), key=""),
    )
    finished(tmp_path, ".onnx-staged-fp16.part", step=replace(row, key="unfinished"))
    (tmp_path / "runtimes" / "broken").mkdir()
    found = Store(tmp_path)
    assert found.find("k") == folder / "step.onnx" and found.find("") is None is found.find("unfinished")
    assert Store(tmp_path, fresh=True).find("k") is None, "asked to make everything again"
    (folder / "step.onnx").write_bytes(b"other")
    assert Store(tmp_path).find("k") is None
    (folder / "step.onnx").unlink()
    assert Store(tmp_path).find("k") is None


def test_fresh_forgets_what_an_interrupted_export_left(tmp_path: Path) -> None:
    Store(tmp_path).get("k", lambda path: path.write_bytes(b"old"))  # type: ignore[arg-type, return-value]
    made = Store(tmp_path, fresh=True).get("k", lambda path: path.write_bytes(b"new"))  # type: ignore[arg-type, return-value]
    assert made.path.read_bytes() == b"new" and not made.reused
    assert Store(tmp_path).find("k") is not None, "kept for the run that goes on from here"


def test_a_link_is_a_copy_where_there_are_no_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a").write_bytes(b"graph")
    link(tmp_path / "a", tmp_path / "b")
    assert (tmp_path / "b").stat().st_ino == (tmp_path / "a").stat().st_ino

    def none(*given: Any) -> None:
        raise OSError("no hard links here")

    monkeypatch.setattr(store.os, "link", none)
    link(tmp_path / "a", tmp_path / "c")
    assert (tmp_path / "c").read_bytes() == b"graph" and (tmp_path / "c").stat().st_nlink == 1

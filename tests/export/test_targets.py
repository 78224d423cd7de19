"""What can be compiled to what, and how a LoRA is named: tables, without a network."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from export import compile as compiling
from export import to_tensorrt
from export.errors import ExportError
from export.lora import Lora
from export.request import EngineOptions
from export.select import find_target
from export.targets import AROUND, check_request, reasons
from rewards.serving import open_reward
from student.runtimes.machine import Gpu

NAMES = ("onnx", "openvino", "tensorrt", "tensorrt_rtx")
FAMILIES = ("flux", "flux2", "qwen_image", "sd3", "wan", "z_image")
BOTH, STAGED = ("staged", "fused"), ("staged",)
PRECISIONS = {
    "onnx": {"fp32": BOTH, "fp16": STAGED, "bf16": STAGED, "int8": STAGED, "fp8": STAGED},
    "openvino": {"bf16": BOTH, "fp32": BOTH},
    "tensorrt": {"bf16": STAGED, "fp16": STAGED, "fp32": STAGED, "fp8": STAGED},
    "tensorrt_rtx": {"bf16": STAGED, "fp16": STAGED, "fp32": STAGED, "fp8": STAGED},
}


def test_a_target_is_found_by_its_name() -> None:
    assert [find_target(name).name for name in NAMES] == list(NAMES)
    with pytest.raises(ExportError, match="cannot compile to 'coreml': accepted are onnx, openvino, tensorrt, tens"):
        find_target("coreml")


@pytest.mark.parametrize("name", NAMES)
def test_each_target_has_its_precisions_and_forms_and_the_first_is_the_default(name: str) -> None:
    found = find_target(name).precisions
    assert {precision: tuple(forms) for precision, forms in found.items()} == PRECISIONS[name]
    assert list(found) == list(PRECISIONS[name])


@pytest.mark.parametrize("name", NAMES)
def test_exactly_what_a_target_has_is_accepted(name: str) -> None:
    accepted = set()
    for precision in ("fp32", "fp16", "bf16", "int8", "fp8", "nf4"):
        for form in ("staged", "fused", "whole"):
            for family in (*FAMILIES, "sdxl"):
                try:
                    check_request(find_target(name), form, precision, family)
                    accepted.add((precision, form, family))
                except ExportError as error:
                    assert "accepted" in str(error)
    assert accepted == {
        (precision, form, family)
        for precision, forms in PRECISIONS[name].items()
        for form in forms
        for family in (FAMILIES if form == "staged" else ("flux",))
    }


def test_folders_say_what_is_in_them() -> None:
    request: Any = SimpleNamespace(form="staged", precision="int8")
    assert [find_target(name).folder(request) for name in NAMES[:2]] == ["onnx-staged-int8", "openvino-staged-int8"]


def test_what_is_not_quantised_says_why_and_is_of_the_type_around() -> None:
    assert AROUND == {"fp8": "bf16"} and reasons("fp32") == {}
    assert set(reasons("fp8")) > set(reasons("bf16")) and set(reasons("bf16"))
    assert all(why for precision in ("fp16", "bf16", "int8", "fp8") for why in reasons(precision).values())


@pytest.mark.parametrize(
    ("text", "source", "weight"),
    [
        ("a/b", "a/b", 1.0), ("a/b:0.5", "a/b", 0.5), ("a/b:-1", "a/b", -1.0),
        ("a/b/c.safetensors:2e-1", "a/b/c.safetensors", 0.2),
        ("C:x", "C:x", 1.0), ("a:b:0.5", "a:b", 0.5),
    ],
)  # fmt: skip
def test_a_lora_is_a_source_and_its_weight(text: str, source: str, weight: float) -> None:
    assert Lora.parse(text) == Lora(source, weight)


@pytest.mark.parametrize("text", ["", ":0.5", "a/b:0", "a/b:0.0", "a/b:inf", "a/b:nan", "a/b:-inf"])
def test_a_weight_is_a_number_other_than_0(text: str) -> None:
    with pytest.raises(ExportError, match=r"accepted is PATH_OR_ID\[:WEIGHT\] with a weight other than 0"):
        Lora.parse(text)


def test_a_lora_is_a_file_a_folder_or_an_id_of_the_hub(tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"
    file.write_bytes(b"")
    assert Lora(str(file)).where() == (str(tmp_path), {"weight_name": "x.safetensors", "local_files_only": True})
    assert Lora(str(tmp_path)).where() == (str(tmp_path), {"local_files_only": True})
    assert Lora("a/b").where() == ("a/b", {}) and Lora("a/b/c/d.safetensors").where() == (
        "a/b", {"weight_name": "c/d.safetensors"},
    )  # fmt: skip
    for missing in (str(tmp_path / "none"), "none.safetensors", "a/none.safetensors"):
        with pytest.raises(ExportError, match="does not exist: accepted are a file, a folder and a hub id"):
            Lora(missing).where()
    assert (Lora(str(file)).name, Lora("a/b").name) == ("x.safetensors", "a/b"), "no path of this machine"


@pytest.mark.parametrize("name", ["onnx", "openvino"])
def test_a_proof_computes_with_as_many_threads_as_are_asked_for(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    monkeypatch.setattr("student.runtimes.session.open_session", lambda *given: asked.append(given))
    monkeypatch.setattr("student.runtimes.openvino.open_openvino", lambda *given: asked.append(given))
    request: Any = SimpleNamespace(threads=3, precision="bf16")
    opener = find_target(name).opener(request)
    assert opener is not None
    opener(Path("step.onnx"))
    assert asked == [(Path("step.onnx"), 3, *(["bf16"] if name == "openvino" else []))]


@pytest.mark.parametrize("form", ["staged", "fused"])
def test_a_proof_opens_the_stages_that_stay_in_torch_and_the_scorers_with_these_threads(
    form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []
    for what in ("torch_stages", "StagedGraphs", "FusedGraphs"):
        monkeypatch.setattr(compiling, what, lambda *given, what=what: (asked.append((what, *given)), what)[1])
    scorers = SimpleNamespace(score="scores")
    monkeypatch.setattr(compiling, "Scorers", lambda *given: (asked.append(("Scorers", *given)), scorers)[1])
    one: Any = compiling._Compilation.__new__(compiling._Compilation)
    bundle, student, other = Path("bundle"), SimpleNamespace(scorers={"a": 1}), SimpleNamespace()
    one._request = SimpleNamespace(bundle=bundle, threads=3, form=form)
    one._student, one._target, one._in_torch = student, find_target("onnx"), {"decoder": "no form"}
    one._model = lambda: SimpleNamespace(boundary=0.5)
    assert one._score() == "scores" and asked.pop() == ("Scorers", bundle, student, 3, open_reward)
    if form == "staged":
        assert one._open({"step": Path("s")}, "opener", other) == "StagedGraphs"
        assert asked == [
            ("torch_stages", bundle, other, {"decoder": "no form"}, 3),
            ("StagedGraphs", bundle, other, {"step": Path("s")}, "opener", "torch_stages", 0.5),
        ]
    else:
        assert one._open({"4-steps": Path("s")}, "opener", other) == "FusedGraphs"
        assert asked == [("FusedGraphs", bundle, other, {4: Path("s")}, "opener")]
    student.scorers = {}
    assert one._score() is None


def test_an_engines_timings_outlive_its_folder_and_are_of_one_gpu_and_library(monkeypatch: pytest.MonkeyPatch) -> None:
    request: Any = SimpleNamespace(engine=EngineOptions(portable=True, level=5), precision="bf16")
    onnx, plan = Path("runtimes/.unproven/.step.onnx"), Path("runtimes/.unproven/step.engine")
    for gpu, expected in ((Gpu("NVIDIA L40S", "8.9", 1, "13.0"), "runtimes/.tensorrt-l40s.timing"), (None, "")):
        monkeypatch.setattr(to_tensorrt, "find_gpu", lambda gpu=gpu: (gpu, ""))
        found = find_target("tensorrt")._order(request, "step", onnx, plan, {"x": ("batch", 4)})  # type: ignore[attr-defined]
        assert found.timing_cache == expected
        assert (found.library, found.onnx, found.plan, found.inputs) == (
            "tensorrt", str(onnx), str(plan), {"x": ("batch", 4)},
        )  # fmt: skip
        assert (found.portable, found.batch_invariant, found.level) == (True, False, 5)
        assert (found.workspace_bytes, found.profiles) == (4 * 2**30, ((1, 1, 1), (2, 2, 2), (3, 4, 4), (5, 8, 8)))
        assert (find_target("tensorrt").opener(request) is None) == (gpu is None)

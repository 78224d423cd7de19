"""What can be compiled to what, and how a LoRA is named: tables, without a network."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from export.errors import ExportError
from export.lora import Lora
from export.select import find_target
from export.targets import AROUND, check_request, reasons

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

"""Which runtime a name stands for, and what is said when there is none."""

import json
import logging
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from student.bundle import BundleError
from student.runtimes import load as loading
from student.runtimes.load import load
from student.runtimes.manifest import read_manifest, write_manifest
from tests.service.support import REPOSITORY


def test_auto_prefers_onnx(compiled: Path) -> None:
    assert load(compiled).name == load(compiled, "onnx").name == "onnx-fused-fp32"


def test_auto_says_why_it_fell_back(bundle: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "student.runtimes.load"):
        assert load(bundle).name == "torch"
    assert "serves through torch, because onnx:" in caplog.text and "has no runtime onnx-fused-fp32" in caplog.text


def test_torch_by_name(compiled: Path) -> None:
    runtime = load(compiled, "torch")
    assert runtime.name == "torch"
    assert runtime.score(np.zeros((1, 3, 64, 64), np.float32), ["a"]).keys() == {"trained", "heldout"}


def test_the_fake_needs_no_bundle(tmp_path: Path) -> None:
    assert load(tmp_path / "nowhere", "fake").name == "fake"


def test_an_unknown_name_and_an_absent_bundle(tmp_path: Path) -> None:
    with pytest.raises(
        BundleError, match="runtime is 'tpu': accepted are auto, onnx, openvino, tensorrt, tensorrt_rtx, torch, fake"
    ):
        load(tmp_path, "tpu")
    with pytest.raises(BundleError, match=r"is not a student: it has no student\.json"):
        load(tmp_path)


def test_no_runtime_at_all(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = loading.importlib.util.find_spec
    monkeypatch.setattr(loading.importlib.util, "find_spec", lambda name: None if name == "torch" else found(name))
    with pytest.raises(
        BundleError, match="no runtime can serve .*: onnx: .*has no runtime.*; torch: torch is not inst"
    ):
        load(bundle)


def test_torch_refuses_changed_weights(bundle: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(bundle, tmp_path / "copy"))
    with (copy / "transformer" / "diffusion_pytorch_model.safetensors").open("ab") as file:
        file.write(b" ")
    with pytest.raises(BundleError, match="diffusion_pytorch_model.safetensors has changed"):
        load(copy, "torch")


def test_a_manifest_is_read_as_it_was_written_also_by_earlier_releases(tmp_path: Path) -> None:
    shipped = read_manifest(REPOSITORY / "models" / "shapes" / "runtimes" / "onnx-staged-fp32")
    manifest = replace(shipped, kept_float32={"Softmax": "its sums are long"})
    write_manifest(tmp_path, manifest)
    assert read_manifest(tmp_path) == manifest
    assert json.loads((tmp_path / "manifest.json").read_text("utf-8"))["wide"] == manifest.kept_float32

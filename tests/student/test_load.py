"""Which runtime a name stands for, and what is said when there is none."""

import json
import logging
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from student.bundle import BundleError, Student, read_student
from student.runtimes import load as loading
from student.runtimes.load import load
from student.runtimes.manifest import read_manifest, write_manifest
from student.runtimes.options import Options
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


class Loaded:
    """A runtime that nothing was opened for."""

    def __init__(self, name: str) -> None:
        self.name = name


@pytest.fixture
def asked(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What each kind of runtime is opened with; a kind whose name is in ``refused`` cannot be."""
    found: list[Any] = []

    def other(kind: str) -> Any:
        def opened(bundle: Path, student: Student, threads: int, name: str | None) -> Any:
            found.append((kind, threads, name))
            return Loaded(kind)

        return opened

    def with_options(kind: str) -> Any:
        def opened(bundle: Path, student: Student, threads: int, *rest: Any) -> Any:
            found.append((kind, threads, *rest))
            return Loaded(kind)

        return opened

    for kind in ("openvino", "tensorrt", "tensorrt_rtx"):
        monkeypatch.setitem(loading.LOADERS, kind, other(kind))
    for kind in ("onnx", "torch"):
        monkeypatch.setattr(loading, f"_{kind}", with_options(kind))
    return found


@pytest.mark.parametrize("crowded", [0, 2])
def test_threads_and_folders_are_passed_on(bundle: Path, asked: list[Any], crowded: int) -> None:
    """Only ONNX Runtime changes the number of its threads; the others take their share for good."""
    options = Options(crowded_threads=crowded)
    for name in (
        "onnx",
        "onnx-staged-int8",
        "openvino",
        "openvino-fused-bf16",
        "tensorrt-x",
        "tensorrt_rtx-y",
        "torch",
    ):
        load(bundle, name, 8, options)
    share = crowded or 8
    assert asked == [
        ("onnx", 8, None, options), ("onnx", 8, "onnx-staged-int8", options), ("openvino", share, None),
        ("openvino", share, "openvino-fused-bf16"), ("tensorrt", share, "tensorrt-x"),
        ("tensorrt_rtx", share, "tensorrt_rtx-y"), ("torch", share, options),
    ]  # fmt: skip


def test_auto_takes_the_best_kind_that_the_bundle_has(bundle: Path, tmp_path: Path, asked: list[Any]) -> None:
    copy = Path(shutil.copytree(bundle, tmp_path / "copy"))
    for folder, kind in (
        (None, "onnx"),
        ("openvino-fused-fp32", "openvino"),
        ("tensorrt_rtx-a", "tensorrt_rtx"),
        ("tensorrt-a", "tensorrt"),
    ):
        if folder is not None:
            (copy / "runtimes" / folder).mkdir(parents=True)
        assert load(copy).name == kind
    (copy / "runtimes" / "tensorrt-a").rmdir()
    (copy / "runtimes" / "tensorrt-a").touch()  # a file is no runtime
    assert load(copy).name == "tensorrt_rtx"


def test_the_first_of_a_list_that_works_serves_and_one_name_alone_is_raised(
    bundle: Path, asked: list[Any], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*given: Any) -> Any:
        raise BundleError("it is broken")

    monkeypatch.setitem(loading.LOADERS, "openvino", broken)
    with caplog.at_level(logging.WARNING, "student.runtimes.load"):
        assert load(bundle, "tensorrt,openvino").name == "tensorrt" and not caplog.records
        assert load(bundle, "openvino,torch,onnx").name == "torch"
    assert caplog.messages == [f"{bundle} serves through torch, because openvino: it is broken"]
    with pytest.raises(BundleError, match="^it is broken$"):
        load(bundle, "openvino")
    with pytest.raises(BundleError, match="runtime is 'tpu-x': accepted are"):
        load(bundle, "onnx,tpu-x")


def test_rewards_by_name_are_opened_in_whatever_serves(
    bundle: Path, asked: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[Any] = []

    class Scored(Loaded):
        scorers = SimpleNamespace(open_named=opened.append)

    monkeypatch.setitem(loading.LOADERS, "openvino", lambda *given: Scored("openvino"))
    options = Options(open_reward=lambda name: None)  # type: ignore[arg-type, return-value]
    load(bundle, "openvino", 1, options)
    load(bundle, "openvino,torch", 1, options)
    load(bundle, "openvino")
    assert opened == [options.open_reward] * 2


def test_the_fake_of_videos_makes_videos(tmp_path: Path) -> None:
    assert (
        load(tmp_path, "fake-video").student.image.frames == 9 and load(tmp_path, "fake").student.image.frames is None
    )


def test_the_torch_runtime_serves_known_families_whose_files_are_whole(bundle: Path) -> None:
    student = replace(read_student(bundle), family="unknown")
    with pytest.raises(BundleError, match="^family is 'unknown': the torch runtime serves flux, "):
        loading._torch(bundle, student, 1)


@pytest.mark.parametrize(
    ("kind", "needs"),
    [
        ("onnx", ["onnxruntime"]), ("openvino", ["openvino"]), ("tensorrt", ["tensorrt", "torch"]),
        ("tensorrt_rtx", ["tensorrt_rtx", "torch"]), ("torch", ["torch", "diffusers", "transformers"]),
    ],
)  # fmt: skip
def test_a_library_that_is_not_installed_is_named(
    bundle: Path, kind: str, needs: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for missing in needs:
        there = set(needs) - {missing}
        monkeypatch.setattr(loading.importlib.util, "find_spec", lambda name, there=there: name in there or None)
        with pytest.raises(BundleError, match=f"^{missing} is not installed$"):
            load(bundle, kind)

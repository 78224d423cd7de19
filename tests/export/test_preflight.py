"""What is known before anything is computed, and why a target is refused here."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import typer
from safetensors import safe_open

from export import preflight, to_tensorrt
from export import run as command
from export.preflight import check_disk, estimates, memory_bytes
from export.request import EngineOptions, Request
from export.to_tensorrt import TensorRT
from student.bundle import read_student
from student.runtimes.machine import Gpu

H100 = Gpu("NVIDIA H100 80GB HBM3", "9.0", 80 * 2**30, "13.0")


def test_numbers_are_those_of_the_weights_and_disk_follows_the_precision(bundle: Path) -> None:
    counted: dict[str, int] = {}
    for path in bundle.glob("*/*.safetensors"):
        with safe_open(path, "pt") as file:
            counted[path.parent.name] = sum(file.get_tensor(name).numel() for name in file.keys())
    student = read_student(bundle)
    wide, short = (estimates(bundle, student, "staged", precision) for precision in ("fp32", "int8"))
    found = {row.stage: row.parameters for row in wide}
    assert found == {
        "text": counted["text_encoder"] + counted["text_encoder_2"],
        "step": counted["transformer"],
        "decoder": counted["vae"],
    }
    assert {row.stage: row.disk_bytes // row.parameters for row in wide} == {"text": 2, "step": 2, "decoder": 2}
    assert {row.stage: row.disk_bytes // row.parameters for row in short}["step"] == 1
    assert [row.stage for row in estimates(bundle, student, "fused", "fp32")] == ["4-steps", "2-steps"]
    assert memory_bytes(wide) == 12 * max(found.values())


def test_disk_is_asked_for_twice(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [preflight.Estimate("step", 10**9, 2 * 10**9)]
    usage = preflight.shutil.disk_usage(bundle)
    for free, enough in ((4 * 10**9, True), (4 * 10**9 - 1, False)):
        monkeypatch.setattr(preflight.shutil, "disk_usage", lambda path, free=free: usage._replace(free=free))
        if enough:
            check_disk(bundle, rows)
        else:
            with pytest.raises(preflight.ExportError, match="needs 4.00 GB of disk space for this, and 4.00 GB are"):
                check_disk(bundle, rows)


def test_tensorrt_is_refused_with_the_reason(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: object() if name == "tensorrt" else found(name, *rest)
    )
    monkeypatch.setattr(to_tensorrt, "find_gpu", lambda: (None, "the NVIDIA driver reports no GPU"))
    with pytest.raises(typer.Exit):
        command.run(student=bundle, to="tensorrt")
    said = capsys.readouterr().err
    assert said == "export: tensorrt builds for the machine's GPU, and the NVIDIA driver reports no GPU\n"
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None)
    with pytest.raises(typer.Exit):
        command.run(student=bundle, to="tensorrt_rtx")
    assert capsys.readouterr().err == "export: tensorrt_rtx is not installed: pip install fewstep[tensorrt-rtx]\n"


def test_an_engine_is_named_and_keyed_by_all_that_it_depends_on(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from export.keys import cache_key, stage_keys

    request = Request(bundle, read_student(bundle), "staged", "bf16")
    target = TensorRT("tensorrt")
    here: dict[str, Any] = {"gpu": (H100, ""), "version": "11.4.0"}
    monkeypatch.setattr(to_tensorrt, "find_gpu", lambda: here["gpu"])
    monkeypatch.setattr(to_tensorrt, "facts", lambda: {"gpu": here["gpu"][0].name, "compute_capability": "9.0"})
    monkeypatch.setattr(to_tensorrt, "library_version", lambda _: here["version"])
    assert target.folder(request) == "tensorrt-staged-bf16-h100-80gb-hbm3-11.4.0"
    keys = stage_keys(request)
    key = cache_key(request, target, keys)
    assert key == cache_key(replace(request, threads=7, force=True), target, keys)
    assert key == cache_key(replace(request, engine=EngineOptions(memory_bytes=1)), target, keys)
    others = [
        cache_key(replace(request, precision="fp16"), target, keys),
        cache_key(replace(request, engine=EngineOptions(batches=(1, 4))), target, keys),
        cache_key(replace(request, engine=EngineOptions(batch_invariant=True)), target, keys),
        cache_key(replace(request, engine=EngineOptions(portable=True)), target, keys),
        cache_key(request, TensorRT("tensorrt_rtx"), keys),
        cache_key(request, target, {**keys, "step": "0"}),
    ]
    here["version"] = "11.5.0"
    others.append(cache_key(request, target, keys))
    here["version"], here["gpu"] = "11.4.0", (replace(H100, name="NVIDIA L40S"), "")
    others.append(cache_key(request, target, keys))
    assert len({key, *others}) == 9
    assert "gpu" not in target.requires(replace(request, engine=EngineOptions(portable=True)))

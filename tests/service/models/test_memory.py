"""The estimate of what a student takes in memory, against what is known."""

from __future__ import annotations

from pathlib import Path

import pytest

from service.models import memory
from student.bundle import BundleError
from student.runtimes import machine
from tests.service.students import make_student

MB = 2**20


@pytest.fixture
def thousand_mb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine with 1000 MB left."""
    (tmp_path / "meminfo").write_text("MemTotal: 9999999 kB\nMemAvailable: 1024000 kB\n")
    monkeypatch.setattr(machine, "MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(machine, "CGROUP", tmp_path)
    return tmp_path


def test_what_is_free_is_the_machines_or_the_containers_if_that_is_less(thousand_mb: Path) -> None:
    assert machine.free_bytes() == 1000 * MB
    (thousand_mb / "memory.max").write_text("max\n")
    (thousand_mb / "memory.current").write_text(f"{100 * MB}\n")
    assert machine.free_bytes() == 1000 * MB
    (thousand_mb / "memory.max").write_text(f"{300 * MB}\n")
    assert machine.free_bytes() == 200 * MB


def test_the_files_that_the_runtime_reads_count(tmp_path: Path) -> None:
    student = make_student(tmp_path, "a", "1", 3 * MB)
    bundle = tmp_path / "a" / "1"
    assert memory.needed_bytes(bundle, "torch") == memory.needed_bytes(bundle, "auto") == (64 + 2 * 2 * 3) * MB
    for folder, size in (("runtimes/onnx-fused-fp32", 5), ("runtimes/tensorrt_rtx-x", 50), ("scorers", 1)):
        (bundle / folder).mkdir(parents=True)
        (bundle / folder / "graph.onnx").write_bytes(bytes(size * MB))
    assert memory.needed_bytes(bundle, "onnx") == memory.needed_bytes(bundle, "auto") == (64 + 2 * (5 + 1)) * MB
    assert memory.needed_bytes(bundle, "tensorrt_rtx") == (64 + 2 * (50 + 1)) * MB
    assert memory.check_memory(bundle, student, "onnx", 0, 0) == 76 * MB
    (bundle / "runtimes" / "onnx-fused-fp32" / "profile.json").write_bytes(bytes(9 * MB))
    assert memory.needed_bytes(bundle, "onnx") == 76 * MB, "no weights"
    (bundle / "runtimes" / "onnx-fused-fp32" / "graph.onnx.data").write_bytes(bytes(1 * MB))
    assert memory.needed_bytes(bundle, "onnx") == 78 * MB


def test_what_does_not_fit_is_refused_with_the_figures(thousand_mb: Path, tmp_path: Path) -> None:
    student = make_student(tmp_path, "a", "1", 4 * MB)
    bundle = tmp_path / "a" / "1"
    assert memory.check_memory(bundle, student, "torch", 100 * MB, 20 * MB) == 80 * MB
    with pytest.raises(BundleError, match="80 MB of memory, but only 79 MB of the 100 MB of FEWSTEP_MODEL_MEMORY_MB"):
        memory.check_memory(bundle, student, "torch", 100 * MB, 21 * MB)
    (thousand_mb / "meminfo").write_text("MemAvailable: 10240 kB\n")
    with pytest.raises(BundleError, match="about 80 MB of memory, but only 10 MB are free"):
        memory.check_memory(bundle, student, "torch", 0, 0)


def test_of_several_runtimes_the_largest_counts_and_scorers_count_once(tmp_path: Path) -> None:
    """Which of them is loaded is not known before."""
    make_student(tmp_path, "a", "1", 3 * MB)
    bundle = tmp_path / "a" / "1"
    for folder, size in (
        ("runtimes/onnx-fused-fp32", 5), ("runtimes/onnx-fused-int8", 2), ("runtimes/openvino-fused-fp32", 7),
        ("runtimes/tensorrt-fused-fp16", 90), ("scorers", 1),
    ):  # fmt: skip
        (bundle / folder).mkdir(parents=True)
        (bundle / folder / "graph.onnx").write_bytes(bytes(size * MB))
    needed = {
        runtime: memory.needed_bytes(bundle, runtime) // MB
        for runtime in ("onnx", "auto", "openvino,onnx", "onnx,openvino", "torch")
    }
    assert needed == {
        "onnx": 76, "auto": 76, "openvino,onnx": 80, "onnx,openvino": 80, "torch": 64 + 2 * (2 * 3 + 1),
    }  # fmt: skip

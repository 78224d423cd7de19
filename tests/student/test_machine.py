"""What a machine is, and why a runtime that was compiled for another one is refused."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from student.bundle import BundleError
from student.runtimes import machine
from student.runtimes.machine import Gpu, check_machine, cpu_flags, facts, find_gpu, has_amx


def test_flags_are_read_as_linux_writes_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    info = tmp_path / "cpuinfo"
    info.write_text("processor\t: 0\nflags\t\t: fpu amx_bf16 amx_tile avx512f\nprocessor\t: 1\nflags\t\t: other\n")
    assert cpu_flags(info) == {"fpu", "amx_bf16", "amx_tile", "avx512f"}
    assert cpu_flags(tmp_path / "none") == frozenset()
    for flags, expected in (({"amx_bf16", "amx_tile"}, True), ({"avx512_bf16"}, False)):
        monkeypatch.setattr(machine, "cpu_flags", lambda flags=flags: frozenset(flags))
        assert has_amx() is expected


def test_a_gpu_or_a_reason() -> None:
    gpu, reason = find_gpu()
    assert (gpu is None) == bool(reason)
    assert {"os", "arch"} <= facts().keys()


def test_a_name_for_folders() -> None:
    assert Gpu("NVIDIA H100 80GB HBM3", "9.0", 1, "13.0").slug == "h100-80gb-hbm3"


def test_another_machine_is_refused_with_what_differs(tmp_path: Path) -> None:
    here = {"gpu": "NVIDIA L40S", "os": "Linux", "tensorrt": "11.4"}
    check_machine(tmp_path, {"os": "Linux"}, here)
    with pytest.raises(
        BundleError, match="was compiled for gpu NVIDIA H100, and this machine has NVIDIA L40S: make it again"
    ):
        check_machine(tmp_path, {"os": "Linux", "gpu": "NVIDIA H100"}, here)
    with pytest.raises(BundleError, match="was compiled for cuda 13.0, and this machine has none"):
        check_machine(tmp_path, {"cuda": "13.0"}, here)


def _driver(devices: int = 1, status: int = 0) -> SimpleNamespace:
    """CUDA's driver as its header describes it: attributes 75 and 76 are the compute capability, 12080 is 12.8."""

    def put(pointer: Any, value: Any) -> None:
        pointer._obj.value = value

    def name(buffer: Any, length: int, device: int) -> None:
        buffer.value = b"NVIDIA H200"[: length - 1]

    return SimpleNamespace(
        cuInit=lambda flags: status,
        cuDeviceGetCount=lambda count: put(count, devices),
        cuDriverGetVersion=lambda version: put(version, 12080),
        cuDeviceGetAttribute=lambda number, attribute, device: put(number, {75: 9, 76: 1}[attribute]),
        cuDeviceGetName=name,
        cuDeviceTotalMem_v2=lambda memory, device: put(memory, 150 * 2**30),
    )


def test_a_gpu_is_what_the_driver_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine.ctypes, "CDLL", lambda name: _driver())
    assert find_gpu() == (Gpu("NVIDIA H200", "9.1", 150 * 2**30, "12.8"), "")
    assert facts() == {**facts(), "gpu": "NVIDIA H200", "compute_capability": "9.1", "cuda": "12.8"}
    monkeypatch.setattr(machine.ctypes, "CDLL", lambda name: _driver(devices=0))
    assert find_gpu() == (None, "the NVIDIA driver reports no GPU")
    monkeypatch.setattr(machine.ctypes, "CDLL", lambda name: _driver(status=100))
    assert find_gpu() == (None, "the NVIDIA driver does not start (cuInit returns 100)")

    def missing(name: str) -> None:
        raise OSError(name)

    monkeypatch.setattr(machine.ctypes, "CDLL", missing)
    assert find_gpu() == (None, "no NVIDIA driver is installed (libcuda.so.1 is missing)")
    assert facts().keys() == {"os", "arch"}

"""The settings of the runtime reach it, however it is opened."""

from __future__ import annotations

from pathlib import Path

import pytest

from service.models import single
from service.settings import Settings
from student.bundle import Student, read_student
from student.runtimes import torch as torch_runtime
from student.runtimes.options import Options


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, Options(single._open_reward, "auto", "off", 0)),
        (
            {"FEWSTEP_OFFLOAD": "cpu", "FEWSTEP_TORCH_COMPILE": "graphs", "FEWSTEP_SCORE": "off"},
            Options(None, "cpu", "graphs", 0),
        ),
        (
            {"FEWSTEP_OFFLOAD": "encoders", "FEWSTEP_TORCH_COMPILE": "on", "FEWSTEP_SCORE": "after"},
            Options(single._open_reward, "encoders", "on", 0),
        ),
    ],
)
def test_offload_and_compile_of_the_environment_are_those_of_the_torch_runtime(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], expected: Options
) -> None:
    opened: list[tuple[Student, int, Options]] = []

    class Runtime(torch_runtime.TorchRuntime):
        def __init__(self, bundle: Path, student: Student, threads: int, options: Options) -> None:
            opened.append((student, threads, options))
            super().__init__(bundle, student, threads, Options())

    monkeypatch.setattr(torch_runtime, "TorchRuntime", Runtime)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    single.load_runtime(bundle, Settings(runtime="torch", threads=1))
    assert opened == [(read_student(bundle), 1, expected)]

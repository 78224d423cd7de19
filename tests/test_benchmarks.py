"""The scripts that measure: what they print where something is missing, and that what they say is measured."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest

from benchmarks import gpu_test, runtimes
from student.runtimes.machine import find_gpu


@pytest.mark.skipif(find_gpu()[0] is not None, reason="this machine has a GPU, on which the script would run")
def test_without_a_gpu_there_is_one_sentence_for_each_part(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_test.sys, "argv", ["gpu_test"])
    gpu_test.main()
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("nothing can be tested on a GPU: ")
    assert len(lines) == 1 + len(gpu_test.PARTS)
    for part, line in zip(gpu_test.PARTS, lines[1:], strict=True):
        assert line.startswith(f"{part.name}: ") and line.endswith("."), line


def test_a_part_that_takes_its_process_down_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_test, "_missing", lambda part: "")
    monkeypatch.setattr(gpu_test.sys, "executable", "/bin/false")
    assert gpu_test._run(0).why_not == "failed with status 1: it said nothing"


def test_contenders_take_turns_and_each_gets_its_own_median() -> None:
    calls: list[str] = []

    def contender(name: str, seconds: float) -> Callable[[int], runtimes.Run]:
        def at(batch: int) -> runtimes.Run:
            def run() -> None:
                calls.append(name)
                end = time.process_time() + seconds * batch
                while time.process_time() < end:
                    pass

            return run

        return at

    found = runtimes.measure({"slow": contender("slow", 0.02), "fast": contender("fast", 0.001)}, 2, 3)
    assert calls == ["slow", "fast"] * 4
    assert found["slow"] >= 0.04 and found["fast"] >= 0.002


def test_the_peak_is_that_of_a_matrix_product() -> None:
    assert 1e8 < runtimes.peak_flops(1) < 1e14

"""``make gpu-train-test`` without a GPU: it says what is missing, and a part does on a CPU what it will do on a GPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks import gpu_train
from benchmarks.gpu_train import STEPS, Bench, Failed, compare, resume
from tests.training.shapes import small

ROWS = [{"step": float(step), **{name: 1.0 + step for name in gpu_train.SAME}} for step in range(STEPS)]


def test_figures_of_two_runs_are_the_same_or_it_is_said_which_is_not() -> None:
    near = [{**row, "loss": row["loss"] * 1.01} for row in ROWS]
    assert compare(ROWS, near) == f"{STEPS} steps, figures within 9.9e-03"
    for value, said in ((1.1, "gap differs by 9.1%"), (float("nan"), "gap differs by nan%")):
        with pytest.raises(Failed, match=said):
            compare(ROWS, [*ROWS[:-1], {**ROWS[-1], "gap": ROWS[-1]["gap"] * value}])
    with pytest.raises(Failed, match=f"{STEPS} and {STEPS - 1} steps of {STEPS}"):
        compare(ROWS, ROWS[:-1])


def test_a_machine_without_a_gpu_names_what_is_missing_and_one_gpu_is_not_two(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu_train, "find_gpu", lambda: (None, "there is no NVIDIA driver"))
    with pytest.raises(SystemExit) as ended:
        gpu_train.main()
    assert ended.value.code == 0
    assert capsys.readouterr().out.count("there is no NVIDIA driver") == len(gpu_train.PARTS)
    monkeypatch.setattr(gpu_train, "find_gpu", lambda: (object(), ""))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (24e9, 24e9))
    assert [bool(gpu_train.missing(name)) for name in gpu_train.PARTS] == [False, True, True]


def test_a_part_that_fails_fails_all_and_the_others_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(bench: Bench) -> str:
        raise Failed("loss differs by 30.0%")

    monkeypatch.setattr(gpu_train, "missing", lambda name: "")
    monkeypatch.setattr(gpu_train, "PARTS", {"one": broken, "other": lambda bench: "6 steps"})
    with pytest.raises(SystemExit) as ended:
        gpu_train.main()
    said = capsys.readouterr().out
    assert ended.value.code == 1 and "failed: loss differs by 30.0%" in said and "6 steps" in said


def test_the_part_that_resumes_does_so_on_a_cpu(tmp_path: Path) -> None:
    small.write_models(tmp_path)
    scorers = {f"reward.{name}": tmp_path / "shapes-scorers" / name for name in ("trained", "heldout")}
    settings = {"model": tmp_path / "shapes-teacher", **scorers}
    bench = Bench(tmp_path, settings, {"ACCELERATE_USE_CPU": "1", "OMP_NUM_THREADS": "1"}, limit_s=300)
    said = resume(bench)
    assert said.endswith(f"{STEPS} steps, figures within 0.0e+00"), said

"""A reward that only reports: in the figures, and in nothing that a run decides."""

from __future__ import annotations

from pathlib import Path

import pytest

from student.bundle import read_student
from tests.training.rats.test_families import OWN, run, settings
from training.steplog import read_log


@pytest.fixture(autouse=True)
def own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("training.evaluate.CACHE", tmp_path / "cache")


def test_a_reward_that_only_reports_is_in_the_figures_and_nowhere_else(tmp_path: Path) -> None:
    outs = {}
    for name in ("", f"{OWN}:Counted"):
        outs[name] = tmp_path / f"out-{bool(name)}"
        more = settings(tmp_path, "flux", steps=2, lora_rank=2, **{"reward.reported": name})
        code, text = run("--out", str(outs[name]), *more)
        assert code == 0, text
    plain, out = outs.values()
    rows = [read_log(folder / "run" / "log.jsonl") for folder in (plain, out)]
    figures = ["loss", "grad_norm", "reward_student", "heldout_validation", "best_at"]
    assert [[row.get(name) for name in figures] for row in rows[0]] == [
        [row.get(name) for name in figures] for row in rows[1]
    ], "nothing is trained on it, and nothing chosen by it"
    student = read_student(out)
    teacher, *_, last = student.evaluation
    assert teacher["reported"].keys() == {"mean", "error"} and last["reported"]["mean"] != teacher["reported"]["mean"]
    assert set(student.scorers) == {"trained", "heldout"} and "reported" not in read_student(plain).evaluation[0]
    assert "| scorer that only reports |" in (out / "README.md").read_text()


@pytest.mark.parametrize("role", ["reward", "heldout"])
def test_a_reward_that_trains_or_chooses_does_not_report_as_well(role: str, tmp_path: Path) -> None:
    other = {"reward": "Redness", "heldout": "Brightness"}[role]
    more = settings(tmp_path, "flux", **{"reward.reported": f"{OWN}:{other}"})
    code, text = run("--out", str(tmp_path / "out"), *more)
    assert code == 2 and f"reward '{OWN}:{other}' is already the trained or the held-out reward" in text

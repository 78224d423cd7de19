"""A run that is stopped after any of its steps ends as if it had not been, by every method, with all that it keeps."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.training.rats.test_stopping import asked_to_stop
from tests.training.rats.test_wiring import START_W, figures, make, weight
from training.offload import OffloadedAdamW
from training.rats.trainer import Trainer
from training.rundir import RunStopped
from training.steplog import read_log

SCORES = {0: 0.0, 2: 0.9, 4: 0.5, 6: 0.1}  # held out: what is kept at the end is of the second step
KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "tau in deviations": {"gate.tau_in_std": True, "gate.tau": 0.1},
    "steered": {"shaping.steer": 0.9, "validation.min_diversity": 0.0},
    "offloaded": {"optim.state": "offload"},
    "several step counts": {"student.nfe": (2, 3)},
    "no restart": {"teacher.restart": False},
    "low variance": {"gradient.mode": "low_variance"},
    "tuned": {"method": "tune", "tune.gate": True, "gate.tau_in_std": True, "gate.tau": 0.1},
    "branches": {"method": "tune", "tune.branches": 3},
    "consistency": {"method": "consistency", "reward.weight": 0.0},
    "matching": {"method": "matching", "reward.weight": 0.0},
}


def started(folder: Path, settings: dict[str, Any]) -> Trainer:
    def validate(samplers: Sequence[Any], step: int) -> dict[str, float]:
        return {**figures(heldout=SCORES[step]), "diversity_validation": 2.4 + 0.1 * step}

    trainer = make(folder, {"steps": 6, "teacher.guided_steps": 3, **settings}, validate)
    trainer.teacher_diversity = 2.5
    assert isinstance(trainer.optimizer, OffloadedAdamW) == (settings.get("optim.state") == "offload")
    return trainer


def ended(trainer: Trainer, folder: Path) -> list[Any]:
    """All that a run leaves."""
    trainer.run()
    rows = [{k: v for k, v in row.items() if not k.endswith("_s")} for row in read_log(folder / "log.jsonl")]
    moments = [
        {name: value.tolist() for name, value in trainer.optimizer.state[parameter].items()}
        for parameter in trainer.roles.trainable
    ]
    state = {k: v for k, v in trainer.method.state().items() if not k.startswith("critic")}
    critic = trainer.method.state().get("critic", {})
    kept = [trainer.best_at, trainer.best_score, weight(trainer, "student"), weight(trainer, "teacher")]
    return [*kept, state, {name: value.tolist() for name, value in critic.items()}, moments, rows]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Any]]:
    found = {}
    for kind, settings in KINDS.items():
        folder = tmp_path_factory.mktemp("whole")
        found[kind] = ended(started(folder, settings), folder)
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_that_was_stopped_after_any_step_ends_like_a_whole_one(
    kind: str, whole: dict[str, list[Any]], tmp_path: Path
) -> None:
    for last in range(6):
        folder = tmp_path / str(last)
        stopped = started(folder, KINDS[kind])
        own = stopped._step
        stopped._step = lambda step: (asked_to_stop() if step == last else None, own(step))[1]  # type: ignore[method-assign]  # noqa: B023
        with pytest.raises(RunStopped, match=f"stopped after {last + 1} steps"):
            stopped.run()
        assert ended(started(folder, KINDS[kind]), folder) == whole[kind], last


def test_these_runs_differ_and_each_moves_what_it_keeps(whole: dict[str, list[Any]]) -> None:
    """Else nothing of it would be seen to be lost."""
    assert len({found[2] for found in whole.values()}) > 4 and whole["offloaded"][:3] == whole["plain"][:3]
    assert all(found[:2] == [2, 0.9] for found in whole.values())
    assert whole["steered"][4]["alpha"] != 1.0 and whole["matching"][5]["w"] != [START_W]
    assert whole["tau in deviations"][4]["gap_std"] > 0 and whole["tuned"][4]["gap_std"] > 0
    assert torch.tensor([found[3] for found in whole.values()]).std() > 0

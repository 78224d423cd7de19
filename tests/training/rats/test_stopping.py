"""SIGTERM in any phase of a run: it stops soon, loses nothing, and the same command ends as if it had not been."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.training.rats.test_wiring import figures, make, weight
from training import checkpoint
from training.evaluate import in_turns
from training.processes import Processes
from training.rats.trainer import CHECKPOINT, Trainer
from training.rundir import RunStopped
from training.steplog import StepLog, read_log
from training.termination import Terminated, stop_if_asked, stopped_at_once

Validate = Callable[[Sequence[Any], int], dict[str, float]]


def asked_to_stop() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def measured(samplers: Sequence[Any], step: int) -> dict[str, float]:
    """Three parts, as an evaluation has them; the middle of the run scores best."""
    values = in_turns([0.1, 0.2, 0.3], lambda part: part)
    return figures(heldout=sum(values) - abs(step - 2), trained=float(samplers[0].model.transformer.w.detach()))


def ended(trainer: Trainer, folder: Path) -> tuple[Any, ...]:
    """All that a run leaves."""
    rows = [{k: v for k, v in row.items() if not k.endswith("_s")} for row in read_log(folder / "log.jsonl")]
    return trainer.best_at, weight(trainer, "student"), weight(trainer, "teacher"), trainer.method.state(), rows


def test_a_validation_that_is_due_does_not_delay_a_stop_and_is_made_by_the_same_command(tmp_path: Path) -> None:
    seen: list[int] = []

    def validate(samplers: Sequence[Any], step: int) -> dict[str, float]:
        seen.append(step)
        return measured(samplers, step)

    plain = make(tmp_path / "plain", None, validate)
    plain.run()
    assert seen == [0, 2, 4] and plain.best_at == 2
    seen.clear()
    stopped = make(tmp_path / "cut", None, validate)
    step = stopped._step
    stopped._step = lambda number: (asked_to_stop() if number == 1 else None, step(number))[1]  # type: ignore[method-assign]
    with pytest.raises(RunStopped, match="stopped after 2 steps"):
        stopped.run()
    assert seen == [0], "the one after two steps was due"
    resumed = make(tmp_path / "cut", None, validate)
    resumed.run()
    assert seen == [0, 2, 4] and ended(resumed, tmp_path / "cut") == ended(plain, tmp_path / "plain")


@pytest.mark.parametrize("at", [2, 4])
def test_a_validation_that_is_under_way_is_left_and_made_again(at: int, tmp_path: Path) -> None:
    plain = make(tmp_path / "plain", None, measured)
    plain.run()
    parts: list[float] = []

    def interrupted(samplers: Sequence[Any], step: int) -> dict[str, float]:
        if step == at:
            in_turns([1.0, 2.0, 3.0], lambda part: (parts.append(part), asked_to_stop()))
        return measured(samplers, step)

    with pytest.raises(RunStopped, match=f"stopped after {at} steps"):
        make(tmp_path / "cut", None, interrupted).run()
    assert parts == [1.0], "it went on"
    saved = checkpoint.load(tmp_path / "cut" / CHECKPOINT)
    assert saved is not None and (saved["step"], saved["validated"]) == (at, at - 2)
    resumed = make(tmp_path / "cut", None, measured)
    resumed.run()
    assert ended(resumed, tmp_path / "cut") == ended(plain, tmp_path / "plain")


def test_a_stop_in_the_last_part_of_the_last_validation_is_not_forgotten(tmp_path: Path) -> None:
    def validate(samplers: Sequence[Any], step: int) -> dict[str, float]:
        values = measured(samplers, step)
        if step == 4:
            asked_to_stop()
        return values

    with pytest.raises(RunStopped, match="after the last step"):
        make(tmp_path, None, validate).run()
    resumed = make(tmp_path, None, lambda *_: pytest.fail("it was made"))
    resumed.run()
    assert resumed.best_at == 2


def test_a_checkpoint_of_an_earlier_version_has_all_its_validations(tmp_path: Path) -> None:
    trainer = make(tmp_path, None, measured)
    for step in range(2):
        trainer._step(step)
    trainer._save(2)
    saved = checkpoint.load(tmp_path / CHECKPOINT)
    assert saved is not None
    del saved["validated"]
    checkpoint.save(tmp_path / CHECKPOINT, saved)
    resumed = make(tmp_path)
    assert resumed._resume() == 2 and resumed.validated == 2


def test_where_nothing_is_half_done_a_program_ends_at_once_whatever_it_asks() -> None:
    before = signal.getsignal(signal.SIGTERM)
    stop_if_asked(Processes())  # nobody trains
    with pytest.raises(Terminated, match="the same command goes on"), stopped_at_once("the same command goes on"):
        try:
            asked_to_stop()
        except Exception:
            pytest.fail("taken for a fault of a reward")
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_stop_that_python_ignored_is_found_at_the_next_part() -> None:
    with pytest.raises(Terminated, match="now"), stopped_at_once("now"):
        with pytest.raises(Terminated):
            asked_to_stop()
        in_turns([1, 2], lambda part: pytest.fail("it went on"))
    stop_if_asked(Processes())  # and is forgotten afterwards


def test_a_run_that_was_stopped_between_two_validations_makes_no_other_ones(tmp_path: Path) -> None:
    seen: list[int] = []

    def validate(samplers: Sequence[Any], step: int) -> dict[str, float]:
        seen.append(step)
        return measured(samplers, step)

    stopped = make(tmp_path, None, validate)
    step = stopped._step
    stopped._step = lambda number: (asked_to_stop() if number == 2 else None, step(number))[1]  # type: ignore[method-assign]
    with pytest.raises(RunStopped, match="stopped after 3 steps"):
        stopped.run()
    make(tmp_path, None, validate).run()
    assert seen == [0, 2, 4]


@pytest.mark.parametrize("last", [0, 1, 3])
def test_a_stop_that_another_process_hears_stops_this_one_too(last: int, tmp_path: Path) -> None:
    trainer, done = make(tmp_path, None, measured), []
    step = trainer._step
    trainer._step = lambda number: (done.append(number), step(number))[1]  # type: ignore[method-assign]
    trainer.processes.any = lambda *here: (done[-1] == last, *here[1:])  # type: ignore[method-assign]
    with pytest.raises(RunStopped, match=f"stopped after {last + 1} steps"):
        trainer.run()
    saved = checkpoint.load(tmp_path / CHECKPOINT)
    assert saved is not None and saved["step"] == last + 1


def test_a_stop_after_the_last_step_in_another_process_stops_this_one_too(tmp_path: Path) -> None:
    trainer = make(tmp_path, None, measured)
    trainer.processes.any = lambda *here: (len(here) == 1, *here[1:])  # type: ignore[method-assign]
    with pytest.raises(RunStopped, match="after the last step"):
        trainer.run()


def test_all_processes_write_a_checkpoint_where_one_finds_it_late(tmp_path: Path) -> None:
    """Each has a clock of its own, and waits for the others while it writes."""
    trainer, saved = make(tmp_path, {"validation.every": 4}, measured), []
    trainer._save = lambda step, must: saved.append(step)  # type: ignore[method-assign]
    trainer.processes.any = lambda *here: (False, len(here) == 2)  # type: ignore[method-assign]
    trainer.run()
    assert saved == [1, 2, 3, 4]


def test_a_run_closes_its_log_when_its_last_step_is_in_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tracker on another machine shows a run as running until then."""
    closed: list[int] = []
    monkeypatch.setattr(StepLog, "close", lambda self: closed.append(len(self.rows())))
    make(tmp_path, None, measured).run()
    assert closed == [5], "the start and four steps"


@pytest.mark.parametrize("end", ["finished", "stopped", "failed"])
def test_a_tracker_hears_that_a_run_has_ended_however_it_ends(
    end: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    heard: list[str] = []

    class Tracker:
        def log(self, values: dict[str, float], step: int) -> None:
            heard.append(f"{step}")

        def close(self) -> None:
            heard.append("closed")

    def validate(samplers: Sequence[Any], step: int) -> dict[str, float]:
        if step == 2 and end == "failed":
            raise ValueError("the scorer is gone")
        if step == 2 and end == "stopped":
            asked_to_stop()
        return measured(samplers, step)

    monkeypatch.setattr("training.rats.trainer.remote", lambda *_: Tracker())
    trainer = make(tmp_path, None, validate)
    if end == "finished":
        trainer.run()
    else:
        with pytest.raises(RunStopped if end == "stopped" else ValueError):
            trainer.run()
    assert heard.count("closed") == 1 and heard[-1] == "closed"
    assert heard[:-1] == {"finished": ["0", "1", "2", "3", "4"], "stopped": ["0", "1", "2"], "failed": ["0", "1"]}[end]

"""A checkpoint is the old one or the new one, whole."""

from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from training import checkpoint
from training.optim import one_cycle
from training.progress import StepLog, read_log


def test_a_checkpoint_comes_back(tmp_path: Path) -> None:
    checkpoint.save(tmp_path / "a" / "x.pt", {"step": 3, "w": torch.arange(4.0)})
    state = checkpoint.load(tmp_path / "a" / "x.pt")
    assert state is not None and state["step"] == 3
    assert torch.equal(state["w"], torch.arange(4.0))
    assert checkpoint.load(tmp_path / "none.pt") is None


def test_a_failed_write_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.pt"
    checkpoint.save(path, {"step": 1})

    def disk_full(state: object, file: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(torch, "save", disk_full)
    with pytest.raises(OSError, match="no space"):
        checkpoint.save(path, {"step": 2})
    assert checkpoint.load(path) == {"step": 1}


def test_a_resumed_log_drops_what_will_be_done_again(tmp_path: Path) -> None:
    log = StepLog(tmp_path / "log.jsonl", 0)
    for step in range(5):
        log.write(step, loss=float(step))
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write('{"step": 5, "lo')
    log.close()
    log = StepLog(tmp_path / "log.jsonl", 3)
    log.write(3, loss=30.0)
    log.close()
    assert [(row["step"], row["loss"]) for row in read_log(tmp_path / "log.jsonl")] == [(0, 0), (1, 1), (2, 2), (3, 30)]
    seen = EventAccumulator(str(tmp_path / "tensorboard" / "log")).Reload().Scalars("loss")
    assert [(one.step, one.value) for one in seen] == [(1, 0), (2, 1), (3, 2), (4, 30)]


def test_a_log_that_starts_over_keeps_nothing(tmp_path: Path) -> None:
    for _ in range(2):
        log = StepLog(tmp_path / "log.jsonl", 0)
        log.write(-1, heldout=0.5)
        log.close()
    assert len(read_log(tmp_path / "log.jsonl")) == 1


def test_one_cycle_rises_to_its_peak_and_falls_to_zero() -> None:
    rates = [one_cycle(step, 1000, 2.0, 0.1) for step in range(1000)]
    assert rates[0] == pytest.approx(0.02)
    assert max(rates) == pytest.approx(2.0, rel=1e-3) and rates.index(max(rates)) in (98, 99, 100)
    assert rates[-1] == pytest.approx(0.0, abs=1e-6)
    assert rates[549] == pytest.approx(1.0, rel=1e-2)

"""A disk that takes no checkpoint: the run continues and says so, and ends only where it would be lost."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest

from tests.training.rats.test_wiring import make, weight
from training import checkpoint
from training.rats.trainer import CHECKPOINT


@pytest.fixture
def full(monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk has no room for the checkpoint after step 2."""
    real = checkpoint.save

    def save(path: Path, state: dict[str, Any]) -> None:
        if state["step"] == 2:
            raise checkpoint.CheckpointError(f"{path} cannot be written (No space left on device): there is none yet")
        real(path, state)

    monkeypatch.setattr(checkpoint, "save", save)


@pytest.mark.usefixtures("full")
def test_a_run_goes_on_without_a_checkpoint_and_ends_like_one_that_had_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer, other = make(tmp_path / "full"), make(tmp_path / "plain", {"validation.every": 4})
    trainer.run()
    said = " ".join(capsys.readouterr().err.split())
    assert "No space left on device): there is none yet; the run continues without it" in said
    kept = checkpoint.load(tmp_path / "full" / CHECKPOINT)
    assert kept is not None and kept["step"] == 4
    other.run()
    assert weight(trainer, "teacher") == weight(other, "teacher")


@pytest.mark.usefixtures("full")
def test_a_run_that_is_stopped_says_that_its_last_steps_are_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = make(tmp_path)
    real = trainer._step

    def stopped(step: int) -> dict[str, float]:
        if step == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(step)

    monkeypatch.setattr(trainer, "_step", stopped)
    with pytest.raises(checkpoint.CheckpointError, match="No space left"):
        trainer.run()

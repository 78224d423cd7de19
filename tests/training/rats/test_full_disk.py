"""A disk that takes no more: the run continues without what it can do without and says so, and ends only where it
would be lost.
"""

from __future__ import annotations

import errno
import os
import resource
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from student.families.family import Condition
from student.writing import write_atomically
from tests.training.rats.test_wiring import make, weight
from training import checkpoint, disk
from training.conditions import Conditions
from training.evaluate import Evaluation, cached
from training.rats.trainer import CHECKPOINT
from training.steplog import StepLog, read_log


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


@contextmanager
def no_file_above(num_bytes: int) -> Iterator[None]:
    """The system itself refuses, with EFBIG, what would make a file longer."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.fixture(autouse=True)
def nothing_said_yet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk.SPARED, "_said", set())


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # TensorBoard's thread may end so
def test_a_line_that_the_disk_does_not_take_is_left_out_whole_and_the_later_ones_are_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log = StepLog(tmp_path / "log.jsonl", 0)
    log.write(0, loss=1.0)
    with no_file_above((tmp_path / "log.jsonl").stat().st_size + 7):
        for step in (1, 2):
            log.write(step, loss=2.0)
    assert (tmp_path / "log.jsonl").read_text().endswith("}\n")
    log.write(3, loss=3.0)
    log.amend(3, heldout_validation=4.0)
    log.close()
    rows = read_log(tmp_path / "log.jsonl")
    assert [row["step"] for row in rows] == [0, 3] and (rows[1]["loss"], rows[1]["heldout_validation"]) == (3.0, 4.0)
    said = " ".join(capsys.readouterr().err.split())
    assert said.count("the run continues without lines of its log") == 1 and "(File too large)" in said


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # TensorBoard's thread ends so
def test_a_run_that_can_write_nothing_from_its_first_step_on_learns_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    plain, trainer = make(tmp_path / "plain"), make(tmp_path / "full")
    plain.run()
    train = trainer._train

    def without_room(*arguments: Any) -> None:
        with no_file_above(64):
            train(*arguments)

    monkeypatch.setattr(trainer, "_train", without_room)
    trainer.run()
    assert [weight(trainer, name) for name in ("student", "teacher")] == [
        weight(plain, name) for name in ("student", "teacher")
    ]
    assert trainer.best_at == plain.best_at and not (tmp_path / "full" / CHECKPOINT).exists()
    assert [row["step"] for row in read_log(tmp_path / "full" / "log.jsonl")] == [-1]
    said = " ".join(capsys.readouterr().err.split())
    assert "without lines of its log" in said and "there is none yet; the run continues without it" in said


def test_what_the_disk_keeps_no_copy_of_stays_in_the_process(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    class Reader:
        def encode(self, prompts: list[str]) -> Condition:
            return Condition(torch.arange(6.0).view(1, 2, 3).repeat(len(prompts), 1, 1))

    kept = Conditions(tmp_path / "conditions", ["a ring", "a star"])
    figures = Evaluation("teacher", 4, 1.0, {"trained": [0.5]}, {}, [1.0])
    with no_file_above(16):
        kept.encode(Reader(), kept.missing())  # type: ignore[arg-type]
        assert cached(tmp_path / "figures", "key", lambda: figures) == figures
    assert not kept.missing() and torch.equal(kept["a star"].tokens_BLE[0], torch.arange(6.0).view(2, 3))
    assert len(kept) == 2 and Conditions(tmp_path / "conditions", ["a ring"]).missing() == ["a ring"]
    assert not list(tmp_path.rglob("*.part")) and not list((tmp_path / "figures").glob("*.json"))
    said = " ".join(capsys.readouterr().err.split())
    assert "without copies of its encoded prompts" in said and "without a copy of these figures" in said


def test_another_fault_of_the_disk_is_raised(tmp_path: Path) -> None:
    with pytest.raises(PermissionError), disk.unless_full("anything", tmp_path):
        raise PermissionError(13, "Permission denied")


def test_what_could_be_written_meanwhile_is_said_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    counts = []
    for full in (True, True, False, True):
        with disk.unless_full("a copy", tmp_path / "file"):
            if full:
                raise OSError(errno.ENOSPC, "No space left on device")
        counts.append(capsys.readouterr().err.count("No space left on device"))
    assert counts == [1, 0, 0, 1]


def test_a_file_that_cannot_be_written_whole_leaves_the_one_before_and_nothing_else(tmp_path: Path) -> None:
    write_atomically(tmp_path / "file", b"1")
    with no_file_above(4), pytest.raises(OSError, match="File too large"):
        write_atomically(tmp_path / "file", b"longer")
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("file", b"1")]

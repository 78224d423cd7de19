"""A checkpoint is the old one or the new one, whole."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from training import checkpoint, figures
from training.alarms import all_alarms
from training.optim import one_cycle, trapezoid
from training.steplog import StepLog, read_log


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
    with pytest.raises(
        checkpoint.CheckpointError, match="no space .*: the previous one is complete, and the same command"
    ):
        checkpoint.save(path, {"step": 2})
    assert checkpoint.load(path) == {"step": 1}
    assert [file.name for file in tmp_path.iterdir()] == ["x.pt"]
    with pytest.raises(checkpoint.CheckpointError, match="no space .*: there is none yet"):
        checkpoint.save(tmp_path / "y.pt", {"step": 2})


def test_a_disk_that_takes_no_more_leaves_the_old_one_and_nothing_else(tmp_path: Path) -> None:
    """A real write that really fails after a megabyte: the limit stands for a full disk."""
    path = tmp_path / "x.pt"
    code = f"""
import resource, torch
from pathlib import Path
from training import checkpoint
path = Path({str(path)!r})
checkpoint.save(path, {{"w": torch.ones(1000)}})
resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))
try:
    checkpoint.save(path, {{"w": torch.zeros(1_000_000)}})
except checkpoint.CheckpointError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.startswith(f"{path} cannot be written (File too large): the previous one is complete"), (
        done.stderr
    )
    assert [file.name for file in tmp_path.iterdir()] == ["x.pt"]
    state = checkpoint.load(path)
    assert state is not None and torch.equal(state["w"], torch.ones(1000))


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


def test_a_log_is_strict_json_and_reads_back_what_was_not_finite(tmp_path: Path) -> None:
    def no_such_word(word: str) -> float:
        raise AssertionError(f"{word} is not JSON")

    path = tmp_path / "log.jsonl"
    log = StepLog(path, 0)
    log.write(0, loss=math.nan, reward=math.inf, skipped=1.0)
    log.close()
    StepLog(path, 1).close()  # a run that is gone on with writes the kept rows again
    [row] = [json.loads(line, parse_constant=no_such_word) for line in path.read_text().splitlines()]
    assert (row["loss"], row["reward"], row["skipped"]) == (None, None, 1.0)
    [read] = read_log(path)
    assert math.isnan(read["loss"]) and math.isnan(read["reward"]) and read["skipped"] == 1.0
    path.write_text('{"step": 0, "loss": NaN}\n')  # as logs were written before
    assert math.isnan(read_log(path)[0]["loss"])


def test_curves_and_alarms_pass_over_what_was_not_finite(tmp_path: Path) -> None:
    looks = {"reward_validation": 1.0, "diversity_validation": 1.0, "velocity_norm": 1.0, "saturation": 0.0}
    log = StepLog(tmp_path / "log.jsonl", 0)
    for step, value in ((-1, 1.0), (0, math.nan), (1, math.nan)):
        log.write(step, reward_student=value, shaping=math.nan, heldout_validation=value, **looks)
    log.close()
    rows = read_log(tmp_path / "log.jsonl")
    assert all_alarms(rows, 2.0) == []
    figures.curves(rows, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").stat().st_size > 5_000


def test_one_cycle_rises_to_its_peak_and_falls_to_zero() -> None:
    rates = [one_cycle(step, 1000, 2.0, 0.1) for step in range(1000)]
    assert rates[0] == pytest.approx(0.02)
    assert max(rates) == pytest.approx(2.0, rel=1e-3) and rates.index(max(rates)) in (98, 99, 100)
    assert rates[-1] == pytest.approx(0.0, abs=1e-6)
    assert rates[549] == pytest.approx(1.0, rel=1e-2)


def test_a_trapezoid_rises_stays_and_falls_to_nothing() -> None:
    """Worked by hand: 4 steps up, 20 steps in all, the last fifth down; until then it knows nothing of the length."""
    rates = [trapezoid(step, 20, 1.0, warmup=4, decay=0.2) for step in range(20)]
    assert rates == pytest.approx([0.25, 0.5, 0.75, *[1.0] * 14, 0.75, 0.5, 0.25])
    assert rates[:16] == [trapezoid(step, 1000, 1.0, warmup=4, decay=0.2) for step in range(16)]
    assert trapezoid(19, 20, 1.0, warmup=4, decay=0.0) == 1.0


def test_figures_that_a_line_is_given_later_stand_at_its_step_in_tensorboard_too(tmp_path: Path) -> None:
    log = StepLog(tmp_path / "log.jsonl", 0)
    log.write(0, loss=1.0)
    log.write(1, loss=2.0)
    log.amend(1, heldout=4.0)
    log.close()
    rows = [{name: row.get(name) for name in ("step", "loss", "heldout")} for row in read_log(tmp_path / "log.jsonl")]
    assert rows == [{"step": 0, "loss": 1.0, "heldout": None}, {"step": 1, "loss": 2.0, "heldout": 4.0}]
    seen = EventAccumulator(str(tmp_path / "tensorboard" / "log")).Reload().Scalars("heldout")
    assert [(one.step, one.value) for one in seen] == [(2, 4.0)]


def test_figures_of_a_step_whose_line_is_lost_get_a_line_of_their_own(tmp_path: Path) -> None:
    log = StepLog(tmp_path / "log.jsonl", 0)
    for step, added in ((0, {"heldout": 1.0}), (2, {"heldout": 3.0}), (2, {"trained": 4.0})):
        log.amend(step, **added)
    log.close()
    assert read_log(tmp_path / "log.jsonl") == [
        {"step": 0, "heldout": 1.0}, {"step": 2, "heldout": 3.0, "trained": 4.0},
    ]  # fmt: skip


def slices(value: float) -> dict[str, dict[str, torch.Tensor]]:
    return {"student": {"w": torch.full((3,), value)}, "exp_avg": {"0": torch.full((2,), 10 * value)}}


def test_a_sharded_checkpoint_is_the_old_one_or_the_new_one_wherever_it_was_killed(tmp_path: Path) -> None:
    """Also between the two renamings, when only the one before is there under its other name."""
    path = tmp_path / "run" / "checkpoint"
    assert checkpoint.load_slices(path, slices(0)) is None
    checkpoint.save_slices(path, slices(1), {"step": 1})
    path.rename(path.with_name("checkpoint.before"))
    (path.with_name("checkpoint.part")).mkdir()
    found = slices(0)
    assert checkpoint.load_slices(path, found) == {"step": 1}
    assert found["student"]["w"].tolist() == [1.0] * 3 and found["exp_avg"]["0"].tolist() == [10.0] * 2
    checkpoint.save_slices(path, slices(2), {"step": 2})
    assert sorted(one.name for one in path.parent.iterdir()) == ["checkpoint"]
    checkpoint.save_slices(path, slices(3), {"step": 3})
    assert checkpoint.load_slices(path, found) == {"step": 3} and found["student"]["w"].tolist() == [3.0] * 3
    assert sorted(one.name for one in path.parent.iterdir()) == ["checkpoint"]


def test_at_a_runs_end_nothing_of_its_checkpoints_is_left_and_nothing_else_goes(tmp_path: Path) -> None:
    for name in ("checkpoint", "checkpoint.part", "checkpoint.before"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "slices").write_text("1")
    (tmp_path / "checkpoint.pt").write_text("1")
    (tmp_path / "log.jsonl").write_text("1")
    checkpoint.remove(tmp_path / "checkpoint.pt")
    assert [one.name for one in tmp_path.iterdir()] == ["log.jsonl"]
    checkpoint.remove(tmp_path / "checkpoint.pt")


def test_a_checkpoint_is_on_the_disk_before_it_takes_the_place_of_the_one_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []
    for name in ("fsync", "replace"):
        own = getattr(checkpoint.os, name)
        monkeypatch.setattr(checkpoint.os, name, lambda *given, name=name, own=own: (done.append(name), own(*given))[1])
    checkpoint.save(tmp_path / "x.pt", {"step": 1})
    assert done == ["fsync", "replace"]

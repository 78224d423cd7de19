"""The peers' formulas against closed forms, and whole runs of each on a tiny pipeline."""

from pathlib import Path
from typing import Any

import pytest
import torch

from student.bundle import read_student
from student.schedule import sigmas
from tests.training.rats.test_families import run, settings
from training.rats.peers import Consistency, Matching, _noisy, data_of, direction, next_point
from training.steplog import read_log


@pytest.fixture(autouse=True)
def own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("training.evaluate.CACHE", tmp_path / "cache")


def test_a_jump_never_leaves_the_students_segment() -> None:
    student, teacher = sigmas(2), sigmas(8)
    assert next_point(1.0, teacher, student) == (0.875, 0.5)
    assert next_point(0.625, teacher, student) == (0.5, 0.5)
    assert next_point(0.5, teacher, student) == (0.375, 0.0)
    assert next_point(0.125, teacher, student) == (0.0, 0.0)
    assert next_point(2 / 3, sigmas(3), student) == (0.5, 0.5)  # the teacher's next point lies beyond the segment


def test_the_direction_is_scaled_sample_by_sample() -> None:
    x0 = torch.tensor([[1.0, 1.0], [4.0, 0.0]])
    real, fake = torch.zeros(2, 2), torch.tensor([[0.5, -0.5], [2.0, 2.0]])
    expected = torch.tensor([[0.5, -0.5], [1.0, 1.0]])  # mean distances 1 and 2
    torch.testing.assert_close(direction(x0, real, fake), expected)
    assert direction(x0, real, real).abs().max() == 0


def test_the_data_of_a_field_that_knows_it() -> None:
    data, x = torch.full((2, 3), 0.25), torch.randn(2, 3)
    torch.testing.assert_close(data_of(lambda x, sigma: (x - data) / sigma, x, 0.4), data)


def test_only_a_method_with_a_target_of_its_own_past_follows_the_student() -> None:
    none: Any = None
    assert [Consistency.follows(none, step) for step in (0, 7)] == [True, True]
    assert [Matching.follows(none, step) for step in (0, 7)] == [False, False]


def test_noise_for_the_critic_keeps_away_from_both_ends_and_is_mixed_by_its_time() -> None:
    gen, data = torch.Generator().manual_seed(3), torch.full((4, 2), 5.0)
    found = [_noisy(data, gen) for _ in range(300)]
    times = [sigma for sigma, _, _ in found]
    assert 0.02 <= min(times) < 0.05 and 0.95 < max(times) <= 0.98
    for sigma, noise, noisy in found:
        torch.testing.assert_close(noisy, (1 - sigma) * data + sigma * noise)
    everything = torch.stack([noise for _, noise, _ in found])
    assert everything.mean().abs() < 0.1 and abs(everything.std() - 1) < 0.1


@pytest.mark.parametrize("method", ["consistency", "matching"])
def test_a_whole_run_of_a_peer(method: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    more = {"method": method, "teacher_nfe": 6, "guidance": 2.0, "guided_steps": 3, "reward_weight": 0}
    code, text = run("--out", str(out), *settings(tmp_path, "flux", **more))
    assert code == 0, text
    assert read_student(out).steps == (3,)
    rows = [row for row in read_log(out / "run" / "log.jsonl") if row["step"] >= 0]
    assert all(row["loss"] > 0 and row["grad_norm"] > 0 for row in rows)

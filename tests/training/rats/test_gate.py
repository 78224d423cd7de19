"""Each kind of gate against its closed form, and what a step logs of it."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from training.config import changed
from training.rats.config import GATES, RatsConfig
from training.rats.gate import Gate
from training.rats.method import Batch

TEACHER, STUDENT = torch.tensor([1.0, 0.0, 2.0]), torch.tensor([0.0, 0.0, 3.0])
OPEN = torch.tensor([1 / (1 + math.exp(-1)), 0.5, 1 / (1 + math.exp(1))])


def gate(kind: str, **settings: Any) -> Gate:
    return Gate(changed(RatsConfig(), {"gate.kind": kind, **{f"gate.{name}": to for name, to in settings.items()}}))


def batch(step: int = 3, at: int = 0) -> Batch:
    return Batch(step, at, 4, (), torch.zeros(0))


EXPECTED = {
    "reward": OPEN,
    "confidence": torch.sigmoid(TEACHER),
    "constant": torch.tensor([0.5, 0.5, 0.5]),
    "one": torch.tensor([1.0, 1.0, 1.0]),
    "batch_mean": OPEN.mean().expand(3),
    "signed": 2 * OPEN - 1,
}


@pytest.mark.parametrize("kind", EXPECTED)
def test_each_kind_has_its_weights(kind: str) -> None:
    torch.testing.assert_close(gate(kind).weights(TEACHER, STUDENT, batch()), EXPECTED[kind])


def test_every_kind_is_here() -> None:
    assert {*EXPECTED, "shuffled", "disagreement"} == set(GATES)  # of two rewards: test_method.py


def test_a_shuffled_gate_has_the_same_weights_at_other_samples_as_the_step_says() -> None:
    teacher = torch.arange(16.0)
    plain = gate("reward").weights(teacher, torch.zeros(16), batch())
    one, again, other, second = (
        gate("shuffled").weights(teacher, torch.zeros(16), batch(*at)) for at in ((3,), (3,), (4,), (3, 32))
    )
    assert torch.equal(one.sort().values, plain.sort().values) and not torch.equal(one, plain)
    assert torch.equal(one, again) and not torch.equal(one, other) and not torch.equal(one, second)


def test_tau_may_be_counted_in_deviations_of_the_gap_once_one_was_seen() -> None:
    plain, relative = gate("reward", tau=2.0), gate("reward", tau=2.0, tau_in_std=True)
    for one in (plain, relative):
        torch.testing.assert_close(one.weights(TEACHER, STUDENT, batch()), torch.sigmoid((TEACHER - STUDENT) / 2))
        one.after_step({"gap_std": 0.25})
    torch.testing.assert_close(plain.weights(TEACHER, STUDENT, batch()), torch.sigmoid((TEACHER - STUDENT) / 2))
    torch.testing.assert_close(relative.weights(TEACHER, STUDENT, batch()), torch.sigmoid((TEACHER - STUDENT) / 0.5))


def test_the_deviation_is_a_running_mean_that_never_reaches_nothing() -> None:
    found = gate("reward")
    found.after_step({"loss": 1.0})
    assert found.gap_std is None
    found.after_step({"gap_std": 1.0})
    assert found.gap_std == 1.0, "the first one counts whole"
    found.after_step({"gap_std": 2.0})
    assert found.gap_std == pytest.approx(0.9 * 1.0 + 0.1 * 2.0)
    small = gate("reward")
    small.after_step({"gap_std": 0.0})
    assert small.gap_std == 0.01, "a hundredth of the teacher's"


def test_a_step_logs_moments_of_the_gap_and_of_the_gate() -> None:
    said = gate("reward").figures(TEACHER, STUDENT, torch.tensor([0.25, 0.5, 0.75]))
    assert {name: float(value) for name, value in said.items()} == pytest.approx({
        "gap": 0.0, "gap_square": 2 / 3, "gate_mean": 0.5, "gate_square": 0.875 / 3, "share_ahead": 1 / 3,
    })  # fmt: skip

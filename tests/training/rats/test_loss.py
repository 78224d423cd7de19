"""The gate, the shaping loss and the objective against closed forms."""

import math

import pytest
import torch

from student.schedule import sigmas
from training.rats.loss import confidence, gate, reward_loss, shaping, velocity_excess
from training.rats.trajectory import Trajectory, horizons, rollout


def test_gate_at_equality_far_above_and_far_below() -> None:
    teacher = torch.tensor([1.0, 50.0, -50.0, 2.0])
    student = torch.tensor([1.0, 0.0, 0.0, 1.0])
    expected = torch.tensor([0.5, 1.0, 0.0, 1 / (1 + math.exp(-1 / 0.5))])
    torch.testing.assert_close(gate(teacher, student, 0.5), expected, atol=1e-6, rtol=1e-6)


def test_gate_passes_no_gradient() -> None:
    student = torch.tensor([0.3], requires_grad=True)
    assert not gate(torch.tensor([0.1]), student, 1.0).requires_grad


def test_the_confidence_gate_looks_at_the_teacher_alone() -> None:
    teacher = torch.tensor([0.0, 0.5 * math.log(3), -50.0, 50.0], requires_grad=True)
    found = confidence(teacher, 0.5)
    torch.testing.assert_close(found, torch.tensor([0.5, 0.75, 0.0, 1.0]), atol=1e-6, rtol=1e-6)
    assert not found.requires_grad


def test_gate_refuses_a_tau_of_zero() -> None:
    with pytest.raises(ValueError, match="more than 0"):
        gate(torch.zeros(1), torch.zeros(1), 0.0)


def _path(value: torch.Tensor) -> Trajectory:
    """A path that predicts ``value`` as its data everywhere."""
    noise = torch.zeros_like(value)
    return rollout(lambda x, sigma: (x - value) / sigma, noise, sigmas(4))


def test_shaping_is_zero_for_identical_trajectories() -> None:
    path = _path(torch.randn(5, 4, 2, 2, generator=torch.Generator().manual_seed(3)))
    torch.testing.assert_close(shaping(path, path, horizons(sigmas(4)), 1.0, 0.5), torch.zeros(5), atol=1e-6, rtol=0)


def test_shaping_of_known_vectors() -> None:
    ones = torch.ones(1, 4, 1, 1)
    twice, against = _path(2 * ones), _path(-ones)
    points = horizons(sigmas(4))
    # The same direction, distance 1 in every element; then the opposite direction, distance 2.
    torch.testing.assert_close(shaping(twice, _path(ones), points, 1.0, 0.5), torch.tensor([1.0]))
    torch.testing.assert_close(shaping(against, _path(ones), points, 1.0, 0.5), torch.tensor([4.0 + 0.5 * 2]))
    torch.testing.assert_close(shaping(against, _path(ones), points, 0.0, 3.0), torch.tensor([6.0]))


def test_shaping_reads_the_teacher_at_the_students_sigmas() -> None:
    """A teacher of 3 steps has no state at 0.75: the loss must interpolate it, not take the nearest one."""
    noise = torch.ones(1, 2, 1, 1)
    teacher = rollout(lambda x, _: x, noise, sigmas(3))
    student = rollout(lambda x, _: 0 * x, noise, sigmas(4))
    first = 1.0  # x0 of the student, whose velocity is 0, is the noise
    at_three_quarters = 0.75 - 0.75 * 1.0  # x = 1 + (0.75 - 1) * 1, v = 1
    torch.testing.assert_close(
        shaping(student, teacher, (0.75,), 1.0, 0.0), torch.tensor([(first - at_three_quarters) ** 2])
    )


def test_shaping_sends_gradient_to_the_student_alone() -> None:
    scale = torch.tensor(1.0, requires_grad=True)
    other = torch.tensor(2.0, requires_grad=True)
    noise = torch.ones(1, 2, 1, 1)
    student = rollout(lambda x, _: scale * x, noise, sigmas(2))
    teacher = rollout(lambda x, _: other * x, noise, sigmas(2))
    shaping(student, teacher, horizons(sigmas(2)), 1.0, 0.5).sum().backward()
    assert scale.grad is not None and scale.grad != 0
    assert other.grad is None


def test_a_reward_above_the_hinge_counts_as_the_hinge_and_gives_no_gradient() -> None:
    reward = torch.tensor([1.0, 3.0], requires_grad=True)
    loss = reward_loss(reward, hinge=2.0)
    assert loss.tolist() == [-1.0, -2.0]
    loss.sum().backward()
    assert reward.grad is not None and reward.grad.tolist() == [-1.0, 0.0]
    assert reward_loss(torch.tensor([1.0, 300.0])).tolist() == [-1.0, -300.0]


def test_velocity_excess_counts_only_what_is_longer_than_allowed() -> None:
    noise = torch.ones(2, 2, 1, 1)
    teacher = rollout(lambda x, _: torch.ones_like(x), noise, sigmas(3))
    lengths = torch.tensor([1.0, 3.0]).reshape(2, 1, 1, 1)
    student = rollout(lambda x, _: lengths * torch.ones_like(x), noise, sigmas(2))
    torch.testing.assert_close(velocity_excess(student, teacher, 1.5), torch.tensor([0.0, 1.5]))
    assert velocity_excess(student, teacher, math.inf).tolist() == [0.0, 0.0]

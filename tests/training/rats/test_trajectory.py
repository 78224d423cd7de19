"""Trajectories against a velocity field whose exact path is known."""

import pytest
import torch
from torch import Tensor

from student.schedule import sigmas
from training.rats.trajectory import Trajectory, horizons, named_horizons, rollout

NOISE = torch.randn(3, 4, 2, 2, generator=torch.Generator().manual_seed(1))
DATA = torch.randn(3, 4, 2, 2, generator=torch.Generator().manual_seed(2))


def straight(x: Tensor, sigma: float) -> Tensor:
    """The field of a model that knows the data: (x - data) / sigma; its paths are straight lines."""
    return (x - DATA) / sigma


def curved(x: Tensor, sigma: float) -> Tensor:
    """dx/dsigma = x: Euler multiplies by (1 + step), so every state has a closed form."""
    return x


def test_a_straight_path_is_exact_at_any_sigma_and_step_count() -> None:
    for nfe in (1, 3, 4, 50):
        path = rollout(straight, NOISE, sigmas(nfe))
        for sigma in (1.0, 0.83, 0.5, 0.013, 0.0):
            torch.testing.assert_close(path.state(sigma), sigma * NOISE + (1 - sigma) * DATA, atol=1e-5, rtol=0)
            torch.testing.assert_close(path.data(sigma), DATA, atol=1e-5, rtol=0)


def test_grid_states_of_a_curved_field_have_their_closed_form() -> None:
    path = rollout(curved, NOISE, sigmas(4))
    for i, sigma in enumerate((1.0, 0.75, 0.5, 0.25, 0.0)):
        torch.testing.assert_close(path.state(sigma), NOISE * 0.75**i)


def test_a_state_between_grid_points_is_the_euler_step_that_stops_there() -> None:
    path = rollout(curved, NOISE, sigmas(4))
    at_half = NOISE * 0.75**2
    stopped = at_half + (0.4 - 0.5) * curved(at_half, 0.5)
    torch.testing.assert_close(path.state(0.4), stopped)
    torch.testing.assert_close(path.data(0.4), stopped - 0.4 * curved(at_half, 0.5))


def test_at_a_grid_point_the_leaving_velocity_counts() -> None:
    path = rollout(curved, NOISE, sigmas(4))
    at_half = NOISE * 0.75**2
    torch.testing.assert_close(path.data(0.5), at_half - 0.5 * at_half)


def test_the_velocity_at_a_sigma_is_that_of_the_step_which_leaves_it_or_passes_through_it() -> None:
    path = rollout(curved, NOISE, sigmas(4))
    for sigma, steps in ((1.0, 0), (0.8, 0), (0.75, 1), (0.3, 2), (0.25, 3), (0.001, 3)):
        torch.testing.assert_close(path.velocity(sigma), NOISE * 0.75**steps)
    with pytest.raises(ValueError, match="no velocity leaves sigma 0"):
        path.velocity(0)


@pytest.mark.parametrize("points", [(0.0,), (0.9, 0.0), (0.75, 0.5, 0.25, 0.0), (0.61, 0.13), (1.0, 0.3)])
def test_a_thinned_path_is_the_same_at_its_points_and_keeps_no_step_between_them(points: tuple[float, ...]) -> None:
    path = rollout(curved, NOISE, sigmas(8))
    thin = path.thinned(points)
    for sigma in points:
        assert torch.equal(thin.state(sigma), path.state(sigma)) and torch.equal(thin.data(sigma), path.data(sigma))
        assert sigma == 0 or torch.equal(thin.velocity(sigma), path.velocity(sigma))
    assert len(thin.v) == len(thin.sigmas) == len(thin.x) - 1 <= 1 + len(points), "the first, and one for each"


def test_some_samples_of_a_path_are_their_own_path() -> None:
    path, rows = rollout(curved, NOISE, sigmas(3)), slice(1, 3)
    own = rollout(curved, NOISE[rows], sigmas(3))
    for sigma in (1.0, 0.6, 0.2, 0.0):
        torch.testing.assert_close(path.take(rows).data(sigma), own.data(sigma))


def test_sigma_outside_the_path_is_refused() -> None:
    path = Trajectory((0.5,), (NOISE, NOISE), (NOISE,))
    with pytest.raises(ValueError, match="accepted is 0 to 0.5"):
        path.state(0.6)


def test_horizons_are_the_sigmas_below_one_and_zero() -> None:
    assert horizons(sigmas(4)) == (0.75, 0.5, 0.25, 0.0)
    assert horizons((1.0,)) == (0.0,)


def test_horizons_by_name_and_by_hand() -> None:
    assert named_horizons("student", sigmas(4)) == (0.75, 0.5, 0.25, 0.0)
    assert named_horizons("end", sigmas(4)) == (0.0,)
    assert named_horizons("0.8, 0.4,0", sigmas(4)) == (0.8, 0.4, 0.0)
    for wrong in ("", "begin", "0.5,1", "-0.1", "0.5,,0"):
        with pytest.raises(ValueError, match="accepted are student, end, or sigmas"):
            named_horizons(wrong, sigmas(4))

"""Sigmas against their formula, and against what diffusers' scheduler makes of them."""

import pytest
from diffusers import FlowMatchEulerDiscreteScheduler

from student.schedule import sigmas


def test_four_steps_without_shift() -> None:
    assert sigmas(4) == (1.0, 0.75, 0.5, 0.25)


def test_shift_three() -> None:
    assert sigmas(4, shift=3.0) == pytest.approx((1.0, 0.9, 0.75, 0.5))


@pytest.mark.parametrize("nfe", [1, 3, 50])
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_equal_to_the_scheduler_that_shifts_once(nfe: int, shift: float) -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(sigmas=list(sigmas(nfe)))
    assert (*sigmas(nfe, shift), 0.0) == pytest.approx(scheduler.sigmas.tolist(), abs=1e-6)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_they_fall_from_one_and_leave_the_final_zero_to_the_loop(shift: float) -> None:
    values = sigmas(50, shift)
    assert len(values) == 50 and values[0] == 1.0 and values[-1] > 0
    assert all(a > b for a, b in zip(values, values[1:], strict=False))


def test_bad_values_are_refused() -> None:
    with pytest.raises(ValueError, match="nfe is 0: accepted is 1 or more"):
        sigmas(0)
    with pytest.raises(ValueError, match="shift is -1: accepted is more than 0"):
        sigmas(4, shift=-1)

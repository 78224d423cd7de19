"""Sigmas against their formula, and against what diffusers' scheduler makes of them."""

from typing import Any

import numpy as np
import pytest
from diffusers import FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler
from diffusers.pipelines.flux.pipeline_flux import calculate_shift

from student.bundle import BundleError
from student.schedule import by_size, check, linear_mu, scheduled, sigmas


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


DYNAMIC = {"use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 0.9, "max_image_seq_len": 8192}


@pytest.mark.parametrize("nfe", [2, 3, 8, 50])
@pytest.mark.parametrize(
    "settings",
    [
        {"shift": 3.0},
        DYNAMIC,
        {**DYNAMIC, "time_shift_type": "linear"},
        {"shift": 3.0, "shift_terminal": 0.02},
        {**DYNAMIC, "shift_terminal": 0.1},
        {"shift": 3.0, "use_karras_sigmas": True},
        {**DYNAMIC, "use_exponential_sigmas": True},
        {**DYNAMIC, "shift_terminal": 0.1, "use_karras_sigmas": True},
    ],
)
def test_every_schedule_that_is_followed_is_the_schedulers_own(settings: dict[str, Any], nfe: int) -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(**settings)
    mu = linear_mu(scheduler.config, tokens=1024)
    scheduler.set_timesteps(sigmas=list(sigmas(nfe)), mu=mu)
    ours = scheduled(scheduler.config, nfe, mu)
    assert (*ours, 0.0) == pytest.approx(scheduler.sigmas.tolist(), abs=1e-6)


def test_a_flow_of_unipc_may_be_stretched_too() -> None:
    scheduler = UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0, shift_terminal=0.1
    )
    scheduler.set_timesteps(sigmas=np.array(sigmas(4)), num_inference_steps=4)
    assert scheduled(scheduler.config, 4, 0.0) == pytest.approx(scheduler.sigmas[:-1].tolist(), abs=2e-6)


@pytest.mark.parametrize("settings", [{"shift_terminal": 0.1}, {"use_karras_sigmas": True}, {"shift": 3.0}])
def test_a_single_step_begins_at_noise_and_has_nothing_to_bend(settings: dict[str, Any]) -> None:
    assert scheduled({"shift": 1.0, **settings}, 1, 0.0) == pytest.approx((1.0,))


@pytest.mark.parametrize(
    "settings, complaint",
    [
        (
            {"use_beta_sigmas": True},
            "the scheduler's use_beta_sigmas is True: accepted are shifted, terminal-stretched, karras",
        ),
        ({"invert_sigmas": True}, "the scheduler's invert_sigmas is True: accepted are schedules from sigma 1"),
        ({"stochastic_sampling": True}, "the scheduler's stochastic_sampling is True: accepted are steps without"),
        (
            {"use_flow_sigmas": True, "flow_shift": 3.0, "use_karras_sigmas": True},
            "are both True: accepted is only one",
        ),
    ],
)
def test_what_is_not_followed_is_refused_by_name(settings: dict[str, Any], complaint: str) -> None:
    with pytest.raises(BundleError, match=complaint):
        check({"shift": 1.0, **settings})


def test_the_scheduler_of_no_flow_model_is_refused() -> None:
    with pytest.raises(BundleError, match="has no shift: accepted is the scheduler of a flow model"):
        check({"num_train_timesteps": 1000})


@pytest.mark.parametrize("tokens", [1, 256, 1024, 4096, 9999])
def test_the_shift_by_size_is_the_pipelines_own_with_its_defaults(tokens: int) -> None:
    assert linear_mu({}, tokens) == pytest.approx(calculate_shift(tokens))
    names = ("base_image_seq_len", "max_image_seq_len", "base_shift", "max_shift")
    given = dict(zip(names, (100, 5000, 0.3, 1.7), strict=True))
    assert linear_mu(given, tokens) == pytest.approx(calculate_shift(tokens, *given.values()))


OWN: dict[str, Any] = {
    "base_image_seq_len": 100, "max_image_seq_len": 5000, "base_shift": 0.3, "max_shift": 1.7,
    "time_shift_type": "linear", "shift_terminal": 0.1, "use_karras_sigmas": True, "use_exponential_sigmas": True,
}  # fmt: skip


@pytest.mark.parametrize("last", [None, 0.001])
@pytest.mark.parametrize("name", [None, *OWN])
def test_what_a_student_keeps_of_its_schedule_gives_the_same_sigmas_at_every_size(
    name: str | None, last: float | None
) -> None:
    """With each setting that another size's sigmas follow from, and with none that they do not."""
    config = {
        "use_dynamic_shifting": True,
        "shift": 3.0,
        "num_train_timesteps": 1000,
        "use_beta_sigmas": False,
        "shift_terminal": None,
    }
    config |= dict.fromkeys(("use_karras_sigmas", "use_exponential_sigmas"), False)
    own = {} if name is None else {name: OWN[name]}
    kept = by_size({**config, **own}, last)
    assert kept == {"use_dynamic_shifting": True, **own, **({} if last is None else {"last_unshifted": last})}
    for tokens in (64, 3000):
        mu = linear_mu(kept, tokens)
        assert mu == linear_mu({**config, **own}, tokens)
        if last is None:
            assert scheduled(kept, 4, mu) == scheduled({**config, **own}, 4, mu)
    assert by_size({**OWN, "shift": 3.0}) is None is by_size({"shift": 3.0, "use_dynamic_shifting": False}, last)


def test_the_last_sigma_before_the_shift_may_be_given() -> None:
    assert sigmas(3, last=0.2) == pytest.approx((1.0, 0.6, 0.2)) and sigmas(1, last=0.2) == (1.0,)
    with pytest.raises(ValueError, match="shift is 0: accepted is more than 0"):
        sigmas(4, shift=0)

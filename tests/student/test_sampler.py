"""The denoise loop on velocity fields whose answer is known, and packing against diffusers' own."""

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline

from student.noise import noise
from student.sampler import denoise, pack, unpack
from student.schedule import sigmas

SHAPE = (16, 8, 8)


@pytest.mark.parametrize("nfe", [1, 4, 50])
def test_a_straight_flow_arrives_at_the_data(nfe: int) -> None:
    """With v = noise - data the path is a straight line, so Euler is exact whatever the sigmas."""
    start = noise([1, 2], SHAPE)
    data = noise([3, 4], SHAPE)
    end = denoise(lambda x, sigma: start - data, start, sigmas(nfe, shift=3.0))
    np.testing.assert_allclose(end, data, atol=1e-5)
    assert end.dtype == np.float32


def test_a_linear_field_multiplies_by_the_closed_form() -> None:
    """v = a x: each step multiplies by 1 + a (next - sigma); the last one goes to 0."""
    x = noise([5], SHAPE)
    end = denoise(lambda x, sigma: 0.5 * x, x, (1.0, 0.6, 0.3))
    np.testing.assert_allclose(end, x * (1 - 0.5 * 0.4) * (1 - 0.5 * 0.3) * (1 - 0.5 * 0.3), rtol=1e-5)


def test_the_field_is_asked_at_each_sigma() -> None:
    """v = sigma: the sum of sigma (next - sigma) is known."""
    x = np.zeros((1, 1, 2, 2), dtype=np.float32)
    end = denoise(lambda x, sigma: np.full_like(x, sigma), x, (1.0, 0.75, 0.5, 0.25))
    np.testing.assert_allclose(end, -(1.0 + 0.75 + 0.5 + 0.25) * 0.25)


def test_torch_and_numpy_take_the_same_path_and_torch_keeps_the_gradient() -> None:
    x = noise([6], SHAPE)
    x_torch = torch.from_numpy(x.copy()).requires_grad_()
    end = denoise(lambda x, sigma: x * sigma, x_torch, sigmas(4))
    np.testing.assert_allclose(end.detach().numpy(), denoise(lambda x, sigma: x * sigma, x, sigmas(4)), rtol=1e-6)
    end.sum().backward()
    factor = np.prod([1 - 0.25 * s for s in sigmas(4)])
    np.testing.assert_allclose(x_torch.grad.numpy(), np.full_like(x, factor), rtol=1e-6)


def test_equal_to_the_diffusers_scheduler_step_for_step() -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=1.0)
    scheduler.set_timesteps(sigmas=list(sigmas(5, shift=2.0)))
    x = torch.from_numpy(noise([8], SHAPE))
    states = []
    end = denoise(lambda x, sigma: torch.sin(x) * sigma, x, sigmas(5, shift=2.0), lambda i, s, x, v: states.append(x))
    for t, state in zip(scheduler.timesteps, states, strict=True):
        torch.testing.assert_close(state, x)
        x = scheduler.step(torch.sin(x) * (t / 1000), t, x, return_dict=False)[0]
    torch.testing.assert_close(end, x)


def test_the_callback_sees_each_state_with_the_velocity_that_leaves_it() -> None:
    start, data = noise([1], SHAPE), noise([2], SHAPE)
    seen: list[tuple[int, float]] = []

    def watch(i: int, sigma: float, x: np.ndarray, v: np.ndarray) -> None:
        seen.append((i, sigma))
        np.testing.assert_allclose(x - sigma * v, data, atol=1e-5)

    denoise(lambda x, sigma: start - data, start, sigmas(4), watch)
    assert seen == [(0, 1.0), (1, 0.75), (2, 0.5), (3, 0.25)]


def test_a_callback_can_end_the_loop() -> None:
    calls: list[int] = []

    def stop_at_two(i: int, sigma: float, x: np.ndarray, v: np.ndarray) -> None:
        calls.append(i)
        if i == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        denoise(lambda x, sigma: x, noise([1], SHAPE), sigmas(4), stop_at_two)
    assert calls == [0, 1]


@pytest.mark.parametrize("height, width", [(8, 8), (4, 6)])
def test_packing_is_that_of_the_flux_pipeline(height: int, width: int) -> None:
    x = noise([1, 2, 3], (16, height, width))
    theirs = FluxPipeline._pack_latents(torch.from_numpy(x), 3, 16, height, width)
    np.testing.assert_array_equal(pack(x), theirs.numpy())
    assert torch.equal(pack(torch.from_numpy(x)), theirs)
    assert torch.equal(unpack(theirs, height, width), FluxPipeline._unpack_latents(theirs, 8 * height, 8 * width, 8))
    np.testing.assert_array_equal(unpack(pack(x), height, width), x)

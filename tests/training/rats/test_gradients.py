"""The gradient modes against each other and against closed forms."""

import math
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor, nn

from student.schedule import sigmas
from training.rats.gradients import MODES, differentiate
from training.rats.trajectory import Trajectory, horizons

NOISE = torch.randn(3, 6, generator=torch.Generator().manual_seed(1), dtype=torch.double)


class Field(nn.Module):
    """A small velocity network; ``looks`` says whether it sees the state."""

    def __init__(self, looks: bool = True) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.looks = looks
        self.inner = nn.Sequential(nn.Linear(7, 16), nn.Tanh(), nn.Linear(16, 6)).double()

    def forward(self, x_BD: Tensor, sigma: float) -> Tensor:
        seen = x_BD if self.looks else torch.ones_like(x_BD)
        time = torch.full((len(x_BD), 1), sigma, dtype=x_BD.dtype)
        result: Tensor = self.inner(torch.cat([seen, time], 1))
        return result


def loss_of(path: Trajectory) -> Tensor:
    """Something curved that looks at every horizon, as shaping does, and at the end, as a reward does."""
    return torch.stack([path.data(s).sin().sum() for s in horizons(path.sigmas)]).sum() + path.x[-1].pow(3).mean()


def gradient(mode: str, field: Field, nfe: int, last_k: int = 1) -> tuple[float, list[Tensor]]:
    field.zero_grad()
    loss, backward = differentiate(mode, last_k, field, NOISE, sigmas(nfe), loss_of)
    backward()
    return loss.item(), [p.grad.clone() for p in field.parameters() if p.grad is not None]


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.allclose(x, y, rtol=1e-10, atol=1e-12) for x, y in zip(a, b, strict=True))


def test_all_modes_see_the_same_loss() -> None:
    field = Field()
    losses = [gradient(mode, field, 4, 2)[0] for mode in ("full", "last_k", "detached")]
    assert losses[0] == pytest.approx(losses[1], abs=1e-12) and losses[0] == pytest.approx(losses[2], abs=1e-12)


def test_one_step_is_the_same_in_every_mode() -> None:
    field = Field()
    full = gradient("full", field, 1)[1]
    assert same(full, gradient("detached", field, 1)[1]) and same(full, gradient("last_k", field, 1)[1])


class Line(nn.Module):
    """v = w x, of which everything is known in closed form."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor(-0.7, dtype=torch.double))

    def forward(self, x_BD: Tensor, sigma: float) -> Tensor:
        return self.w * x_BD


@pytest.mark.parametrize("bridge", [0.0, 0.1, 1.0])
def test_the_bridge_scales_what_a_step_does_to_the_later_ones(bridge: float) -> None:
    """x_{i+1} = (1 + d_i w) x_i: dL/dw = sum_i d_i x_i prod_{j > i} (1 + bridge d_j w) for L = sum x_K."""
    field, grid = Line(), (1.0, 0.8, 0.3, 0.1)
    lengths = [-0.2, -0.5, -0.2, -0.1]
    _, backward = differentiate("detached", 1, field, NOISE, grid, lambda path: path.x[-1].sum(), bridge=bridge)
    backward()
    x, w, expected = NOISE.sum().item(), field.w.item(), 0.0
    for i, d in enumerate(lengths):
        expected += d * x * math.prod(1 + bridge * later * w for later in lengths[i + 1 :])
        x *= 1 + d * w
    assert field.w.grad is not None and field.w.grad.item() == pytest.approx(expected, rel=1e-12)


def test_the_whole_bridge_is_the_full_gradient_one_step_at_a_time() -> None:
    field = Field()
    full, detached = gradient("full", field, 4)[1], gradient("detached", field, 4)[1]
    field.zero_grad()
    alive: list[bool] = []

    def watched(x_BD: Tensor, sigma: float) -> Tensor:
        alive.append(x_BD.requires_grad)
        return field(x_BD, sigma)

    _, backward = differentiate("detached", 1, watched, NOISE, sigmas(4), loss_of, bridge=1.0)
    backward()
    assert same(full, [p.grad for p in field.parameters() if p.grad is not None]) and not same(full, detached)
    assert len(alive) == 8, "each step is run once more and no oftener"


def test_detached_is_full_where_velocity_does_not_look_at_the_state() -> None:
    field = Field(looks=False)
    assert same(gradient("full", field, 4)[1], gradient("detached", field, 4)[1])


def test_detached_differs_from_full_where_it_does() -> None:
    field = Field()
    assert not same(gradient("full", field, 4)[1], gradient("detached", field, 4)[1])


def test_last_k_of_all_steps_is_full() -> None:
    field = Field()
    assert same(gradient("full", field, 4)[1], gradient("last_k", field, 4, 4)[1])
    assert not same(gradient("full", field, 4)[1], gradient("last_k", field, 4, 3)[1])


def test_last_k_is_the_full_gradient_of_a_rollout_that_starts_there() -> None:
    field = Field()
    grid = sigmas(4)
    with torch.no_grad():
        x = NOISE
        for i in range(2):
            x = x + (grid[i + 1] - grid[i]) * field(x, grid[i])
    field.zero_grad()
    total = torch.zeros((), dtype=torch.double)
    for i, sigma in ((2, 0.5), (3, 0.25)):
        v = field(x, sigma)
        total = total + (x - sigma * v).sin().sum()
        x = x + ((0.25 if i == 2 else 0.0) - sigma) * v
    (total + x.sin().sum() + x.pow(3).mean()).backward()
    expected = [p.grad.clone() for p in field.parameters() if p.grad is not None]
    assert same(expected, gradient("last_k", field, 4, 2)[1])


def test_low_variance_alone_is_the_last_step_and_with_more_noise_the_mean_of_repeated_ones() -> None:
    field, grid = Field(), sigmas(4)
    assert same(gradient("low_variance", field, 4)[1], gradient("last_k", field, 4, 1)[1])
    with torch.no_grad():
        x, starts = NOISE, []
        for sigma, after in zip(grid, (*grid[1:], 0.0), strict=True):
            starts.append(x)
            x = x + (after - sigma) * field(x, sigma)
    other = torch.randn(NOISE.shape, generator=torch.Generator().manual_seed(2), dtype=torch.double)
    again = (1 - grid[-1]) * x + grid[-1] * other
    field.zero_grad()
    (sum((start - grid[-1] * field(start, grid[-1])).pow(3).mean() for start in (starts[-1], again)) / 2).backward()
    expected = [p.grad.clone() for p in field.parameters() if p.grad is not None]
    field.zero_grad()
    _, backward = differentiate("low_variance", 1, field, NOISE, grid, lambda path: path.x[-1].pow(3).mean(), [other])
    backward()
    assert same(expected, [p.grad for p in field.parameters() if p.grad is not None])


def test_a_repeated_last_step_is_a_path_that_ends_in_it() -> None:
    """What a loss reads at the horizons is of the repeated step too; the steps before it are those that were taken."""
    field, grid, seen = Field(), sigmas(3), []
    other = torch.randn(NOISE.shape, generator=torch.Generator().manual_seed(2), dtype=torch.double)
    differentiate("low_variance", 1, field, NOISE, grid, lambda path: seen.append(path) or loss_of(path), [other])
    taken, again = seen
    x = (1 - grid[-1]) * taken.x[-1] + grid[-1] * other
    torch.testing.assert_close(again.state(grid[-1]), x)
    torch.testing.assert_close(again.data(grid[-1]), x - grid[-1] * field(x, grid[-1]))
    torch.testing.assert_close(again.x[-1], again.data(grid[-1]))
    for sigma in grid[:-1]:
        assert torch.equal(again.state(sigma), taken.state(sigma)) and torch.equal(again.data(sigma), taken.data(sigma))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("bridge", [0.0, 0.5])
def test_a_rollouts_last_backward_call_is_said_to_be_the_last(mode: str, bridge: float) -> None:
    """That is where the processes average a sharded run's gradients: once, when all of them are there."""
    said: list[bool] = []

    @contextmanager
    def around(last: bool) -> Iterator[None]:
        said.append(last)
        yield

    _, backward = differentiate(mode, 1, Field(), NOISE, sigmas(3), loss_of, bridge=bridge, around=around)
    backward()
    assert said == ([False, False, True] if mode == "detached" else [True])


def test_full_against_finite_differences() -> None:
    field = Field()
    grads = gradient("full", field, 4)[1]
    weight = next(field.parameters())
    weight.data[0, 0] += 1e-6
    above = gradient("full", field, 4)[0]
    weight.data[0, 0] -= 2e-6
    below = gradient("full", field, 4)[0]
    assert (above - below) / 2e-6 == pytest.approx(grads[0][0, 0].item(), rel=1e-5)


def test_unknown_mode_and_unusable_k_are_refused() -> None:
    with pytest.raises(ValueError, match="accepted are full, last_k, detached, low_variance"):
        differentiate("half", 1, Field(), NOISE, sigmas(4), loss_of)
    with pytest.raises(ValueError, match="last_k is 5: accepted is 1 to 4"):
        differentiate("last_k", 5, Field(), NOISE, sigmas(4), loss_of)


@pytest.mark.parametrize("mode", ["detached", "low_variance"])
def test_calls_without_gradient_are_one_rollout_and_those_with_it_are_outside_of_it(mode: str) -> None:
    """So that slices of a sharded network come together once for all of them."""
    field, inside, seen = Field(), [False], []

    @contextmanager
    def rollouts() -> Iterator[None]:
        seen.append("begins")
        inside[0] = True
        yield
        inside[0] = False

    def velocity(x_BD: Tensor, sigma: float) -> Tensor:
        seen.append((torch.is_grad_enabled(), inside[0]))
        return field(x_BD, sigma)

    more = [NOISE.flip(0)] if mode == "low_variance" else []
    _, backward = differentiate(mode, 1, velocity, NOISE, sigmas(3), loss_of, more, rollouts=rollouts)
    backward()
    later = 3 if mode == "detached" else 2
    assert seen == ["begins", *[(False, True)] * 3, *[(True, False)] * later]

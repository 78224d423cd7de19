"""Euler trajectories in sigma, and their exact states between grid points.

Shape suffixes: B batch, D everything else of a latent. Sigma 1 is noise, 0 is data.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from student.sampler import denoise


@dataclass(frozen=True)
class Trajectory:
    """States of one rollout: ``x[i]`` at ``sigmas[i]``, ``v[i]`` the velocity that leaves it.

    ``x`` has one state more than ``v``: the last, at sigma 0, which no velocity leaves.
    """

    sigmas: tuple[float, ...]
    x: tuple[Tensor, ...]
    v: tuple[Tensor, ...]

    def take(self, rows: slice) -> Trajectory:
        """The same for some of the samples."""
        return Trajectory(self.sigmas, tuple(x[rows] for x in self.x), tuple(v[rows] for v in self.v))

    def thinned(self, points: Sequence[float]) -> Trajectory:
        """The same with only the steps that are read at ``points``: a long rollout takes much memory."""
        kept = sorted({0, *(i for point in points if (i := self._leaving(point)) is not None)})
        states = (*(self.x[i] for i in kept), self.x[-1])
        return Trajectory(tuple(self.sigmas[i] for i in kept), states, tuple(self.v[i] for i in kept))

    def state(self, sigma: float) -> Tensor:
        """x(sigma) on the Euler path, which is linear in sigma between grid points: x_i + (sigma - s_i) v_i."""
        i = self._leaving(sigma)
        return self.x[-1] if i is None else self.x[i] + (sigma - self.sigmas[i]) * self.v[i]

    def data(self, sigma: float) -> Tensor:
        """The data that the path predicts at sigma: x(sigma) - sigma v_i; at sigma 0 the end state itself."""
        i = self._leaving(sigma)
        return self.x[-1] if i is None else self.state(sigma) - sigma * self.v[i]

    def velocity(self, sigma: float) -> Tensor:
        """The velocity at a sigma above 0: that of the step that leaves it or passes through it."""
        i = self._leaving(sigma)
        if i is None:
            raise ValueError("no velocity leaves sigma 0")
        return self.v[i]

    def _leaving(self, sigma: float) -> int | None:
        """The step that leaves ``sigma`` or passes through it; None at sigma 0."""
        if not 0 <= sigma <= self.sigmas[0]:
            raise ValueError(f"sigma is {sigma}: accepted is 0 to {self.sigmas[0]}")
        if sigma == 0:
            return None
        return max(i for i, s in enumerate(self.sigmas) if s >= sigma)


def rollout(velocity: Callable[[Tensor, float], Tensor], noise_BD: Tensor, sigmas: Sequence[float]) -> Trajectory:
    """Sample from noise with the one denoise loop, keeping every state and velocity."""
    states: list[Tensor] = []
    velocities: list[Tensor] = []

    def keep(_: int, __: float, x: Tensor, v: Tensor) -> None:
        states.append(x)
        velocities.append(v)

    end = denoise(velocity, noise_BD, sigmas, keep)
    return Trajectory(tuple(sigmas), (*states, end), tuple(velocities))


def horizons(student_sigmas: Sequence[float]) -> tuple[float, ...]:
    """Where student and teacher are compared: the student's sigmas below 1, and 0.

    At sigma 1 both states are the same noise, which carries no signal. (The paper does not
    publish its horizons: this choice is ours.)
    """
    return (*[sigma for sigma in student_sigmas if sigma < 1], 0.0)


def named_horizons(name: str, student_sigmas: Sequence[float]) -> tuple[float, ...]:
    """``"student"``: the student's own; ``"end"``: the last state alone; ``"0.8,0.4,0"``: these sigmas.

    Raises:
        ValueError: something else, or a sigma outside 0 to 1 (1 itself is the shared noise).
    """
    if name == "student":
        return horizons(student_sigmas)
    if name == "end":
        return (0.0,)
    try:
        points = tuple(float(part) for part in name.split(","))
    except ValueError:
        points = ()
    if not points or not all(0 <= point < 1 for point in points):
        raise ValueError(
            f"horizons is {name!r}: accepted are student, end, or sigmas of 0 to below 1 such as 0.8,0.4,0"
        )
    return points

"""How the loss on a student's trajectory reaches the student's network.

``full``      through all K steps.
``last_k``    through the last k steps; the steps before them are constants (DRaFT-K).
``detached``  every step is differentiated at its own detached state: the rollout runs without gradient, dL/dv is
              taken once for all velocities along the (linear) Euler path, then one step at a time is run again and
              differentiated. The memory of one step. It leaves out only what a step does to the later steps' inputs,
              so for one step, or for a velocity that does not depend on x, it equals ``full``. ``bridge`` lets that
              share of it in (FlowBP-Bridge, arXiv 2606.11075): 0 leaves it out, 1 is ``full`` in the memory of one
              step, since every step's states are kept and the steps are run again from the last to the first.
``low_variance``  the last step alone, averaged over the step that was taken and one or more repetitions: the result is
              noised again and the step repeated (DRaFT-LV, arXiv 2309.17400, section 4.2).

Shape suffixes as in trajectory.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from student.sampler import denoise
from training.rats.trajectory import Trajectory, rollout

MODES = ("full", "last_k", "detached", "low_variance")
Velocity = Callable[[Tensor, float], Tensor]
LossOf = Callable[[Trajectory], Tensor]
Around = Callable[[bool], AbstractContextManager[object]]
Rollouts = Callable[[], AbstractContextManager[object]]


def differentiate(
    mode: str,
    last_k: int,
    velocity: Velocity,
    noise_BD: Tensor,
    sigmas: Sequence[float],
    loss_of: LossOf,
    more_noise: Sequence[Tensor] = (),
    bridge: float = 0.0,
    around: Around = nullcontext,
    rollouts: Rollouts = nullcontext,
) -> tuple[Tensor, Callable[[], None]]:
    """The loss of one rollout, and a function that adds its gradient to the network's parameters.

    The two are separate so that a loss that is not finite can be skipped. ``more_noise`` is what ``low_variance``
    noises the drawn end with, one repetition of the last step for each; ``bridge`` is for ``detached``. Every
    backward call happens inside ``around(last)``, which is told whether it is the rollout's last one; calls without
    gradient that follow each other happen inside ``rollouts()``.

    Raises:
        ValueError: ``mode`` is not one of MODES, or ``last_k`` is not 1 to K.
    """
    if mode == "detached":
        return _detached(velocity, noise_BD, sigmas, loss_of, bridge, around, rollouts)
    if mode == "low_variance":
        return _at_once(_low_variance(velocity, noise_BD, sigmas, loss_of, more_noise, rollouts), around)
    if mode not in MODES:
        raise ValueError(f"gradient mode {mode!r}: accepted are {', '.join(MODES)}")
    if mode == "last_k" and not 1 <= last_k <= len(sigmas):
        raise ValueError(f"last_k is {last_k}: accepted is 1 to {len(sigmas)}, the number of steps")
    first = sigmas[-last_k] if mode == "last_k" else sigmas[0]
    return _at_once(loss_of(rollout(_from(velocity, first), noise_BD, sigmas)), around)


def _at_once(loss: Tensor, around: Around) -> tuple[Tensor, Callable[[], None]]:
    def backward() -> None:
        with around(True):
            loss.backward()

    return loss, backward


def _from(velocity: Velocity, first_sigma: float) -> Velocity:
    """``velocity`` with gradient from ``first_sigma`` on, and as a constant before it."""

    def cut(x_BD: Tensor, sigma: float) -> Tensor:
        with torch.set_grad_enabled(sigma <= first_sigma):
            return velocity(x_BD, sigma)

    return cut


def _low_variance(
    velocity: Velocity,
    noise_BD: Tensor,
    sigmas: Sequence[float],
    loss_of: LossOf,
    more_noise: Sequence[Tensor],
    rollouts: Rollouts,
) -> Tensor:
    with torch.no_grad(), rollouts():
        path = rollout(velocity, noise_BD, sigmas)
    sigma = sigmas[-1]
    losses = []
    for x_BD in (path.x[-2], *(torch.lerp(path.x[-1], other_BD, sigma) for other_BD in more_noise)):
        v_BD = velocity(x_BD, sigma)
        losses.append(loss_of(Trajectory(path.sigmas, (*path.x[:-2], x_BD, x_BD - sigma * v_BD), (*path.v[:-1], v_BD))))
    return torch.stack(losses).mean()


def _detached(
    velocity: Velocity,
    noise_BD: Tensor,
    sigmas: Sequence[float],
    loss_of: LossOf,
    bridge: float,
    around: Around,
    rollouts: Rollouts,
) -> tuple[Tensor, Callable[[], None]]:
    with torch.no_grad(), rollouts():
        path = rollout(velocity, noise_BD, sigmas)
    leaves = tuple(v_BD.detach().requires_grad_() for v_BD in path.v)
    steps = iter(leaves)
    states: list[Tensor] = []
    end = denoise(lambda *_: next(steps), noise_BD, sigmas, lambda _, __, x_BD, ___: states.append(x_BD))
    loss = loss_of(Trajectory(tuple(sigmas), (*states, end), leaves))

    def backward() -> None:
        slopes = list(torch.autograd.grad(loss, leaves))
        lengths = [after - sigma for sigma, after in zip(sigmas, (*sigmas[1:], 0.0), strict=True)]
        for i in reversed(range(len(sigmas))):
            x_BD = path.x[i].detach().requires_grad_(bridge > 0 and i > 0)
            v_BD = velocity(x_BD, sigmas[i])
            with around(i == 0):
                v_BD.backward(slopes[i])
            if (carried := x_BD.grad) is not None:  # every earlier step moved this step's input
                slopes = [
                    s + bridge * d * carried if j < i else s
                    for j, (s, d) in enumerate(zip(slopes, lengths, strict=True))
                ]

    return loss, backward

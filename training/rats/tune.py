"""Tuning a model that draws in few steps already, without a slower teacher and without losing its few steps.

The model's own moving average draws, at the student's own sigmas; at one of its steps the clean picture that it
predicts is moved a bounded way along the reward's gradient, and the student's prediction from the very same state is
fitted to that (after DiffusionOPSD, arXiv 2608.24646). No gradient passes through the rollout, and where the average
goes the student follows it by no more than the bound: it stays a few-step model. (With a target on each side, and the
student's mirror image fitted to the worse one, the loss is the same.) A reward without a gradient leads by several
ends of one sample, drawn from noise that differs a little, each weighted by its signed advantage (after Self-OPD,
arXiv 2608.26872, and REST, arXiv 2608.09226). With ``tune.gate`` each sample is fitted as strongly as RATS's gate says,
with the target in the teacher's place: fully where its reward is far ahead of that of the student's own prediction,
and hardly where a step along the slope went too far.

Legend: N branches, B images, D everything else of a latent.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from student.families.family import sent
from training.rats.config import RatsConfig
from training.rats.gate import Gate
from training.rats.method import (
    Batch,
    Grids,
    RewardFn,
    Step,
    autocast,
    reward_of_latents,
    teach_jointly,
    whole_backward,
)
from training.rats.roles import Roles
from training.rats.trajectory import Trajectory, rollout
from training.sampler import Sampler, velocity_of


def bounded_target(data_BD: Tensor, slope_BD: Tensor, radius: float) -> Tensor:
    """``data`` moved along ``slope`` by ``radius`` times its own norm, sample by sample; without a slope it stays."""
    length_B = radius * data_BD.flatten(1).norm(dim=1)
    norm_B = slope_BD.flatten(1).norm(dim=1)
    scale_B = torch.where(norm_B > 0, length_B / norm_B.clamp(min=torch.finfo(norm_B.dtype).tiny), 0)
    return data_BD + scale_B.view(-1, *[1] * (data_BD.ndim - 1)) * slope_BD


def branched(
    x_BD: Tensor, v_BD: Tensor, sigma: float, num: int, angle: float, generator: torch.Generator
) -> list[Tensor]:
    """States like ``x`` at ``sigma``, with its data and with its noise turned by ``angle`` (radians) to fresh noise."""
    data_BD, noise_BD = x_BD - sigma * v_BD, x_BD + (1 - sigma) * v_BD
    fresh = [sent(torch.randn(x_BD.shape, generator=generator), x_BD.device) for _ in range(num)]
    turned = [math.cos(angle) * noise_BD + math.sin(angle) * more_BD for more_BD in fresh]
    return [(1 - sigma) * data_BD + sigma * one_BD for one_BD in turned]


def signed_direction(ends_NBD: Tensor, reward_NB: Tensor) -> Tensor:
    """The branches' ends by their signed advantages, (B, D): towards the better ones, and away from the worse.

    An advantage is how far a reward is above its sample's mean, in its deviations among the branches. For a reward that
    is linear in the ends the direction is their covariance times its gradient, over the reward's deviation; for one
    that cannot tell them apart it is zero.
    """
    above_NB, std_B = reward_NB - reward_NB.mean(0), reward_NB.std(0, correction=0)
    advantage_NB = torch.where(std_B > 0, above_NB / std_B.clamp(min=torch.finfo(std_B.dtype).tiny), 0)
    return (advantage_NB.view(*advantage_NB.shape, *[1] * (ends_NBD.ndim - 2)) * ends_NBD).mean(0)


class Tune:
    """The method; ``reward`` is standardised."""

    def __init__(self, config: RatsConfig, roles: Roles, reward: RewardFn, grids: Grids) -> None:
        self.config, self.roles, self._reward_of, self.grids = config, roles, reward, grids
        self.gate = Gate(config)

    def follows(self, step: int) -> bool:
        """Always: the average is what draws."""
        return True

    def teach(self, batches: Sequence[Batch]) -> list[Batch]:
        """With the average's rollout at the student's own sigmas."""
        return teach_jointly(batches, self.config.teacher.batch, self._drawn)

    def _drawn(self, batch: Batch) -> Batch:
        with self.roles.role("teacher") as average:
            sampler = Sampler(average, self.grids[batch.nfe], precision=self.config.compute.precision)
            return replace(batch, teacher=sampler.trajectory(batch.noise_BCHW, batch.prompts))

    def step(self, batch: Batch) -> Step:
        """One of the rollout's steps, drawn at random for the micro-batch."""
        model, path = self.roles.model, batch.teacher
        assert path is not None
        place = int(torch.randint(batch.nfe, (), generator=batch.generator(self.config.seed * 13_000_027)))
        sigma = path.sigmas[place]
        data_BD = path.x[place] - sigma * path.v[place]
        with autocast(self.config, self.roles):
            reward_B, slope_BD = (self._branched if self.config.tune.branches else self._slope)(path, place, batch)
            target_BD = bounded_target(data_BD, slope_BD, self.config.tune.radius)
            velocity = velocity_of(model, model.encode(batch.prompts))
            found_BD = path.x[place] - sigma * velocity(path.x[place], sigma)
            bound_B = self.config.tune.radius * data_BD.flatten(1).norm(dim=1).clamp(min=1e-6)
            loss_B = ((found_BD - target_BD).flatten(1).norm(dim=1) / bound_B).square()
            gate_B, figures = self._gated(found_BD, target_BD, batch) if self.config.tune.gate else (1.0, {})
            loss = (gate_B * loss_B).mean()
        log = {"loss": loss.detach(), "reward_student": reward_B.mean(), "sigma": sigma, **figures}
        return Step(loss, whole_backward(self.config, self.roles, loss), log)

    @torch.no_grad()
    def _gated(self, found_BD: Tensor, target_BD: Tensor, batch: Batch) -> tuple[Tensor, dict[str, Tensor | float]]:
        """The weight of each sample, and what is logged of it."""
        reward_T, reward_S = (
            reward_of_latents(self.config, self.roles.model, self._reward_of, data_BD.detach(), batch)
            for data_BD in (target_BD, found_BD)
        )
        gate_B = self.gate.weights(reward_T, reward_S, batch)
        return gate_B, {"reward_target": reward_T.mean(), **self.gate.figures(reward_T, reward_S, gate_B)}

    def _slope(self, path: Trajectory, place: int, batch: Batch) -> tuple[Tensor, Tensor]:
        """The reward of a predicted picture, and its gradient on the latents."""
        with torch.enable_grad():
            leaf_BD = (path.x[place] - path.sigmas[place] * path.v[place]).detach().requires_grad_()
            reward_B = reward_of_latents(self.config, self.roles.model, self._reward_of, leaf_BD, batch)
            (slope_BD,) = torch.autograd.grad(reward_B.clamp(max=self.config.reward.hinge).sum(), leaf_BD)
        return reward_B.detach(), slope_BD

    def _branched(self, path: Trajectory, place: int, batch: Batch) -> tuple[Tensor, Tensor]:
        """The mean reward of what the average makes of other noise from here on, and where the better of it lies."""
        config, sigmas = self.config, path.sigmas[place:]
        generator = batch.generator(config.seed * 17_000_023)
        tune = config.tune
        starts = branched(path.x[place], path.v[place], sigmas[0], tune.branches, tune.angle, generator)
        with self.roles.role("teacher") as average:
            velocity = Sampler(average, sigmas).velocity(batch.prompts)
            ends = [rollout(velocity, start_BD, sigmas).x[-1] for start_BD in starts]
            rewards = [reward_of_latents(config, average, self._reward_of, end_BD, batch) for end_BD in ends]
        reward_NB = torch.stack(rewards).clamp(max=config.reward.hinge)
        return reward_NB.mean(0), signed_direction(torch.stack(ends), reward_NB)

    def after_step(self, means: Mapping[str, float]) -> None:
        """Update the gate's unit."""
        self.gate.after_step(means)

    def after_validation(self, diversity: float, teacher_diversity: float) -> None:
        """Nothing is kept."""

    def state(self) -> dict[str, Any]:
        """See Method."""
        return {"gap_std": self.gate.gap_std}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """See Method."""
        self.gate.gap_std = state.get("gap_std")

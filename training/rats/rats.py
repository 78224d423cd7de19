"""RATS (arXiv 2604.14910): the student's reward, and shaping towards the teacher where the teacher is better.

For a prompt and one noise shared by both: L = mean over samples of -R_S + alpha (gate((R_T - R_S) / tau) shaping).

Legend: B images, C channels, H/W latent cells or pixels; suffixes S student, T teacher.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from student.families.family import sent
from training.rats.config import RatsConfig
from training.rats.gate import Gate
from training.rats.gradients import differentiate
from training.rats.loss import reward_loss, shaping, steered, velocity_excess
from training.rats.method import (
    Batch,
    Grids,
    RewardFn,
    Step,
    autocast,
    reward_of_latents,
    teach_jointly,
    teacher_path,
    with_autocast,
)
from training.rats.roles import Roles
from training.rats.trajectory import Trajectory, named_horizons
from training.sampler import velocity_of


class Rats:
    """The method; ``grids`` are the sigmas of each step count, ``reward`` is standardised.

    ``second`` is the standardised held-out reward, for the gate that compares the two.
    """

    def __init__(
        self, config: RatsConfig, roles: Roles, reward: RewardFn, grids: Grids, second: RewardFn | None = None
    ) -> None:
        self._second_of = second
        self.config, self.roles, self._reward_of, self.grids = config, roles, reward, grids
        self.alpha = config.shaping.alpha
        self.gate = Gate(config)

    def follows(self, step: int) -> bool:
        """Not while the teacher is the guided start: the next phase begins from the student as it is then."""
        return step >= self.config.teacher.guided_steps

    def teach(self, batches: Sequence[Batch]) -> list[Batch]:
        """Add the teacher's trajectory from the same noise and its reward; unchanged where nothing is shaped."""
        if self.config.shaping.alpha == 0:
            return list(batches)
        return teach_jointly(batches, self.config.teacher.batch, self._taught)

    def _taught(self, batch: Batch) -> Batch:
        with autocast(self.config, self.roles), torch.no_grad():
            path = teacher_path(self.config, self.roles, self.grids, batch)
            reward_T = self._reward(path.x[-1], batch)
        grid = self.grids[batch.nfe]  # where the loss reads the teacher: at the horizons, and the hinge at the steps
        read = (*named_horizons(self.config.shaping.horizons, grid), *grid)
        return replace(batch, teacher=path.thinned(read), reward_T=reward_T)

    def step(self, batch: Batch) -> Step:
        """Rollout, reward, gate and shaping of one micro-batch."""
        config, model = self.config, self.roles.model
        log: dict[str, Tensor | float] = {}

        def loss_of(student: Trajectory) -> Tensor:
            reward_S = self._reward(student.x[-1], batch)
            log["reward_student"] = reward_S.detach().mean()
            loss_B = config.reward.weight * reward_loss(reward_S, config.reward.hinge)
            if batch.teacher is not None:
                loss_B = loss_B + self._regulariser(student, batch, reward_S.detach(), log)
            return loss_B.mean()

        with autocast(config, self.roles):
            velocity = velocity_of(model, model.encode(batch.prompts))
            loss, backward = differentiate(
                config.gradient.mode,
                config.gradient.last_k,
                velocity,
                batch.noise_BCHW,
                self.grids[batch.nfe],
                loss_of,
                self._more_noise(batch),
                config.gradient.bridge,
                self.roles.backward,
                self.roles.rollouts,
            )
        return Step(loss, with_autocast(config, self.roles, backward), {**log, "loss": loss.detach()})

    def after_step(self, means: Mapping[str, float]) -> None:
        """Update the running standard deviation of the gap."""
        self.gate.after_step(means)

    def after_validation(self, diversity: float, teacher_diversity: float) -> None:
        """Adjust alpha, where the configuration steers it by diversity."""
        if self.config.shaping.steer:
            self.alpha = steered(self.alpha, diversity, self.config.shaping.steer * teacher_diversity)

    def state(self) -> dict[str, Any]:
        """See Method."""
        return {"gap_std": self.gate.gap_std, "alpha": self.alpha}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """See Method."""
        self.gate.gap_std, self.alpha = state["gap_std"], state["alpha"]

    def _regulariser(
        self, student: Trajectory, batch: Batch, reward_S: Tensor, log: dict[str, Tensor | float]
    ) -> Tensor:
        """alpha (gate x shaping + the velocity hinge), for each sample."""
        config, teacher, reward_T = self.config.shaping, batch.teacher, batch.reward_T
        assert teacher is not None and reward_T is not None
        points = named_horizons(config.horizons, student.sigmas)
        shaping_B = shaping(student, teacher, points, config.l2_weight, config.cosine_weight)
        gate_B = self.gate.weights(reward_T, reward_S, batch, self._second(student.x[-1], batch))
        log |= {
            "reward_teacher": reward_T.mean(),
            **self.gate.figures(reward_T, reward_S, gate_B),
            "shaping": shaping_B.detach().mean(),
            "alpha": self.alpha,
        }
        return self.alpha * (gate_B * shaping_B + velocity_excess(student, teacher, config.velocity_hinge))

    def _reward(self, x_BCHW: Tensor, batch: Batch) -> Tensor:
        """The standardised reward of latents (B,), with gradient where one is wanted."""
        return reward_of_latents(self.config, self.roles.model, self._reward_of, x_BCHW, batch)

    @torch.no_grad()
    def _second(self, x_BCHW: Tensor, batch: Batch) -> Tensor | None:
        """The held-out reward of the same latents, where the gate reads it."""
        if self._second_of is None:
            return None
        return reward_of_latents(self.config, self.roles.model, self._second_of, x_BCHW, batch)

    def _more_noise(self, batch: Batch) -> list[Tensor]:
        """For the low-variance gradient, which repeats the last step once."""
        if self.config.gradient.mode != "low_variance":
            return []
        gen = batch.generator(self.config.seed * 11_000_027)
        return [sent(torch.randn(batch.noise_BCHW.shape, generator=gen), batch.noise_BCHW.device)]

"""The methods that RATS is compared with: consistency distillation and distribution matching. They use no reward.

Shape suffixes as in trajectory.py.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from student.families.family import sent
from training.processes import Processes
from training.rats.config import RatsConfig
from training.rats.method import Batch, Grids, RewardFn, Step, autocast, teach_jointly, teacher_path, whole_backward
from training.rats.roles import Roles
from training.rats.trajectory import Trajectory, rollout
from training.sampler import Sampler, Velocity, velocity_of

CRITIC_STEPS = 5  # DMD2's two time scales: the critic must keep up with the student


def next_point(sigma: float, teacher: Sequence[float], student: Sequence[float]) -> tuple[float, float]:
    """(the teacher's next sigma, the end of the student's segment), the first no lower than the second."""
    end = max([s for s in student if s < sigma], default=0.0)
    after = max([s for s in teacher if s < sigma], default=0.0)
    return max(after, end), end


class Consistency:
    """Phased consistency distillation (arXiv 2405.18407), after LCM (arXiv 2310.04378).

    The student's sigmas divide time into segments. Within a segment, a jump to its end from any point of the teacher's
    trajectory must lead to the same place as a jump from the next point (with the EMA's weights). No data is needed:
    the points are on the teacher's own trajectories. The loss is the mean squared difference of the two, in latents.
    """

    def __init__(self, config: RatsConfig, roles: Roles, reward: RewardFn, grids: Grids) -> None:
        self.config, self.roles, self.grids = config, roles, grids

    def follows(self, step: int) -> bool:
        """Always: the EMA is the target."""
        return True

    def teach(self, batches: Sequence[Batch]) -> list[Batch]:
        """Add the teacher's trajectory from the same noise."""
        with autocast(self.config, self.roles):
            return teach_jointly(batches, self.config.teacher.batch, self._taught)

    def _taught(self, batch: Batch) -> Batch:
        return replace(batch, teacher=teacher_path(self.config, self.roles, self.grids, batch))

    def step(self, batch: Batch) -> Step:
        """One random point of the trajectory for the whole micro-batch."""
        model, path = self.roles.model, batch.teacher
        assert path is not None
        gen = batch.generator(self.config.seed * 7_000_003)
        sigma = path.sigmas[int(torch.randint(len(path.sigmas), (), generator=gen))]
        after, end = next_point(sigma, path.sigmas, self.grids[batch.nfe])
        with autocast(self.config, self.roles):
            target_BD = self._target(path, after, end, batch.prompts)
            x_BD = path.state(sigma)
            jump_BD = x_BD + (end - sigma) * velocity_of(model, model.encode(batch.prompts))(x_BD, sigma)
            loss = (jump_BD - target_BD).square().mean()
        return Step(loss, whole_backward(self.config, self.roles, loss), {"loss": loss.detach(), "sigma": sigma})

    def _target(self, path: Trajectory, after: float, end: float, prompts: Sequence[str]) -> Tensor:
        """Where the EMA jumps to from the next point; at the segment's end it stays."""
        x_BD = path.state(after)
        if after == end:
            return x_BD
        with self.roles.role("teacher") as ema:
            return x_BD + (end - after) * velocity_of(ema, ema.encode(prompts))(x_BD, after)

    def after_step(self, means: Mapping[str, float]) -> None:
        """Nothing is kept."""

    def after_validation(self, diversity: float, teacher_diversity: float) -> None:
        """Nothing is kept."""

    def state(self) -> dict[str, Any]:
        """Nothing is kept."""
        return {}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Nothing is kept."""


def direction(x0_BD: Tensor, real_BD: Tensor, fake_BD: Tensor) -> Tensor:
    """DMD's gradient for each sample: (fake - real) over the mean distance of the sample to ``real`` (equation 8)."""
    scale_B = (x0_BD - real_BD).abs().flatten(1).mean(1).clamp(min=1e-6)
    return (fake_BD - real_BD) / scale_B.view(-1, *[1] * (x0_BD.ndim - 1))


def data_of(velocity: Velocity, x_BD: Tensor, sigma: float) -> Tensor:
    """The data that a velocity field predicts at ``sigma``."""
    return x_BD - sigma * velocity(x_BD, sigma)


class Matching:
    """Distribution matching distillation, in DMD2's form (arXiv 2405.14867) without its discriminator.

    A critic is trained beside the student on the student's own samples (flow matching). The student moves its samples
    from what the critic predicts for them towards what the guided start predicts. Its loss is a surrogate whose
    gradient is ``direction``.
    """

    def __init__(self, config: RatsConfig, roles: Roles, reward: RewardFn, grids: Grids) -> None:
        self.config, self.roles, self.grids = config, roles, grids
        self._critic = copy.deepcopy(roles.model.transformer).requires_grad_(True)
        self._optimizer = torch.optim.AdamW(
            self._critic.parameters(), config.optim.lr, betas=(0.9, 0.99), weight_decay=0.0
        )

    def follows(self, step: int) -> bool:
        """Never: the method uses no EMA."""
        return False

    def teach(self, batches: Sequence[Batch]) -> list[Batch]:
        """Unchanged: the teacher is evaluated at the student's own points."""
        return list(batches)

    def step(self, batch: Batch) -> Step:
        """Roll the student out to one of its steps at random; only that step has a gradient. Train the critic too."""
        model, grid, prompts = self.roles.model, self.grids[batch.nfe], batch.prompts
        gen = batch.generator(self.config.seed * 9_000_011)
        last = int(torch.randint(batch.nfe, (), generator=gen))
        with autocast(self.config, self.roles):
            velocity = velocity_of(model, model.encode(prompts))
            with torch.no_grad():
                x_BD = rollout(velocity, batch.noise_BCHW, grid).x[last]
            x0_BD = data_of(velocity, x_BD, grid[last])
            critic_loss = self._teach_critic(x0_BD.detach(), prompts, gen)
            gradient_BD = self._direction(x0_BD.detach(), prompts, gen)
            loss = 0.5 * (x0_BD - (x0_BD.detach() - gradient_BD)).square().mean()
        backward = whole_backward(self.config, self.roles, loss)
        return Step(loss, backward, {"loss": loss.detach(), "critic_loss": critic_loss})

    @torch.no_grad()
    def _direction(self, x0_BD: Tensor, prompts: Sequence[str], gen: torch.Generator) -> Tensor:
        sigma, _, noisy_BD = _noisy(x0_BD, gen)
        teacher = self.config.teacher
        with self.roles.role("start") as start:
            guided = Sampler(start, (), teacher.guidance, teacher.negative_prompt).velocity(prompts)
            real_BD = data_of(guided, noisy_BD, sigma)
        with self.roles.using(self._critic) as critic:
            fake_BD = data_of(velocity_of(critic, critic.encode(prompts)), noisy_BD, sigma)
        return direction(x0_BD, real_BD, fake_BD)

    def _teach_critic(self, x0_BD: Tensor, prompts: Sequence[str], gen: torch.Generator) -> float:
        """Flow matching on the student's samples; returns the mean loss."""
        total, processes = 0.0, Processes()
        with self.roles.using(self._critic) as critic:
            velocity = velocity_of(critic, critic.encode(prompts))
            for _ in range(CRITIC_STEPS):
                sigma, noise_BD, noisy_BD = _noisy(x0_BD, gen)
                loss = (velocity(noisy_BD, sigma) - (noise_BD - x0_BD)).square().mean()
                total += loss.item() / CRITIC_STEPS
                if not processes.agree(bool(torch.isfinite(loss))):
                    continue  # the student's loss is not finite either then, and its step is skipped
                self._optimizer.zero_grad()
                loss.backward()
                processes.mean_gradients(list(self._critic.parameters()), 1)  # one critic for all processes
                gradients = [p.grad for p in self._critic.parameters() if p.grad is not None]
                if torch.isfinite(torch.nn.utils.get_total_norm(gradients)):
                    self._optimizer.step()
        return total

    def after_step(self, means: Mapping[str, float]) -> None:
        """Nothing is kept."""

    def after_validation(self, diversity: float, teacher_diversity: float) -> None:
        """Nothing is kept."""

    def state(self) -> dict[str, Any]:
        """The critic and its optimizer."""
        return {"critic": self._critic.state_dict(), "critic_optimizer": self._optimizer.state_dict()}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Restore what ``state`` returned."""
        self._critic.load_state_dict(state["critic"])
        self._optimizer.load_state_dict(state["critic_optimizer"])


def _noisy(x0_BD: Tensor, gen: torch.Generator) -> tuple[float, Tensor, Tensor]:
    """A random time (away from both ends), noise, and the samples at that time."""
    sigma = 0.02 + 0.96 * float(torch.rand((), generator=gen))
    noise_BD = sent(torch.randn(x0_BD.shape, generator=gen), x0_BD.device)
    return sigma, noise_BD, torch.lerp(x0_BD, noise_BD, sigma)

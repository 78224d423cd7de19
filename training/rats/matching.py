"""Distribution matching distillation, in DMD2's form (arXiv 2405.14867) without its discriminator.

A critic of the student's own pictures is trained beside it (flow matching on what the student draws); the student moves
from where the critic sees its pictures to where the guided start sees them. Suffixes as in trajectory.py.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from training.drawing import Painter, Velocity, velocity_of
from training.processes import Processes
from training.rats.networks import Networks
from training.rats.objective import MICRO, Grids, Objective, RewardFn
from training.rats.preset import RatsConfig
from training.rats.trajectory import rollout

CRITIC_STEPS = 5  # DMD2's two time scales: the critic must keep up with the student


def direction(x0_BD: Tensor, real_BD: Tensor, fake_BD: Tensor) -> Tensor:
    """DMD's gradient for each sample: (fake - real) over the mean distance of the sample to ``real`` (equation 8)."""
    scale_B = (x0_BD - real_BD).abs().flatten(1).mean(1).clamp(min=1e-6)
    return (fake_BD - real_BD) / scale_B.view(-1, *[1] * (x0_BD.ndim - 1))


def data_of(velocity: Velocity, x_BD: Tensor, sigma: float) -> Tensor:
    """The data that a field predicts at ``sigma``."""
    return x_BD - sigma * velocity(x_BD, sigma)


class Matching(Objective):
    """The student's loss is a surrogate whose gradient is ``direction``; the critic learns in ``losses`` too."""

    def __init__(self, config: RatsConfig, networks: Networks, reward: RewardFn, grids: Grids) -> None:
        super().__init__(config, networks, reward, grids)
        self._critic = copy.deepcopy(networks.model.transformer).requires_grad_(True)
        self._optimizer = torch.optim.AdamW(self._critic.parameters(), config.lr, betas=(0.9, 0.99), weight_decay=0.0)

    def losses(
        self, step: int, at: int, nfe: int, prompts: Sequence[str], noise_BCHW: Tensor
    ) -> tuple[Tensor, Callable[[], None], dict[str, float]]:
        """See Objective; the student is simulated to a random one of its steps, which alone has gradient."""
        model, grid = self._networks.model, self._grids[nfe]
        gen = torch.Generator().manual_seed(self._config.seed * 9_000_011 + step + at * MICRO)
        last = int(torch.randint(nfe, (), generator=gen))
        with self._precision():
            velocity = velocity_of(model, model.encode(prompts))
            with torch.no_grad():
                x_BD = rollout(velocity, noise_BCHW, grid).x[last]
            x0_BD = data_of(velocity, x_BD, grid[last])
            critic_loss = self._teach_critic(x0_BD.detach(), prompts, gen)
            gradient_BD = self._direction(x0_BD.detach(), prompts, gen)
            loss = 0.5 * (x0_BD - (x0_BD.detach() - gradient_BD)).square().mean()
        return loss, self._precisely(loss.backward), {"loss": loss.item(), "critic_loss": critic_loss}

    @torch.no_grad()
    def _direction(self, x0_BD: Tensor, prompts: Sequence[str], gen: torch.Generator) -> Tensor:
        sigma, _, noisy_BD = _noisy(x0_BD, gen)
        with self._networks.role("start") as start:
            guided = Painter(start, (), self._config.guidance, self._config.negative_prompt).field(prompts)
            real_BD = data_of(guided, noisy_BD, sigma)
        with self._networks.lent(self._critic) as critic:
            fake_BD = data_of(velocity_of(critic, critic.encode(prompts)), noisy_BD, sigma)
        return direction(x0_BD, real_BD, fake_BD)

    def _teach_critic(self, x0_BD: Tensor, prompts: Sequence[str], gen: torch.Generator) -> float:
        """Flow matching on the student's pictures; returns the mean loss."""
        total, processes = 0.0, Processes()
        with self._networks.lent(self._critic) as critic:
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
                self._optimizer.step()
        return total

    def state(self) -> dict[str, Any]:
        """See Objective; the critic and its optimizer too."""
        own = {"critic": self._critic.state_dict(), "critic_optimizer": self._optimizer.state_dict()}
        return {**super().state(), **own}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """See Objective."""
        super().load_state(state)
        self._critic.load_state_dict(state["critic"])
        self._optimizer.load_state_dict(state["critic_optimizer"])


def _noisy(x0_BD: Tensor, gen: torch.Generator) -> tuple[float, Tensor, Tensor]:
    """A random time (away from both ends), noise, and the samples at that time."""
    sigma = 0.02 + 0.96 * float(torch.rand((), generator=gen))
    noise_BD = torch.randn(x0_BD.shape, generator=gen).to(x0_BD.device)
    return sigma, noise_BD, torch.lerp(x0_BD, noise_BD, sigma)

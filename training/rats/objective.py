"""What one RATS step is trained on: the student's reward, and the gated shaping towards the teacher.

Legend: B images, C channels, H/W latent cells or pixels; suffixes S student, T teacher.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint as recompute

from training.drawing import Painter, velocity_of
from training.rats.gradients import differentiate
from training.rats.loss import confidence, gate, reward_loss, shaping, steered, velocity_excess
from training.rats.networks import Networks
from training.rats.preset import RatsConfig
from training.rats.trajectory import Trajectory, named_horizons

RewardFn = Callable[[Tensor, Sequence[str]], Tensor]
Grids = Mapping[int, tuple[float, ...]]
CONSTANT_GATES = {"constant": 0.5, "one": 1.0}
SMALLEST_SPREAD = 0.01  # of the teacher's deviations: a step whose samples all have the same gap leaves tau above 0
MICRO = 1_000_003 * 1_009  # sets the random numbers of a step's micro-batches apart


class Objective:
    """The loss of one micro-batch, and what is logged of it; ``grids`` are the sigmas of each step count."""

    def __init__(self, config: RatsConfig, networks: Networks, reward: RewardFn, grids: Grids) -> None:
        self._config, self._networks, self._reward_of, self._grids = config, networks, reward, grids
        self.alpha = config.alpha
        self.spread = 1.0  # running deviation of the gap, the unit of tau where the configuration says so

    def losses(
        self, step: int, at: int, nfe: int, prompts: Sequence[str], noise_BCHW: Tensor
    ) -> tuple[Tensor, Callable[[], None], dict[str, float]]:
        """The mean loss, what adds its gradient to the student, and the figures of the log.

        ``at`` is the place of the micro-batch's first sample among all of the step's.
        """
        config, model = self._config, self._networks.model
        seen: dict[str, float] = {}
        with self._precision():
            condition = model.encode(prompts)
            teacher = self._teach(step, prompts, noise_BCHW) if config.alpha > 0 else None

        def loss_of(student: Trajectory) -> Tensor:
            reward_S = self._reward(student.x[-1], prompts, step)
            seen["reward_student"] = reward_S.mean().item()
            loss_B = config.reward_weight * reward_loss(reward_S, config.reward_hinge)
            if teacher is not None:
                loss_B = loss_B + self._pull(student, *teacher, reward_S.detach(), seen)
            return loss_B.mean()

        velocity, grid = velocity_of(model, condition), self._grids[nfe]
        with self._precision():
            loss, backward = differentiate(
                config.gradient,
                config.last_k,
                velocity,
                noise_BCHW,
                grid,
                loss_of,
                self._more_noise(step, at, noise_BCHW),
            )
        return loss, self._precisely(backward), {**seen, "loss": loss.item()}

    def state(self) -> dict[str, Any]:
        """What a checkpoint must keep."""
        return {"spread": self.spread, "alpha": self.alpha}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Go back to what ``state`` gave."""
        self.spread, self.alpha = state["spread"], state["alpha"]

    def after(self, values: Mapping[str, float], first: bool) -> None:
        """Take a step's figures into the running spread of the gap."""
        if "gap_std" in values:
            found = values["gap_std"] if first else 0.9 * self.spread + 0.1 * values["gap_std"]
            self.spread = max(found, SMALLEST_SPREAD)

    @staticmethod
    def over_step(means: Mapping[str, float]) -> dict[str, float]:
        """A step's figures from the means over its micro-batches: deviations are those of all its samples."""
        found = dict(means)
        for name, mean in (("gap", "gap"), ("gate", "gate_mean")):
            if (square := found.pop(f"{name}_square", None)) is not None:
                found[f"{name}_std"] = math.sqrt(max(square - found[mean] ** 2, 0.0))
        return found

    def looked(self, diversity: float, teachers: float) -> None:
        """Take a validation's diversity, and the teacher's, into alpha where the configuration says so."""
        if self._config.steer:
            self.alpha = steered(self.alpha, diversity, self._config.steer * teachers)

    def _more_noise(self, step: int, at: int, noise_BCHW: Tensor) -> list[Tensor]:
        """For the low-variance gradient, which repeats the last step once."""
        if self._config.gradient != "low_variance":
            return []
        gen = torch.Generator().manual_seed(self._config.seed * 11_000_027 + step + at * MICRO)
        return [torch.randn(noise_BCHW.shape, generator=gen).to(noise_BCHW.device)]

    def _teach(self, step: int, prompts: Sequence[str], noise_BCHW: Tensor) -> tuple[Trajectory, Tensor]:
        """The teacher's trajectory from the same noise, and its reward."""
        path = self._path(step, prompts, noise_BCHW)
        with torch.no_grad():
            return path, self._reward(path.x[-1], prompts, step)

    def _path(self, step: int, prompts: Sequence[str], noise_BCHW: Tensor) -> Trajectory:
        config = self._config
        guided = step < config.guided_steps
        with self._networks.role("start" if guided else "teacher") as model:
            grid = self._grids[config.teacher_nfe]
            painter = Painter(model, grid, config.guidance if guided else 1.0, config.negative_prompt)
            return painter.trajectory(noise_BCHW, prompts)

    def _pull(
        self, student: Trajectory, teacher: Trajectory, reward_T: Tensor, reward_S: Tensor, seen: dict[str, float]
    ) -> Tensor:
        """alpha (g L_shape + the velocity hinge), for each sample."""
        config = self._config
        points = named_horizons(config.horizons, student.sigmas)
        shaping_B = shaping(student, teacher, points, config.l2_weight, config.cosine_weight)
        gate_B = self._gate(reward_T, reward_S)
        gap_B = reward_S - reward_T
        seen |= {
            "reward_teacher": reward_T.mean().item(),
            "gap": gap_B.mean().item(),
            "gap_square": gap_B.square().mean().item(),
            "gate_mean": gate_B.mean().item(),
            "gate_square": gate_B.square().mean().item(),
            "share_ahead": (gap_B > 0).float().mean().item(),
            "shaping": shaping_B.mean().item(),
            "alpha": self.alpha,
        }
        return self.alpha * (gate_B * shaping_B + velocity_excess(student, teacher, config.velocity_hinge))

    def _gate(self, reward_T: Tensor, reward_S: Tensor) -> Tensor:
        tau = self._config.tau * (self.spread if self._config.tau_in_spreads else 1.0)
        if self._config.gate in CONSTANT_GATES:
            return torch.full_like(reward_T, CONSTANT_GATES[self._config.gate])
        return confidence(reward_T, tau) if self._config.gate == "confidence" else gate(reward_T, reward_S, tau)

    def _reward(self, x_BCHW: Tensor, prompts: Sequence[str], step: int) -> Tensor:
        model, frames = self._networks.model, self._config.reward_frames
        x_BCHW = _glimpse(x_BCHW, frames, step) if frames else x_BCHW

        def score(x: Tensor) -> Tensor:
            return self._reward_of(model.decode(x).float(), prompts).float()

        with torch.set_grad_enabled(torch.is_grad_enabled() and self._config.reward_weight > 0):
            if self._config.checkpointing and torch.is_grad_enabled():
                value: Tensor = recompute(score, x_BCHW, use_reentrant=False)
                return value
            return score(x_BCHW)

    def _precision(self) -> AbstractContextManager[object]:
        device = self._networks.learns[0].device.type
        stack = ExitStack()
        stack.enter_context(torch.autocast(device, torch.bfloat16, enabled=self._config.precision == "bf16"))
        if device == "cpu":
            # Flash attention's backward is 1.8 times slower than the plain form on a CPU at 32 tokens.
            stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        return stack

    def _precisely(self, backward: Callable[[], None]) -> Callable[[], None]:
        """``backward`` in the same precision: the detached mode and checkpointing run the network again in it."""

        def run() -> None:
            with self._precision():
                backward()

        return run


def _glimpse(x_BCFHW: Tensor, frames: int, step: int) -> Tensor:
    """A window of ``frames`` latent frames that walks through the video from step to step; pictures are left whole.

    The decoder's activations of a whole video do not fit a GPU (counted for Wan 2.1 at 480x832 and 33 frames: 219 GB).
    """
    if x_BCFHW.ndim < 5 or x_BCFHW.shape[2] <= frames:
        return x_BCFHW
    first = step % (x_BCFHW.shape[2] - frames + 1)
    return x_BCFHW[:, :, first : first + frames]

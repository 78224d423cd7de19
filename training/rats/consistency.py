"""Consistency distillation in the few-step setting: phased (arXiv 2405.18407), after LCM (arXiv 2310.04378).

The student's sigmas cut time into segments. Within one, jumping to its end from any point of the teacher's trajectory
must lead where jumping from the next point leads (there with the slow copy's weights). No reward, and no data either:
the points lie on the teacher's own trajectories. Suffixes as in trajectory.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from training.drawing import velocity_of
from training.rats.objective import MICRO, Objective
from training.rats.trajectory import Trajectory


def next_point(sigma: float, teacher: Sequence[float], student: Sequence[float]) -> tuple[float, float]:
    """(the teacher's next sigma, the end of the student's segment), the first no lower than the second."""
    end = max([s for s in student if s < sigma], default=0.0)
    after = max([s for s in teacher if s < sigma], default=0.0)
    return max(after, end), end


class Consistency(Objective):
    """The mean squared difference of the two jumps, in latents."""

    def losses(
        self, step: int, at: int, nfe: int, prompts: Sequence[str], noise_BCHW: Tensor
    ) -> tuple[Tensor, Callable[[], None], dict[str, float]]:
        """See Objective; one random point of the trajectory for the whole micro-batch."""
        model = self._networks.model
        with self._precision():
            condition = model.encode(prompts)
            path = self._path(step, prompts, noise_BCHW)
        gen = torch.Generator().manual_seed(self._config.seed * 7_000_003 + step + at * MICRO)
        sigma = path.sigmas[int(torch.randint(len(path.sigmas), (), generator=gen))]
        after, end = next_point(sigma, path.sigmas, self._grids[nfe])
        with self._precision():
            target_BD = self._target(path, after, end, prompts)
            x_BD = path.state(sigma)
            jump_BD = x_BD + (end - sigma) * velocity_of(model, condition)(x_BD, sigma)
            loss = (jump_BD - target_BD).square().mean()
        return loss, self._precisely(loss.backward), {"loss": loss.item(), "sigma": sigma}

    def _target(self, path: Trajectory, after: float, end: float, prompts: Sequence[str]) -> Tensor:
        """Where the slow copy jumps to from the next point; at the segment's end it stays."""
        x_BD = path.state(after)
        if after == end:
            return x_BD
        with self._networks.role("teacher") as slow:
            return x_BD + (end - after) * velocity_of(slow, slow.encode(prompts))(x_BD, after)

"""What a training method is: it fills in a step's teacher, then turns each micro-batch into a loss.

Legend: B images, C channels, H/W latent cells.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from training.rats.config import RatsConfig
from training.rats.roles import Roles
from training.rats.trajectory import Trajectory
from training.sampler import Sampler, precision

RewardFn = Callable[[Tensor, Sequence[str]], Tensor]
Grids = Mapping[int, tuple[float, ...]]  # the sigmas of each step count
MICRO = 1_000_003 * 1_009  # sets the random numbers of a step's micro-batches apart


@dataclass(frozen=True)
class Batch:
    """One micro-batch of an optimizer step; ``at`` is the place of its first sample among all of the step's.

    ``teacher`` is its rollout from the same noise, ``reward_T`` that rollout's reward, where the method wants them.
    """

    step: int
    at: int
    nfe: int
    prompts: Sequence[str]
    noise_BCHW: Tensor
    teacher: Trajectory | None = None
    reward_T: Tensor | None = None

    def generator(self, seed: int) -> torch.Generator:
        """Random numbers of this micro-batch; ``seed`` sets apart what they are for."""
        return torch.Generator().manual_seed(seed + self.step + self.at * MICRO)


class Step(NamedTuple):
    """The mean loss of one micro-batch, what adds its gradient to the student, and the figures of the log.

    What is logged stays on the device until the step's end, so that the host need not wait for it.
    """

    loss: Tensor
    backward: Callable[[], None]
    log: dict[str, Tensor | float]


class Method(Protocol):
    """What the trainer asks of RATS and its peers."""

    def follows(self, step: int) -> bool:
        """Whether the EMA of the student is wanted after this step."""
        ...

    def teach(self, batches: Sequence[Batch]) -> list[Batch]:
        """The same micro-batches with their teacher, without gradient."""
        ...

    def step(self, batch: Batch) -> Step:
        """The student's rollout and its loss."""
        ...

    def after_step(self, means: Mapping[str, float]) -> None:
        """Take the figures of a step that was made into what the method keeps of a run."""
        ...

    def after_validation(self, diversity: float, teacher_diversity: float) -> None:
        """Take a validation's diversity, and the teacher's, into what the method keeps of a run."""
        ...

    def state(self) -> dict[str, Any]:
        """What a checkpoint must keep."""
        ...

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Go back to what ``state`` gave."""
        ...


def types(config: RatsConfig, roles: Roles) -> AbstractContextManager[object]:
    """What a run computes in, around forward and backward passes alike."""
    return precision(config.compute.precision, roles.trainable[0].device)


def in_types(config: RatsConfig, roles: Roles, backward: Callable[[], None]) -> Callable[[], None]:
    """``backward`` in the same types: the detached mode and checkpointing run the network again in it."""

    def run() -> None:
        with types(config, roles):
            backward()

    return run


def teacher_path(config: RatsConfig, roles: Roles, grids: Grids, batch: Batch) -> Trajectory:
    """The teacher's rollout: of the guided start in the first phase, of the student's EMA afterwards."""
    teacher = config.teacher
    guided = batch.step < teacher.guided_steps
    with roles.role("start" if guided else "teacher") as model:
        guidance = teacher.guidance if guided else 1.0
        sampler = Sampler(model, grids[teacher.nfe], guidance, teacher.negative_prompt, config.compute.precision)
        return sampler.trajectory(batch.noise_BCHW, batch.prompts)


def means(rows: Sequence[Mapping[str, Tensor | float]]) -> dict[str, float]:
    """Each figure's mean over a step's micro-batches; all that lies on a device is read in one go."""
    lying = [(name, value) for row in rows for name, value in row.items() if isinstance(value, Tensor)]
    read = iter(torch.stack([value.detach().float() for _, value in lying]).tolist() if lying else [])
    sums: dict[str, float] = {}
    for row in rows:
        for name, value in row.items():
            sums[name] = sums.get(name, 0) + (next(read) if isinstance(value, Tensor) else value)
    return {name: total / len(rows) for name, total in sums.items()}


def teach_jointly(batches: Sequence[Batch], num: int, teach: Callable[[Batch], Batch]) -> list[Batch]:
    """``teach`` of micro-batches of one step, of as many together as have ``num`` samples (at least one)."""
    found: list[Batch] = []
    at_once = max(1, num // len(batches[0].prompts))
    for first in range(0, len(batches), at_once):
        parts = batches[first : first + at_once]
        prompts = [prompt for part in parts for prompt in part.prompts]
        joined = teach(replace(parts[0], prompts=prompts, noise_BCHW=torch.cat([part.noise_BCHW for part in parts])))
        for at, part in enumerate(parts):
            rows = slice(at * len(part.prompts), (at + 1) * len(part.prompts))
            path, reward_T = joined.teacher, joined.reward_T
            found.append(
                replace(
                    part,
                    teacher=None if path is None else path.take(rows),
                    reward_T=None if reward_T is None else reward_T[rows],
                )
            )
    return found


def step_statistics(means: Mapping[str, float]) -> dict[str, float]:
    """A step's figures from the means over its micro-batches: a standard deviation is that of all its samples."""
    found = dict(means)
    for name, mean in (("gap", "gap"), ("gate", "gate_mean")):
        if (square := found.pop(f"{name}_square", None)) is not None:
            found[f"{name}_std"] = math.sqrt(max(square - found[mean] ** 2, 0.0))
    return found

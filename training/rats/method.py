"""The interface of a training method: it adds the teacher to a step's micro-batches, then turns each into a loss.

Legend: B images, C channels, H/W latent cells.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint as recompute
from torch.utils.checkpoint import set_checkpoint_early_stop

from student.families.family import Family
from training.rats.config import RatsConfig
from training.rats.roles import Roles
from training.rats.trajectory import Trajectory
from training.sampler import Sampler, precision
from training.timing import StepTimer

RewardFn = Callable[[Tensor, Sequence[str]], Tensor]
Grids = Mapping[int, tuple[float, ...]]  # the sigmas of each step count
MICRO = 1_000_003 * 1_009  # sets the random numbers of a step's micro-batches apart


@dataclass(frozen=True)
class Batch:
    """One micro-batch of an optimizer step; ``at`` is the position of its first sample among all of the step's.

    ``teacher`` is the teacher's rollout from the same noise and ``reward_T`` its reward, where the method uses them;
    ``timer`` is the step's.
    """

    step: int
    at: int
    nfe: int
    prompts: Sequence[str]
    noise_BCHW: Tensor
    teacher: Trajectory | None = None
    reward_T: Tensor | None = None
    timer: StepTimer | None = None

    def timed(self, name: str) -> AbstractContextManager[None]:
        """Around what counts as this part of the step."""
        return nullcontext() if self.timer is None else self.timer.part(name)

    def generator(self, seed: int) -> torch.Generator:
        """A random generator for this micro-batch; ``seed`` keeps different uses apart."""
        return torch.Generator().manual_seed(seed + self.step + self.at * MICRO)


class Step(NamedTuple):
    """The mean loss of one micro-batch, the function that adds its gradient to the student, and the figures to log.

    The figures stay on the device until the end of the step, so that the host need not wait for them.
    """

    loss: Tensor
    backward: Callable[[], None]
    log: dict[str, Tensor | float]


class Method(Protocol):
    """The interface that RATS and its peers implement for the trainer."""

    def follows(self, step: int) -> bool:
        """Whether the student's EMA is updated after this step."""
        ...

    def teach(self, batches: Sequence[Batch]) -> list[Batch]:
        """The same micro-batches with the teacher's rollouts, without gradient."""
        ...

    def step(self, batch: Batch) -> Step:
        """The student's rollout and its loss."""
        ...

    def after_step(self, means: Mapping[str, float]) -> None:
        """Update the method's running state from the figures of a finished step."""
        ...

    def after_validation(self, diversity: float, teacher_diversity: float) -> None:
        """Update the method's running state from a validation's diversity and the teacher's."""
        ...

    def state(self) -> dict[str, Any]:
        """What a checkpoint must store."""
        ...

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Restore what ``state`` returned."""
        ...


def autocast(config: RatsConfig, roles: Roles) -> AbstractContextManager[object]:
    """The context that sets a run's precision, for forward and backward passes alike."""
    return precision(config.compute.precision, roles.trainable[0].device)


def with_autocast(config: RatsConfig, roles: Roles, backward: Callable[[], None]) -> Callable[[], None]:
    """``backward`` in the same precision: the detached mode and checkpointing run the network again inside it."""

    def run() -> None:
        with autocast(config, roles):
            backward()

    return run


def whole_backward(config: RatsConfig, roles: Roles, loss: Tensor) -> Callable[[], None]:
    """One backward call for a micro-batch, in the precision of a run."""

    def backward() -> None:
        with roles.backward():
            loss.backward()

    return with_autocast(config, roles, backward)


def teacher_path(config: RatsConfig, roles: Roles, grids: Grids, batch: Batch) -> Trajectory:
    """The teacher's rollout: by the guided start in the first phase, by the student's EMA afterwards."""
    teacher = config.teacher
    guided = batch.step < teacher.guided_steps
    with roles.role("start" if guided else "teacher") as model:
        guidance = teacher.guidance if guided else 1.0
        sampler = Sampler(model, grids[teacher.nfe], guidance, teacher.negative_prompt, config.compute.precision)
        return sampler.trajectory(batch.noise_BCHW, batch.prompts)


def means(rows: Sequence[Mapping[str, Tensor | float]]) -> dict[str, float]:
    """Each figure's mean over a step's micro-batches; all figures on a device are read in one transfer."""
    on_device = [(name, value) for row in rows for name, value in row.items() if isinstance(value, Tensor)]
    read = iter(torch.stack([value.detach().float() for _, value in on_device]).tolist() if on_device else [])
    sums: dict[str, float] = {}
    for row in rows:
        for name, value in row.items():
            sums[name] = sums.get(name, 0) + (next(read) if isinstance(value, Tensor) else value)
    return {name: total / len(rows) for name, total in sums.items()}


def teach_jointly(batches: Sequence[Batch], num: int, teach: Callable[[Batch], Batch]) -> list[Batch]:
    """``teach`` for the micro-batches of one step, as many at once as hold ``num`` samples (at least one)."""
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
    """A step's figures from the means over its micro-batches: standard deviations are over all of its samples."""
    found = dict(means)
    for name, mean in (("gap", "gap"), ("gate", "gate_mean")):
        if (square := found.pop(f"{name}_square", None)) is not None:
            found[f"{name}_std"] = math.sqrt(max(square - found[mean] ** 2, 0.0))
    return found


def reward_of_latents(config: RatsConfig, model: Family, reward: RewardFn, x_BCHW: Tensor, batch: Batch) -> Tensor:
    """The standardised reward of latents (B,), with gradient where one is wanted."""

    def score(x: Tensor) -> Tensor:
        with batch.timed("decode"):
            images = decoded_window(model, x, config.reward.frames, batch.step)
        with batch.timed("reward"):
            return reward(images.float(), batch.prompts).float()

    with torch.set_grad_enabled(torch.is_grad_enabled() and config.reward.weight > 0):
        # The detached mode takes this gradient at once, and alone: computed again it would take as much room.
        again = config.compute.checkpointing and config.method == "rats" and config.gradient.mode != "detached"
        if again and torch.is_grad_enabled():
            # To the end: torch would stop early by an exception, which is not a reward's.
            with set_checkpoint_early_stop(False):
                value: Tensor = recompute(score, x_BCHW, use_reentrant=False)
            return value
        return score(x_BCHW)


def decoded_window(model: Family, x_BCFHW: Tensor, frames: int, step: int) -> Tensor:
    """Pictures of latents; of a video those of ``frames`` latent frames (0: all), others from step to step.

    A video's decoder is causal and goes from frame to frame: what lies before the window is decoded too, as its past,
    but without gradient, so that only the window's activations are kept (counted for Wan 2.1 at 480x832 and 33 frames:
    219 GB for all frames). What lies after the window is not decoded.
    """
    total = x_BCFHW.shape[2]
    if x_BCFHW.ndim < 5 or not 0 < frames < total:
        return model.decode(x_BCFHW)
    first = step % (total - frames + 1)
    past, window = x_BCFHW[:, :, :first].detach(), x_BCFHW[:, :, first : first + frames]
    video_BFCHW = model.decode(torch.cat([past, window], 2))
    each = (video_BFCHW.shape[1] - 1) // max(1, first + frames - 1)  # frames of every latent but the first
    return video_BFCHW[:, 0 if first == 0 else 1 + (first - 1) * each :]

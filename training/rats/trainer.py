"""One RATS run: the student learns, the teacher follows or stands still, every step is logged.

Legend: B images, C channels, H/W latent cells or pixels.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers.training_utils import EMAModel
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from student.families.flux import Flux
from student.schedule import sigmas
from training import checkpoint
from training.drawing import Painter, Prompter, velocity_of
from training.optim import set_lr
from training.progress import StepLog, steps
from training.rats.loss import gate, objective, shaping
from training.rats.preset import RatsConfig
from training.rats.trajectory import horizons, rollout

RewardFn = Callable[[Tensor, Sequence[str]], Tensor]
PromptFn = Callable[[int], list[str]]


class RunDiverged(RuntimeError):
    """The loss was not finite ten steps in a row."""


@dataclass(frozen=True)
class World:
    """What a run needs beside the networks: prompts, rewards (standardised), and a figure to choose by.

    ``choose(painter)`` is the mean held-out score on validation prompts; nothing else picks a checkpoint.
    """

    prompter: Prompter
    train_prompts: PromptFn
    reward: RewardFn
    choose: Callable[[Painter], float]
    latent_shape: tuple[int, int, int]


class Trainer:
    """Holds the student, its EMA teacher and the optimizer; ``run`` goes on from the last checkpoint."""

    def __init__(self, config: RatsConfig, model: Flux, world: World, run_dir: Path) -> None:
        self._config = config
        self._world = world
        self._dir = run_dir
        self.student = model
        self._start = copy.deepcopy(model).requires_grad_(False)
        self._teacher = copy.deepcopy(model).requires_grad_(False)
        self._learns = list(model.transformer.requires_grad_(True).parameters())
        # No warm-up of the decay: it would copy the student into the teacher early on.
        self._average = EMAModel(self._learns, decay=config.ema)
        self._optimizer = torch.optim.AdamW(self._learns, config.lr, betas=(0.9, 0.99), weight_decay=0.0)
        self._best: dict[str, Tensor] = {}
        self._best_score = float("-inf")
        self._bad_steps = 0
        self._sigmas = sigmas(config.nfe)

    def painter(self) -> Painter:
        """The student as it is now."""
        return Painter(self.student, self._world.prompter, self._sigmas)

    def run(self) -> None:
        """Train to the end; the student is left with the weights that scored best on validation."""
        config = self._config
        first = self._resume()
        if first == 0:
            self._validate(0)
        log = StepLog(self._dir / "log.jsonl", first)
        for step in steps("rats", first, config.steps):
            values = self._step(step)
            if (step + 1) % config.validate_every == 0 or step + 1 == config.steps:
                values["heldout_validation"] = self._validate(step + 1)
                self._save(step + 1)
            log.write(step, **values)
        self.student.transformer.load_state_dict(self._best)

    def _step(self, step: int) -> dict[str, float]:
        prompts = self._world.train_prompts(step)
        gen = torch.Generator().manual_seed(self._config.seed * 1_000_003 + step)
        noise_BCHW = torch.randn(len(prompts), *self._world.latent_shape, generator=gen)
        with torch.autocast("cpu", torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
            loss, values = self._losses(step, prompts, noise_BCHW)
        if not self._finite(loss):
            return {**values, "skipped": 1.0}
        self._optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self._learns, self._config.clip_norm)
        set_lr(self._optimizer, self._config.lr * min(1.0, (step + 1) / 10))
        self._optimizer.step()
        self._follow(step)
        return {**values, "loss": loss.item(), "grad_norm": norm.item()}

    def _losses(self, step: int, prompts: list[str], noise_BCHW: Tensor) -> tuple[Tensor, dict[str, float]]:
        config, world = self._config, self._world
        condition = world.prompter.encode(self.student, prompts)
        teacher_painter = self._teacher_painter(step)
        teacher = teacher_painter.trajectory(noise_BCHW, prompts)
        student = rollout(velocity_of(self.student, condition), noise_BCHW, self._sigmas)
        reward_S = world.reward(self.student.decode(student.x[-1]).float(), prompts).float()
        with torch.no_grad():
            reward_T = world.reward(self._teacher.decode(teacher.x[-1]).float(), prompts).float()
        gate_B = gate(reward_T, reward_S, config.tau)
        shaping_B = shaping(student, teacher, horizons(self._sigmas), config.l2_weight, config.cosine_weight)
        values = {
            "reward_student": reward_S.mean().item(),
            "reward_teacher": reward_T.mean().item(),
            "gap": (reward_S - reward_T).mean().item(),
            "gate_mean": gate_B.mean().item(),
            "gate_std": gate_B.std().item(),
            "share_ahead": (reward_S > reward_T).float().mean().item(),
            "shaping": shaping_B.mean().item(),
        }
        return objective(reward_S, gate_B, shaping_B, config.alpha), values

    def _teacher_painter(self, step: int) -> Painter:
        grid = sigmas(self._config.teacher_nfe)
        if step < self._config.guided_steps:
            return Painter(self._start, self._world.prompter, grid, self._config.guidance)
        return Painter(self._teacher, self._world.prompter, grid)

    def _follow(self, step: int) -> None:
        """Move the EMA teacher; when the guided phase ends it starts from the student of that moment."""
        if step + 1 == self._config.guided_steps:
            self._average = EMAModel(self._learns, decay=self._config.ema)
        elif step >= self._config.guided_steps:
            self._average.step(self._learns)
        self._average.copy_to(self._teacher.transformer.parameters())

    def _finite(self, loss: Tensor) -> bool:
        self._bad_steps = 0 if torch.isfinite(loss) else self._bad_steps + 1
        if self._bad_steps == 10:
            raise RunDiverged(f"the loss was not finite ten steps in a row; the last good checkpoint is in {self._dir}")
        return self._bad_steps == 0

    def _validate(self, step: int) -> float:
        score = self._world.choose(self.painter())
        if score > self._best_score:
            self._best_score = score
            self._best = {name: value.clone() for name, value in self.student.transformer.state_dict().items()}
        return score

    def _save(self, step: int) -> None:
        state = {
            "step": step,
            "student": self.student.transformer.state_dict(),
            "average": self._average.state_dict(),
            "optimizer": self._optimizer.state_dict(),
            "best": self._best,
            "best_score": self._best_score,
        }
        checkpoint.save(self._dir / "checkpoint.pt", state)

    def _resume(self) -> int:
        saved = checkpoint.load(self._dir / "checkpoint.pt")
        if saved is None:
            return 0
        self.student.transformer.load_state_dict(saved["student"])
        self._average.load_state_dict(saved["average"])
        self._optimizer.load_state_dict(saved["optimizer"])
        self._best, self._best_score = saved["best"], saved["best_score"]
        self._average.copy_to(self._teacher.transformer.parameters())
        return int(saved["step"])

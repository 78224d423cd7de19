"""One RATS run: the student learns, the teacher follows or stands still, every step is logged.

Everything random is a function of (seed, step), so that a run which was cut off goes on bit for bit.
Legend: B images, C channels, H/W latent cells.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from student.families.family import Family
from training import checkpoint
from training.drawing import Painter
from training.optim import set_lr
from training.processes import Processes
from training.progress import StepLog, console, read_log, steps
from training.rats.alarms import all_alarms
from training.rats.consistency import Consistency
from training.rats.matching import Matching
from training.rats.networks import Lora, Networks
from training.rats.objective import Objective, RewardFn
from training.rats.preset import RatsConfig
from training.rundir import RunDiverged
from training.sharding import alone, optimizer_like, whole

BAD_STEPS = 10
OBJECTIVES: dict[str, type[Objective]] = {"rats": Objective, "consistency": Consistency, "matching": Matching}


@dataclass(frozen=True)
class World:
    """What a run needs beside the networks.

    ``prompts(step, num)`` are one step's prompts; ``reward`` is standardised; ``validate(painters, step)`` returns the
    figures of the validation prompts, of which ``heldout_validation`` alone picks the checkpoint; ``reward_p999`` is
    the 99.9th percentile of the teacher's reward on the calibration prompts; ``teacher_diversity`` is what the
    configuration's shares of diversity are shares of.
    """

    prompts: Callable[[int, int], list[str]]
    reward: RewardFn
    validate: Callable[[Sequence[Painter], int], dict[str, float]]
    latent_shape: tuple[int, ...]
    reward_p999: float = math.inf
    teacher_diversity: float = 0.0


def networks_of(config: RatsConfig, model: Family) -> Networks:
    """The roles of a run's transformer, spread over the processes where the configuration says so."""
    if config.checkpointing:
        model.transformer.enable_gradient_checkpointing()
    lora = Lora(config.lora_rank, config.lora_alpha, config.seed) if config.lora_rank else None
    return Networks(model, config.ema, lora, Processes().size if config.shard else 1)


class Trainer:
    """Holds the networks and the optimizer; ``run`` goes on from the last checkpoint."""

    def __init__(self, config: RatsConfig, networks: Networks, world: World, run_dir: Path) -> None:
        self._config, self._world, self._dir, self.networks = config, world, run_dir, networks
        steps = (*config.nfe, config.teacher_nfe)
        self._grids = {nfe: networks.model.sigmas(nfe, world.latent_shape) for nfe in steps}
        self._processes = Processes()
        self._objective = OBJECTIVES[config.method](config, self.networks, world.reward, self._grids)
        self._optimizer = torch.optim.AdamW(self.networks.learns, config.lr, betas=(0.9, 0.99), weight_decay=0.0)
        self._best: dict[str, Tensor] = {}
        self._best_score, self._best_at, self._bad_steps = -math.inf, 0, 0

    @property
    def is_first(self) -> bool:
        """True in the one process that writes files."""
        return self._processes.is_first

    def painters(self) -> list[Painter]:
        """The student as it is now, at each of its step counts."""
        return [Painter(self.networks.model, self._grids[nfe]) for nfe in self._config.nfe]

    def run(self) -> None:
        """Train to the end; the student is left with the weights that scored best on validation.

        Raises:
            RunDiverged: ten steps in a row without a finite loss; the last checkpoint is kept.
        """
        config = self._config
        first = self._resume()
        log = StepLog(self._dir / "log.jsonl", first) if self._processes.is_first else None
        if first == 0:
            self._note(log, -1, self._validate(0))
        for step in steps("rats", first, config.steps, shown=self.is_first):
            # Before the step and not after the look, so that a run that is gone on with stops at the same place.
            if config.patience and step - self._best_at >= config.patience * config.validate_every:
                if self.is_first:
                    console.print(f"stopped after {step} steps: the held-out score was best after {self._best_at}")
                break
            values = self._step(step)
            looks = (step + 1) % config.validate_every == 0 or step + 1 == config.steps
            self._note(log, step, {**values, **(self._validate(step + 1) if looks else {})})
            if looks:
                self._save(step + 1)
        if log is not None:
            log.close()
        self.networks.load_student(self._best)

    def _step(self, step: int) -> dict[str, float]:
        """One optimizer step over this process's micro-batches."""
        config = self._config
        total = config.batch * config.accumulate * self._processes.size
        prompts = self._world.prompts(step, total)
        gen = torch.Generator().manual_seed(config.seed * 1_000_003 + step)
        noise_BCHW = torch.randn(total, *self._world.latent_shape, generator=gen)
        nfe = config.nfe[int(torch.randint(len(config.nfe), (), generator=gen))]
        self._optimizer.zero_grad()
        rows = []
        for at in self._processes.share(range(0, total, config.batch)):
            part = slice(at, at + config.batch)
            start_BCHW = noise_BCHW[part].to(self.networks.model.device)
            loss, backward, values = self._objective.losses(step, at, nfe, prompts[part], start_BCHW)
            rows.append(values)
            if self._processes.agree(bool(torch.isfinite(loss))):
                backward()
        sums = {name: sum(row[name] for row in rows) for name in rows[0]}
        means = self._objective.over_step(self._processes.mean({name: sums[name] / len(rows) for name in sums}))
        norm = self._update(step) if math.isfinite(means["loss"]) else math.nan
        if not self._finite(norm):
            return {**means, "skipped": 1.0}
        self._objective.after(means, first=step == 0)
        return {**means, "nfe": float(nfe), "grad_norm": norm}

    def _update(self, step: int) -> float:
        """Clip, step and let the teacher follow; the gradient's norm, and no change at all where that is not finite."""
        config, networks = self._config, self.networks
        self._processes.mean_gradients(networks.learns, config.accumulate)
        norm = float(whole(torch.nn.utils.clip_grad_norm_(networks.learns, config.clip_norm)))
        if not math.isfinite(norm):
            return norm
        left = (config.steps - step) / (config.lr_decay * config.steps) if config.lr_decay else 1.0
        set_lr(self._optimizer, config.lr * min(1.0, (step + 1) / config.warmup, left))
        self._optimizer.step()
        networks.follow()
        if step + 1 == config.guided_steps:
            networks.restart_teacher()  # the guided phase is over: from here on it follows this student
        return norm

    def _finite(self, norm: float) -> bool:
        self._bad_steps = 0 if math.isfinite(norm) else self._bad_steps + 1
        if self._bad_steps == BAD_STEPS:
            raise RunDiverged(
                f"the loss was not finite {BAD_STEPS} steps in a row; the last good checkpoint is in {self._dir}"
            )
        return self._bad_steps == 0

    def _validate(self, step: int) -> dict[str, float]:
        values = self._processes.of_first(self._world.validate(self.painters(), step))
        diversity, teachers = values.get("diversity_validation", math.inf), self._world.teacher_diversity
        varied = diversity >= self._config.min_diversity * teachers
        # Before the first step anything may be chosen, so that there is always something to go back to.
        if values["heldout_validation"] > self._best_score and (varied or step == 0):
            self._best_score, self._best_at = values["heldout_validation"], step
            self._best = self.networks.student_state()
        if step > 0:
            self._objective.looked(diversity, teachers)
        return values

    def _note(self, log: StepLog | None, step: int, values: dict[str, float]) -> None:
        if log is None:
            return
        log.write(step, **values)
        if "heldout_validation" in values:
            rows = read_log(self._dir / "log.jsonl")
            found = all_alarms(rows, self._world.reward_p999)
            for at, alarm in found:
                if at == step + 1:
                    console.print(f"[yellow]step {at}: {alarm}[/yellow]", highlight=False)
            (self._dir / "alarms.txt").write_text("".join(f"step {at}: {alarm}\n" for at, alarm in found))

    def _save(self, step: int) -> None:
        state = {
            "step": step,
            "networks": self.networks.state(),
            "optimizer": self._optimizer.state_dict(),
            "objective": self._objective.state(),
            "best": self._best,
            "best_score": self._best_score,
            "best_at": self._best_at,
        }
        # In every process: what is spread over all of them is put together by all of them.
        state = alone(state, keep=self._processes.is_first)
        if self._processes.is_first:
            checkpoint.save(self._dir / "checkpoint.pt", state)
        self._processes.wait()

    def _resume(self) -> int:
        saved = checkpoint.load(self._dir / "checkpoint.pt")
        if saved is None:
            return 0
        self.networks.load_state(saved["networks"])
        self._optimizer.load_state_dict(optimizer_like(saved["optimizer"], self.networks.learns))
        self._objective.load_state(saved["objective"])
        self._best, self._best_score, self._best_at = saved["best"], saved["best_score"], saved["best_at"]
        return int(saved["step"])

"""The training loop: prompts, noise, teacher, student, loss, backward, update, validate, save.

Everything random is a function of (seed, step), so that an interrupted run resumes bit for bit.
Legend: B images, C channels, H/W latent cells.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.markup import escape
from torch import Tensor

from student.families.family import sent
from training import checkpoint
from training.alarms import write_alarms
from training.optim import set_lr, trapezoid
from training.processes import Processes
from training.progress import console, steps
from training.quantise import adamw
from training.rats.config import RatsConfig
from training.rats.method import Batch, Method, RewardFn, means, step_statistics
from training.rats.peers import Consistency, Matching
from training.rats.rats import Rats
from training.rats.roles import Roles
from training.rats.slices import slices
from training.rats.tune import Tune
from training.rundir import RunDiverged, RunStopped
from training.sampler import Sampler
from training.sharding import unsharded
from training.steplog import StepLog
from training.termination import sigterm
from training.timing import StepTimer, peak_memory
from training.tracker import remote

BAD_STEPS = 10
CHECKPOINT = "checkpoint.pt"  # of a sharded run a folder without the ending
METHODS: dict[str, Callable[..., Method]] = {
    "rats": Rats,
    "tune": Tune,
    "consistency": Consistency,
    "matching": Matching,
}


class Trainer:
    """Holds the roles and the optimizer; ``run`` resumes from the last checkpoint.

    ``prompts(step, num)`` are one step's prompts; ``reward`` is standardised; ``validate(samplers, step)`` returns the
    figures of the validation prompts, of which ``heldout_validation`` alone picks the checkpoint; ``reward_p999`` is
    the 99.9th percentile of the teacher's reward on the calibration prompts; the configuration's shares of diversity
    are relative to ``teacher_diversity``. ``second`` is the standardised held-out reward, for the gate that reads it.
    """

    def __init__(
        self,
        config: RatsConfig,
        roles: Roles,
        run_dir: Path,
        *,
        prompts: Callable[[int, int], list[str]],
        reward: RewardFn,
        validate: Callable[[Sequence[Sampler], int], dict[str, float]],
        latent_shape: tuple[int, ...],
        reward_p999: float = math.inf,
        teacher_diversity: float = 0.0,
        second: RewardFn | None = None,
    ) -> None:
        self.config, self.roles, self.run_dir = config, roles, run_dir
        self.prompts, self.validate, self.latent_shape = prompts, validate, latent_shape
        self.reward_p999, self.teacher_diversity = reward_p999, teacher_diversity
        counts = (*config.student.nfe, config.teacher.nfe)
        self.grids = {nfe: roles.model.sigmas(nfe, latent_shape) for nfe in counts}
        more = {"second": second} if config.gate.kind == "disagreement" else {}
        self.method = METHODS[config.method](config, roles, reward, self.grids, **more)
        self.optimizer = adamw(roles.trainable, config.optim.lr, config.optim.state)
        self.processes = Processes()
        self.best: dict[str, Tensor] = {}
        self.best_score, self.best_at, self.bad_steps = -math.inf, 0, 0
        self.validated = 0  # after how many steps last
        self._log: StepLog | None = None

    @property
    def is_first(self) -> bool:
        """Whether this is the one process that writes files."""
        return self.processes.is_first

    def run(self) -> None:
        """Train to the end; the student is left with the weights that scored best on validation.

        Raises:
            RunDiverged: ten steps in a row without a finite loss; the last checkpoint is kept.
            RunStopped: SIGTERM arrived; all is in the checkpoint, and a validation that was due is made on resuming.
        """
        first = self._resume()
        self._log = self._opened_log(first) if self.is_first else None
        try:
            if self.validated < first and self._due(first):  # the run was stopped before this validation
                self._record(first - 1, self._validate(first), amended=True)
            elif first == 0:
                self._record(-1, self._validate(0))
            with sigterm() as asked_to_stop:
                self._train(first, asked_to_stop)
        finally:  # however it ends, its trackers are to know
            if self._log is not None:
                self._log.close()
        self.roles.load_student(self.best)

    def _train(self, first: int, asked_to_stop: threading.Event) -> None:
        config, saved_at = self.config, time.monotonic()
        for step in steps("rats", first, config.steps, shown=self.is_first):
            if self._out_of_patience(step):
                break
            if config.teacher.restart and 0 < step == config.teacher.guided_steps:
                self.roles.restart_teacher()  # the guided phase is over: from here on it follows this student
            if step == max(first, config.teacher.guided_steps):
                self.roles.offload_start()
            log = self._step(step)
            late = time.monotonic() - saved_at > 60 * config.compute.save_minutes
            stop, late = self.processes.any(asked_to_stop.is_set(), late)
            due = self._due(step + 1)
            if due and not stop:
                try:
                    log |= self._validate(step + 1)
                except RunStopped:  # nothing has come of it yet: it is made again
                    stop = True
            self._record(step, log)
            if due or stop or late:
                self._save(step + 1, must=stop)
                saved_at = time.monotonic()
            if stop:
                raise RunStopped(f"stopped after {step + 1} steps: the same command resumes from there")
        if self.processes.any(asked_to_stop.is_set())[0]:
            raise RunStopped("stopped after the last step: the same command resumes from there")

    def _due(self, step: int) -> bool:
        """Whether the student is measured after so many steps."""
        return step % self.config.validation.every == 0 or step == self.config.steps

    def _step(self, step: int) -> dict[str, float]:
        """One optimizer step over this process's micro-batches."""
        timer = StepTimer(self.roles.model.device)
        with timer.part("teacher"):
            batches = self.method.teach([replace(batch, timer=timer) for batch in self._batches(step)])
        rows = []
        for batch in batches:
            self.roles.reduce(batch is batches[-1])
            with timer.part("student"):
                _, backward, figures = self.method.step(batch)
            with timer.part("backward"):
                backward()
            rows.append(figures)
        log = step_statistics(self.processes.mean(means(rows)))
        with timer.part("update"):
            norm = self._update(step) if math.isfinite(log["loss"]) else math.nan
            self.optimizer.zero_grad()  # a validation that follows has their memory
        samples = (step + 1) * self.config.optim.batch * self.config.optim.accumulate * self.processes.size
        log |= {"lr": self.optimizer.param_groups[0]["lr"], "samples": float(samples)}
        log |= {**timer.seconds(), **peak_memory()}
        if not self._finite(norm):
            return {**log, "skipped": 1.0}
        self.method.after_step(log)
        return {**log, "nfe": float(batches[0].nfe), "grad_norm": norm}

    def _batches(self, step: int) -> list[Batch]:
        """This process's share of a step's prompts and noise."""
        optim, num = self.config.optim, self.config.optim.batch
        total = num * optim.accumulate * self.processes.size
        prompts = self.prompts(step, total)
        gen = torch.Generator().manual_seed(self.config.seed * 1_000_003 + step)
        noise_BCHW = torch.randn(total, *self.latent_shape, generator=gen)
        counts = self.config.student.nfe
        nfe = counts[int(torch.randint(len(counts), (), generator=gen))]
        device = self.roles.model.device
        return [
            Batch(step, at, nfe, prompts[at : at + num], sent(noise_BCHW[at : at + num], device))
            for at in self.processes.share(range(0, total, num))
        ]

    def _update(self, step: int) -> float:
        """Clip, step and let the teacher follow; the gradient's norm, and no change at all where that is not finite."""
        config, roles = self.config, self.roles
        optim = config.optim
        self.processes.mean_gradients(roles.trainable, optim.accumulate, roles.alike)
        norm = float(unsharded(torch.nn.utils.clip_grad_norm_(roles.trainable, optim.clip_norm)))
        if not math.isfinite(norm):
            return norm
        set_lr(self.optimizer, trapezoid(step, config.steps, optim.lr, optim.warmup, optim.decay))
        self.optimizer.step()
        if self.method.follows(step):
            roles.follow()
        return norm

    def _finite(self, norm: float) -> bool:
        self.bad_steps = 0 if math.isfinite(norm) else self.bad_steps + 1
        if self.bad_steps == BAD_STEPS:
            raise RunDiverged(
                f"the loss was not finite for {BAD_STEPS} steps in a row; the last good checkpoint is in {self.run_dir}"
            )
        return self.bad_steps == 0

    def _out_of_patience(self, step: int) -> bool:
        """Asked before a step and not after a validation, so that a resumed run stops at the same place."""
        config = self.config.validation
        if not config.patience or step - self.best_at < config.patience * config.every:
            return False
        if self.is_first:
            console.print(f"stopped early after {step} steps: the held-out score was best after {self.best_at}")
        return True

    def _validate(self, step: int) -> dict[str, float]:
        """Measure the student at each of its step counts, and keep its weights where they are the best so far."""
        precision = self.config.compute.precision
        samplers = [Sampler(self.roles.model, self.grids[nfe], precision=precision) for nfe in self.config.student.nfe]
        values = self.processes.from_first(self.validate(samplers, step))
        diversity = values.get("diversity_validation", math.inf)
        varied = diversity >= self.config.validation.min_diversity * self.teacher_diversity
        # Before the first step anything may be chosen, so that there is always something to go back to.
        if values["heldout_validation"] > self.best_score and (varied or step == 0):
            self.best_score, self.best_at = values["heldout_validation"], step
            self.best = self.roles.student_state()
        self.validated = step
        if step > 0:
            self.method.after_validation(diversity, self.teacher_diversity)
        return {**values, "best_at": float(self.best_at)}

    def _opened_log(self, first: int) -> StepLog:
        path, say = self.run_dir / "log.jsonl", partial(console.print, style="yellow", highlight=False, markup=False)
        return StepLog(path, first, remote(self.config.tracker, path, asdict(self.config), say))

    def _record(self, step: int, values: dict[str, float], amended: bool = False) -> None:
        if self._log is None:
            return
        (self._log.amend if amended else self._log.write)(step, **values)
        if "heldout_validation" in values:
            for alarm in write_alarms(self.run_dir / "alarms.txt", self._log.rows(), self.reward_p999):
                console.print(f"[yellow]{alarm}[/yellow]", highlight=False)

    def _save(self, step: int, must: bool = True) -> None:
        """A checkpoint; a full disk ends the run only where it ``must`` be written, since the run ends with it."""
        try:
            self._write(step)
        except checkpoint.CheckpointError as error:
            if must:
                raise
            if self.is_first:
                console.print(f"[yellow]{escape(str(error))}; the run continues without it[/yellow]", highlight=False)
        self.processes.wait()

    def _write(self, step: int) -> None:
        at = {"best_at": self.best_at, "validated": self.validated}
        plain: dict[str, Any] = {"step": step, "best_score": self.best_score, **at}
        if self.config.compute.shard:
            tensors, adam_steps = self._slices()
            plain |= {"adam_steps": adam_steps, "method": self.method.state()}
            checkpoint.save_slices(self._checkpoint.with_suffix(""), tensors, plain)
        elif self.is_first:
            state = {"roles": self.roles.state(), "optimizer": self.optimizer.state_dict(), "best": self.best}
            checkpoint.save(self._checkpoint, {**plain, **state, "method": self.method.state()})

    def _resume(self) -> int:
        """The first step that is still to be done."""
        saved = self._load_slices() if self.config.compute.shard else checkpoint.load(self._checkpoint)
        if saved is None:
            return 0
        if not self.config.compute.shard:
            self.roles.load_state(saved["roles"])
            self.optimizer.load_state_dict(saved["optimizer"])
            self.best = saved["best"]
        self.method.load_state(saved["method"])
        self.best_score, self.best_at = saved["best_score"], saved["best_at"]
        self.validated = saved.get("validated", saved["step"])
        return int(saved["step"])

    @property
    def _checkpoint(self) -> Path:
        return self.run_dir / CHECKPOINT

    def _slices(self) -> tuple[dict[str, Mapping[str, Tensor]], list[float]]:
        return slices(self.roles, self.optimizer, self.best, self.config.optim.state == "offload")

    def _load_slices(self) -> dict[str, Any] | None:
        self.best = self.roles.student_state()
        tensors, _ = self._slices()
        saved = checkpoint.load_slices(self._checkpoint.with_suffix(""), tensors)
        if saved is None:
            self.best = {}
            self.optimizer.state.clear()
            return None
        for parameter, step in zip(self.roles.trainable, saved["adam_steps"], strict=True):
            self.optimizer.state[parameter]["step"].fill_(step)
        return saved

"""``python -m benchmarks.step_counts``: how often one optimizer step calls the network, other processes, and the host.

In closed form, of a preset's settings over 8 processes; tests hold it to what the trainer's own step does
(benchmarks/counted_step.py). The same of a naive arrangement: every sample's teacher alone, guidance as two calls, a
collective for every parameter and after every micro-batch, slices that come together for every call, every figure read
by itself, and every copy from main memory blocking. ``make docs`` puts the table into docs/cost.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from training.config import changed
from training.experiment.presets import preset
from training.rats.config import RatsConfig

PROCESSES = 8
KINDS = ("teacher", "student", "again", "collectives", "waits")
FIGURES = 9  # what is logged of a micro-batch
NOISE, CONDITIONS, EMPTY, SCORE = 1, 2 * 2, 2, 3  # copies; FLUX has two parts of a condition, a score reads three
HEAD = "| | teacher's calls | student's calls | run again for the gradient | collectives | the host waits |"
WHOLE = {"lora.rank": 0, "compute.weights": "fp32", "compute.shard": True}
FULL = {"gradient.mode": "full"}


@dataclass(frozen=True)
class Case:
    """One row: a preset and what is changed of it."""

    name: str
    preset: str
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def config(self) -> RatsConfig:
        """The run's."""
        return changed(preset(self.preset), dict(self.settings))


CASES = (
    Case("`flux-dev`", "flux-dev"),
    Case("`flux-dev`, `gradient.mode=full`", "flux-dev", FULL),
    Case("`sd35-medium`", "sd35-medium"),
    Case("`sd35-medium`, `gradient.mode=full`", "sd35-medium", FULL),
    Case("`flux-dev`, all weights, sharded", "flux-dev", WHOLE),
    Case("`flux-dev`, all weights, sharded, `gradient.mode=full`", "flux-dev", {**WHOLE, **FULL}),
)


@dataclass(frozen=True)
class Network:
    """What the counts depend on: its blocks (units of FSDP2), the adapters' matrices on them, and the buckets that
    these fill; ``guided`` by two calls, not by an input.
    """

    blocks: int
    adapters: int
    buckets: int
    guided: bool


FLUX = Network(blocks=19 + 38, adapters=2 * (12 * 19 + 5 * 38), buckets=6, guided=False)
# 24 blocks of two streams, of which 13 have a second attention, and the last has no text left to change.
SD35 = Network(blocks=24, adapters=2 * (12 * 23 + 9 + 4 * 13), buckets=2, guided=True)
NETWORKS = {"flux-dev": FLUX, "sd35-medium": SD35}


def counts(config: RatsConfig, network: Network, naive: bool = False) -> dict[str, int]:
    """What one step of one process takes, with one sample a micro-batch; the waits of a sharded run are not counted."""
    batches, (steps,), teacher = config.optim.accumulate, config.student.nfe, config.teacher
    whole, detached = config.compute.shard, config.gradient.mode == "detached"
    taught = batches if naive else -(-batches // max(1, teacher.batch))  # rollouts of the teacher
    averaged = batches * network.adapters if naive else network.buckets
    found = {
        "teacher": taught * teacher.nfe * (2 if network.guided and naive else 1),
        "student": batches * steps,
        "again": batches * steps if detached else 0,
        "collectives": 2 + (1 + _sharded(config, network, taught, naive) if whole else averaged),  # figures, a stop
    }
    if not whole:
        scores = 2 if detached else 3  # of the teacher and the student, whose is computed again for its gradient
        copies = NOISE + CONDITIONS + EMPTY * network.guided + scores * SCORE
        # All figures at once, their mean over the processes, the gradient's norm, a stop, the clock.
        found["waits"] = 4 + (batches * (copies + FIGURES) if naive else 1)
    return found


def _sharded(config: RatsConfig, network: Network, taught: int, naive: bool) -> int:
    """Slices that come together, and gradients that are averaged: by block, and for what is outside of them."""
    batches, (steps,), blocks = config.optim.accumulate, config.student.nfe, network.blocks
    detached = config.gradient.mode == "detached"
    drawn = taught * (1 + blocks * (config.teacher.nfe if naive else 1))
    drawn += batches * (1 + blocks * (steps if naive else 1)) if detached else 0
    learnt = batches * steps * (1 + 2 * blocks) if detached else batches * (1 + 2 * blocks * steps)
    return drawn + learnt + (batches if naive else 1) * (1 + blocks)


def table() -> str:
    """The table in docs/cost.md: of the naive arrangement, and of this one."""
    return "\n".join([HEAD, "| --- |" + " ---: |" * len(KINDS), *map(_line, CASES)])


def _line(case: Case) -> str:
    before, after = (counts(case.config, NETWORKS[case.preset], naive) for naive in (True, False))
    cells = [_cell(before[kind], after[kind]) if kind in after else "" for kind in KINDS]
    return f"| {case.name} | {' | '.join(cells)} |"


def _cell(before: int, after: int) -> str:
    return f"{before:,}" if before == after else f"{before:,} → {after:,}"


if __name__ == "__main__":
    print(table())

"""``make gpu-train-test``: training on this machine's NVIDIA GPUs, each part in a process of its own, in one table.

Resume: a run of the starter world is stopped by SIGTERM and goes on; its figures are those of an uninterrupted one. Two
processes (NCCL), with whole and with sharded networks (FSDP2): their figures are those of one process that accumulates
twice as much. The step of FLUX's size: seconds and memory (benchmarks/train_step.py). It needs no input, writes into a
folder of its own, and ends within ten minutes: a part that takes longer than its share is stopped. What is missing is
one sentence each; the status is 1 if a part that could run failed.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.table import Table

from student.runtimes.machine import find_gpu
from training.steplog import read_log

ROOT = Path(__file__).resolve().parents[1]
RUN_S, STEP_S = 70.0, 240.0  # five runs and a step in ten minutes
STEPS = 6
SMALL = {
    "steps": STEPS, "optim.batch": 4, "optim.accumulate": 2, "teacher.nfe": 4, "teacher.reference_nfe": 4,
    "validation.every": 3, "validation.min_diversity": 0.0, "data.calibration": 8, "data.validation": 4,
    "data.validation_diversity": 2, "data.test": 4, "data.test_diversity": 2, "compute.precision": "fp32",
}  # fmt: skip
SAME = ("loss", "reward_student", "gap", "shaping", "grad_norm")
# Kernels add up in no fixed order, and Adam's first steps divide by gradients near 0: what differs in the last bit then
# differs by more. Another seed's figures differ by far more.
CLOSE = 2e-2


class Failed(RuntimeError):
    """A part that could run did not do what it should; the message is one sentence."""


@dataclass(frozen=True)
class Bench:
    """Where the parts run: a folder, how runs are changed, and the environment of their processes."""

    folder: Path
    settings: Mapping[str, object] = field(default_factory=dict)
    environment: Mapping[str, str] = field(default_factory=dict)
    limit_s: float = RUN_S  # of one run

    def command(self, name: str, processes: int = 1, **changes: object) -> list[str]:
        """The command of a run that is written to ``name``; keys of ``changes`` with two underscores for a dot."""
        several = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
        chosen = {**SMALL, **self.settings, **{key.replace("__", "."): value for key, value in changes.items()}}
        given = [part for key, value in chosen.items() for part in ("--set", f"{key}={value}")]
        launched = [sys.executable, *(several if processes > 1 else []), "-m", "training.run"]
        return [*launched, "--out", str(self.folder / name), *given]

    def start(self, command: Sequence[str]) -> subprocess.Popen[str]:
        """A process of its own, whose caches are in the folder too."""
        environment = {**os.environ, "HOME": str(self.folder), "OMP_NUM_THREADS": "4", **self.environment}
        return subprocess.Popen(
            command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True
        )

    def run(self, command: Sequence[str], wanted: int = 0) -> None:
        """Run to the end."""
        finish(self.start(command), self.limit_s, wanted)

    def rows(self, name: str) -> list[dict[str, float]]:
        """The steps of a run."""
        return [row for row in read_log(self.folder / name / "run" / "log.jsonl") if row["step"] >= 0]


def finish(process: subprocess.Popen[str], limit_s: float, wanted: int = 0) -> None:
    """Wait for a run's end.

    Raises:
        Failed: it took too long, or ended with another status.
    """
    try:
        _, said = process.communicate(timeout=limit_s)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # a launcher's own processes too, which would keep the GPU
        process.communicate()
        raise Failed(f"a run was stopped after {limit_s:.0f} s") from None
    if process.returncode != wanted:
        raise Failed(f"a run ended with status {process.returncode}: {(said.strip().splitlines() or ['nothing'])[-1]}")


def compare(one: Sequence[Mapping[str, float]], other: Sequence[Mapping[str, float]]) -> str:
    """The largest relative difference of two runs' figures, in words.

    Raises:
        Failed: they are not the same steps, or differ by more than CLOSE.
    """
    if [row["step"] for row in one] != [row["step"] for row in other] or len(one) != STEPS:
        raise Failed(f"{len(one)} and {len(other)} steps of {STEPS}")
    worst = 0.0
    for a, b in zip(one, other, strict=True):
        for key in SAME:
            difference = abs(a[key] - b[key]) / max(abs(a[key]), abs(b[key]), 1e-3)
            if not difference <= CLOSE:  # of NaN neither is true
                raise Failed(f"{key} differs by {difference:.1%}")
            worst = max(worst, difference)
    return f"{STEPS} steps, figures within {worst:.1e}"


def resume(bench: Bench) -> str:
    """SIGTERM after the second step, and the same command again."""
    bench.run(bench.command("whole"))
    process = bench.start(bench.command("cut"))
    deadline = time.monotonic() + bench.limit_s
    while len(bench.rows("cut")) < 2 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    finish(process, max(1.0, deadline - time.monotonic()), 128 + signal.SIGTERM)
    done = len(bench.rows("cut"))
    bench.run(bench.command("cut"))
    return f"stopped after {done} steps; {compare(bench.rows('whole'), bench.rows('cut'))}"


def two_processes(bench: Bench) -> str:
    """Two against one that accumulates twice as much."""
    if not (bench.folder / "whole" / "run" / "finished").exists():
        bench.run(bench.command("whole"))
    found = []
    for name, shard in (("two", "false"), ("sharded", "true")):
        bench.run(bench.command(name, 2, optim__accumulate=1, compute__shard=shard))
        found.append(f"{name}: {compare(bench.rows('whole'), bench.rows(name))}")
    return "; ".join(found)


def flux_step(bench: Bench) -> str:
    """Seconds, memory and share of the ceiling, as benchmarks.train_step prints them."""
    command = [sys.executable, "-m", "benchmarks.train_step", "--repeats", "2"]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=STEP_S)
    except subprocess.TimeoutExpired:
        raise Failed(f"it was stopped after {STEP_S:.0f} s") from None
    if done.returncode:
        raise Failed((done.stderr.strip().splitlines() or ["it said nothing"])[-1])
    return done.stdout.strip()


PARTS: Mapping[str, Callable[[Bench], str]] = {
    "resume": resume,
    "two processes, NCCL": two_processes,
    "a step of FLUX.1-dev": flux_step,
}


def missing(name: str) -> str:
    """Why a part cannot run here; empty where it can."""
    import torch

    gpu, reason = find_gpu()
    if gpu is None or not torch.cuda.is_available():
        return reason or f"torch {torch.__version__} is built without CUDA"
    if name.startswith("two") and torch.cuda.device_count() < 2:
        return "NCCL needs a GPU for each process, and here is one"
    if name.startswith("a step") and torch.cuda.mem_get_info()[1] < 60e9:
        return "it needs a GPU of 60 GB"
    return ""


def main() -> None:
    """Run what can run and print the table."""
    table, failed = Table("part", "result"), False
    with tempfile.TemporaryDirectory() as folder:
        for name, part in PARTS.items():
            result = missing(name)
            if not result:
                try:
                    result = part(Bench(Path(folder)))
                except Failed as error:
                    failed, result = True, f"failed: {error}"
            table.add_row(name, result)
    Console(width=140).print(table)
    sys.exit(failed)


if __name__ == "__main__":
    main()

"""Run under torchrun by test_processes: a sharded run writes a checkpoint and is killed, or goes on from one."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from student.families.family import Family
from student.families.find import family_of
from student.families.flux import Flux
from student.families.two_experts import joined
from student.pipeline import open_pipeline
from tests.student.families import tiny
from training.config import changed
from training.offload import OffloadedAdamW
from training.processes import process_group
from training.rats.config import RatsConfig
from training.rats.roles import Roles
from training.rats.trainer import Trainer
from training.sampler import Sampler
from training.sharding import gathered

KINDS: dict[str, dict[str, Any]] = {
    "full": {},
    "offload": {"optim.state": "offload"},
    "lora": {"lora.rank": 2, "gradient.mode": "detached", "compute.precision": "bf16"},
}


def trainer(model: Family, run_dir: Path, more: dict[str, Any], shape: tuple[int, ...] = (4, 8, 8)) -> Trainer:
    base = {
        "steps": 4,
        "optim.batch": 1,
        "optim.accumulate": 2,
        "teacher.nfe": 3,
        "student.nfe": (2,),
        "optim.lr": 1e-3,
    }
    config = changed(RatsConfig(), {"compute.shard": True, "compute.precision": "fp32", **base, **more})

    def reward(images: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        return images.flatten(1).mean(1)

    def validate(samplers: Sequence[Sampler], step: int) -> dict[str, float]:
        return {"heldout_validation": float(step)}

    return Trainer(
        config,
        Roles.of(config, model),
        run_dir,
        prompts=lambda step, num: (["a red heart", "a blue star"] * num)[:num],
        reward=reward,
        validate=validate,
        latent_shape=shape,
    )


def of_family(name: str, run_dir: Path) -> Trainer:
    """A run of a tiny pipeline of the real classes; every second family's trains adapters."""
    model = joined(family_of(tiny.MAKERS[name](), max_tokens=tiny.MAX_TOKENS))
    shape = model.latent_shape(32, 32, 5 if name.startswith("wan") else 1)
    lora = list(tiny.MAKERS).index(name) % 2
    return trainer(
        model, run_dir, {"optim.accumulate": 1, "student.nfe": (2,), **(KINDS["lora"] if lora else {})}, shape
    )


def everything(running: Trainer) -> dict[str, Any]:
    """All that a checkpoint must bring back, whole, in the first process."""
    tensors, adam_steps = running._slices()
    scalars = {"adam_steps": adam_steps, "best_at": running.best_at, "method": running.method.state()}
    return {**gathered(tensors, keep=running.is_first), **scalars}


def write(running: Trainer, reference: Path) -> None:
    """Two steps, their checkpoint, and the same apart from it."""
    running._validate(0)
    for step in range(2):
        running._step(step)
    running.best_at = 2
    running._save(2)
    state = everything(running)
    if running.is_first:
        torch.save(state, reference)
        (running.run_dir / "checkpoint.part").mkdir()  # of a checkpoint that was being written
    running.processes.wait()


def go_on(running: Trainer, reference: Path) -> None:
    assert running._resume() == 2
    state = everything(running)
    if running.is_first:
        expected = torch.load(reference)
        for group, value in expected.items():
            if isinstance(value, dict) and group != "method":
                assert value.keys() == state[group].keys() and len(value) > 2
                assert all(torch.equal(tensor, state[group][name]) for name, tensor in value.items()), group
            else:
                assert state[group] == value, group
        assert any(tensor.abs().sum() > 0 for tensor in expected["exp_avg"].values())
        # What no call reads, as of two experts the one that the student's steps do not need, has made no step.
        assert {2.0} <= set(expected["adam_steps"]) <= {0.0, 2.0}
    assert running._step(2)["grad_norm"] > 0
    running._save(3)
    state = everything(running)
    if running.is_first:
        torch.save(state, reference.with_name("on.pt"))


def same(one: dict[str, Any], other: dict[str, Any]) -> None:
    """The same bits in every tensor: of weights, averages and moments."""
    groups = [group for group, value in one.items() if isinstance(value, dict) and group != "method"]
    assert {"student", "teacher", "exp_avg", "exp_avg_sq"} <= set(groups)
    for group in groups:
        assert all(torch.equal(value, other[group][name]) for name, value in one[group].items()), group


def main(folder: Path, out: Path, what: str) -> None:
    torch.set_num_threads(1)
    for kind in KINDS:
        running = trainer(Flux(open_pipeline(folder), max_tokens=12), out / kind, KINDS[kind])
        assert isinstance(running.optimizer, OffloadedAdamW) == (kind == "offload")
        (write if what == "killed" else go_on)(running, out / kind / "killed.pt")
        if kind == "offload" and running.is_first:
            same(*(torch.load(out / one / f"{what}.pt") for one in ("full", "offload")))
    for name in tiny.MAKERS:
        (write if what == "killed" else go_on)(of_family(name, out / name), out / name / "killed.pt")
    if what == "killed":
        os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    with process_group():
        main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])

"""Run under torchrun by test_processes: a network spread over the processes against the same one whole."""

from __future__ import annotations

import copy
import sys
from pathlib import Path

import torch
from diffusers import FluxPipeline

from student.families.flux import Flux
from student.pipeline import open_pipeline
from training.processes import Processes, process_group
from training.rats.roles import Lora, Roles
from training.sharding import gathered, optimizer_like, unsharded

SIGMAS = (1.0, 0.5)


def loss_of(roles: Roles, seed: int) -> torch.Tensor:
    x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(seed))
    condition = roles.model.encode(["a red heart", "a blue star"])
    for sigma in SIGMAS:
        x = x - 0.5 * roles.model.velocity(x, sigma, condition)
    return x.square().mean()


def step(roles: Roles, optimizer: torch.optim.Optimizer, processes: Processes, seeds: list[int]) -> None:
    """One step on the mean loss of two seeds, of which each process has its share."""
    optimizer.zero_grad()
    mine = processes.share(seeds) if roles.sharded else seeds
    for seed in mine:
        (loss_of(roles, seed) / len(mine)).backward()
    optimizer.step()
    roles.follow()


def main(folder: Path, lora: Lora | None) -> None:
    torch.set_num_threads(1)
    processes = Processes()
    model = Flux(open_pipeline(folder), max_tokens=12)
    one = Roles(copy.deepcopy(model), 0.5, lora)
    torch.manual_seed(processes.is_first)  # what else draws random numbers must not matter to the adapters' start
    two = Roles(copy.deepcopy(model), 0.5, lora, processes.size)
    optimizers = [torch.optim.Adam(n.trainable, 1e-3, eps=1e-3) for n in (one, two)]
    for at in range(2):
        for roles, optimizer in zip((one, two), optimizers, strict=True):
            step(roles, optimizer, processes, [2 * at, 2 * at + 1])
    same(one.student_state(), unsharded(two.student_state()))
    same(flat(one.state()), flat(unsharded(two.state())))
    kept, slots = unsharded(two.state()), copy.deepcopy(unsharded(optimizers[1].state_dict()))
    state = gathered(two.state(), keep=processes.is_first)
    if processes.is_first:
        same(flat(one.state()), flat(state))
    else:
        assert set(state["student"].values()) == {None}, "a process that keeps nothing held a whole tensor"
    step(two, optimizers[1], processes, [7, 8])
    further, parts = unsharded(two.student_state()), two.student_state()
    two.load_state(kept)
    optimizers[1].load_state_dict(optimizer_like(slots, two.trainable))
    step(two, optimizers[1], processes, [7, 8])
    again = unsharded(two.student_state())
    assert all(torch.equal(value, further[name]) for name, value in again.items()), "not resumed exactly"
    two.load_student(kept["student"])
    two.load_student(parts)
    assert all(torch.equal(value, further[name]) for name, value in unsharded(two.student_state()).items()), "parts"
    step(one, optimizers[0], processes, [7, 8])
    two.gather(keep=processes.is_first)
    if processes.is_first:
        if lora:
            two.merge(folder.parent / f"adapter-{lora.rank}", FluxPipeline)
            one.merge(folder.parent / f"adapter-{lora.rank}-one", FluxPipeline)
        same(one.model.transformer.state_dict(), two.model.transformer.state_dict())


def flat(state: dict) -> dict[str, torch.Tensor]:
    return {str(i): value for i, value in enumerate(state["teacher"])}


def same(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> None:
    assert one.keys() == two.keys()
    worst = max(float((value - two[name]).abs().max()) for name, value in one.items())
    assert worst < 1e-6, worst


if __name__ == "__main__":
    with process_group():
        main(Path(sys.argv[1]), Lora(2, 4.0) if sys.argv[2] == "lora" else None)

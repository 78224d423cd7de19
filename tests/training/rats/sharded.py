"""Run under torchrun by test_processes: a network spread over the processes against the same one whole."""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from diffusers import FluxPipeline
from torch.distributed.fsdp._fully_shard import _fsdp_param_group

from student.families.flux import Flux
from student.pipeline import open_pipeline
from training.processes import Processes, process_group
from training.rats.roles import Lora, Roles, Sharding
from training.sharding import gathered, unsharded

SIGMAS = (1.0, 0.5)


def loss_of(roles: Roles, seed: int) -> torch.Tensor:
    x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(seed))
    condition = roles.model.encode(["a red heart", "a blue star"])
    for sigma in SIGMAS:
        x = x - 0.5 * roles.model.velocity(x, sigma, condition)
    return x.square().mean()


def step(roles: Roles, optimizer: torch.optim.Optimizer, processes: Processes, seeds: list[int]) -> None:
    """One step on the mean loss of some seeds, of which each process has its share."""
    optimizer.zero_grad()
    mine = processes.share(seeds) if roles.sharded else seeds
    for seed in mine:
        roles.reduce(seed == mine[-1])
        loss = loss_of(roles, seed) / len(mine)
        with roles.backward():
            loss.backward()
    optimizer.step()
    roles.follow()


def drawn(roles: Roles) -> torch.Tensor:
    """What the teacher makes of a noise."""
    x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    with roles.role("teacher") as teacher:
        return teacher.velocity(x, 0.5, teacher.encode(["a red heart", "a blue star"])).clone()


def main(folder: Path, lora: Lora | None) -> None:
    torch.set_num_threads(1)
    processes = Processes()
    model = Flux(open_pipeline(folder), max_tokens=12)
    one = Roles(copy.deepcopy(model), 0.5, lora)
    torch.manual_seed(processes.is_first)  # what else draws random numbers must not matter to the adapters' start
    two = Roles(copy.deepcopy(model), 0.5, lora, processes.size)
    optimizers = [torch.optim.Adam(n.trainable, 1e-3, eps=1e-3) for n in (one, two)]
    before = drawn(one)
    for at in range(2):
        for roles, optimizer in zip((one, two), optimizers, strict=True):
            drawn(roles)  # a step asks its teacher first
            step(roles, optimizer, processes, [4 * at + i for i in range(4)])
    torch.testing.assert_close(drawn(two), drawn(one), atol=1e-5, rtol=1e-4)
    assert (drawn(two) - before).abs().max() > 1e-3, "the teacher has moved, and draws so"
    same(one.student_state(), unsharded(two.student_state()))
    same(flat(one.state()), flat(unsharded(two.state())))
    kept, slots = unsharded(two.state()), copy.deepcopy(optimizers[1].state_dict())
    state = gathered(two.state(), keep=processes.is_first)
    if processes.is_first:
        same(flat(one.state()), flat(state))
    else:
        assert set(state["student"].values()) == {None}, "a process that keeps nothing held a whole tensor"
    step(two, optimizers[1], processes, [7, 8])
    further, parts = unsharded(two.student_state()), two.student_state()
    two.load_state(kept)
    optimizers[1].load_state_dict(slots)
    step(two, optimizers[1], processes, [7, 8])
    again = unsharded(two.student_state())
    assert all(torch.equal(value, further[name]) for name, value in again.items()), "not resumed exactly"
    two.load_student(kept["student"])
    two.load_student(parts)
    assert all(torch.equal(value, further[name]) for name, value in unsharded(two.student_state()).items()), "parts"
    if not lora:
        units = 3  # a double block, a single block, and what is outside of them, which stays whole by itself
        assert [gatherings(model, processes, frugal) for frugal in (False, True)] == [units, 1 + 3 * (units - 1)]
        # What the first three micro-batches have added up goes on its way apart from what the last one adds.
        assert [reductions(model, processes, frugal) for frugal in (False, True)] == [2 * units, 4 * units]
        assert digits(model, processes), "gradients were added up in bf16"
        assert narrow_start(model, processes), "a start in bf16 draws something else when it is sharded"
    step(one, optimizers[0], processes, [7, 8])
    two.gather(keep=processes.is_first)
    if processes.is_first:
        if lora:
            two.merge(folder.parent / f"adapter-{lora.rank}", FluxPipeline)
            one.merge(folder.parent / f"adapter-{lora.rank}-one", FluxPipeline)
        same(one.model.transformer.state_dict(), two.model.transformer.state_dict())


def gatherings(model: Flux, processes: Processes, frugal: bool) -> int:
    """How often slices come together in a rollout of three calls."""
    counts: list[int] = []
    original = _fsdp_param_group.foreach_all_gather

    def counted(*args: Any, **kwargs: Any) -> Any:
        counts.append(1)
        return original(*args, **kwargs)

    roles = Roles(copy.deepcopy(model), 0.5, None, processes.size, sharding=Sharding(in_bf16=True, frugal=frugal))
    x, condition = torch.randn(2, 4, 8, 8), model.encode(["a red heart", "a blue star"])
    with (
        torch.autocast("cpu", torch.bfloat16),
        patch.object(_fsdp_param_group, "foreach_all_gather", counted),
        roles.role("teacher") as teacher,
    ):
        for sigma in (1.0, 0.5, 0.2):
            assert teacher.velocity(x, sigma, condition).dtype == x.dtype
    assert roles.trainable[0].dtype == torch.float32
    return len(counts)


def reductions(model: Flux, processes: Processes, frugal: bool) -> int:
    """How often gradients are averaged in a step of four micro-batches for each process."""
    roles = Roles(copy.deepcopy(model), 0.5, None, processes.size, sharding=Sharding(frugal=frugal))
    original = _fsdp_param_group.foreach_reduce
    with patch.object(_fsdp_param_group, "foreach_reduce", side_effect=original) as reduce:
        step(roles, torch.optim.SGD(roles.trainable, 1e-3), processes, list(range(8)))
    return reduce.call_count


def digits(model: Flux, processes: Processes) -> bool:
    """Whether the mean of two processes' gradients has more digits than bf16, which a run computes in."""
    roles = Roles(copy.deepcopy(model), 0.5, None, processes.size, sharding=Sharding(in_bf16=True))
    roles.reduce(True)
    with torch.autocast("cpu", torch.bfloat16), roles.backward():
        loss_of(roles, int(processes.is_first)).backward()
    gradients = unsharded([parameter.grad for parameter in roles.trainable if parameter.grad is not None])
    return any(not torch.equal(gradient, gradient.bfloat16().float()) for gradient in gradients)


def narrow_start(model: Flux, processes: Processes) -> bool:
    """Whether a frozen start in bf16 draws, sharded, what it draws whole; what learns is in fp32."""
    pictures = []
    for num in (1, processes.size):
        sharding = Sharding(in_bf16=True)
        roles = Roles(copy.deepcopy(model), 0.5, None, num, sharding=sharding, start_in=torch.bfloat16)
        x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(3))
        with torch.autocast("cpu", torch.bfloat16), roles.role("start") as start:
            assert {parameter.dtype for parameter in start.transformer.parameters()} == {torch.bfloat16}
            pictures.append(start.velocity(x, 0.5, start.encode(["a red heart", "a blue star"])).clone())
        assert {parameter.dtype for parameter in roles.trainable} == {torch.float32}
    return torch.equal(*pictures)


def flat(state: dict) -> dict[str, torch.Tensor]:
    return {str(i): value for i, value in enumerate(state["teacher"])}


def same(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> None:
    assert one.keys() == two.keys()
    worst = max(float((value - two[name]).abs().max()) for name, value in one.items())
    assert worst < 1e-6, worst


if __name__ == "__main__":
    with process_group():
        main(Path(sys.argv[1]), Lora(2, 4.0) if sys.argv[2] == "lora" else None)

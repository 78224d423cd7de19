"""Settings that change how a run computes and nothing of what it computes: rollouts together, checkpoints in between,
compiled blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from rewards import interface
from rewards.weighted import Term
from student.families import family
from student.families.find import family_of
from tests.student.families import tiny
from tests.training.rats.test_wiring import figures, make, networks, step, weight
from training import checkpoint, timing
from training.config import changed
from training.processes import buckets
from training.rats.config import RatsConfig
from training.rats.method import Batch, reward_of_latents
from training.rats.roles import Lora, Roles


@pytest.mark.parametrize(("batch", "sizes"), [(0, (2, 2, 2)), (4, (4, 2)), (5, (4, 2)), (6, (6,)), (100, (6,))])
def test_the_teacher_draws_so_many_samples_at_a_time_and_the_step_is_the_same(
    batch: int, sizes: tuple[int, ...], tmp_path: Path
) -> None:
    plain = make(tmp_path, {"optim.accumulate": 3, "teacher.guided_steps": 0})
    step(plain, 0)
    trainer = make(tmp_path, {"optim.accumulate": 3, "teacher.guided_steps": 0, "teacher.batch": batch})
    known, asked = networks(trainer), step(trainer, 0)
    teacher = [call for call in asked if call.network == known["teacher"]]
    assert [len(call.x) for call in teacher] == [size for size in sizes for _ in range(3)], "three steps each"
    assert [len(call.x) for call in asked if call.network == known["student"]] == [2] * 6
    assert weight(trainer, "student") == pytest.approx(weight(plain, "student"), rel=1e-6)


@pytest.mark.parametrize(("minutes", "saved_after"), [(10.0, [4]), (1e-9, [1, 2, 3, 4])])
def test_a_checkpoint_is_written_after_so_many_minutes_beside_those_of_validations(
    minutes: float, saved_after: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved: list[int] = []
    real = checkpoint.save
    monkeypatch.setattr(checkpoint, "save", lambda path, state: (saved.append(state["step"]), real(path, state)))
    more = {"compute.save_minutes": minutes, "validation.every": 4}
    make(tmp_path, more, lambda samplers, at: figures()).run()
    assert saved == saved_after


def test_the_time_between_checkpoints_is_in_minutes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved: list[int] = []
    monkeypatch.setattr(checkpoint, "save", lambda path, state: saved.append(state["step"]))
    trainer = make(tmp_path, {"compute.save_minutes": 1.0, "validation.every": 4}, lambda samplers, at: figures())
    now, real = 0.0, trainer._step

    def slow(at: int) -> dict[str, float]:
        nonlocal now
        now += 25.0
        return real(at)

    monkeypatch.setattr(trainer, "_step", slow)
    monkeypatch.setattr("training.rats.trainer.time", SimpleNamespace(monotonic=lambda: now))
    trainer.run()
    assert saved == [3, 4], "after 75 seconds, and with the validation"


def test_a_validation_has_the_memory_of_the_gradients(tmp_path: Path) -> None:
    seen: list[bool] = []

    def validate(samplers: object, at: int) -> dict[str, float]:
        seen.append(any(parameter.grad is not None for parameter in trainer.roles.trainable))
        return figures()

    trainer = make(tmp_path, {"validation.every": 2}, validate)
    trainer.run()
    assert seen == [False] * 3, "before the run, in it and at its end"


def test_a_step_tells_what_decoding_and_scoring_take_wherever_they_are_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a clock that only a network (1 s a call), the decoder (100 s) and the reward (10,000 s) move."""
    now = [0.0]
    monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])
    running = make(tmp_path, {"optim.accumulate": 2, "teacher.guided_steps": 0})
    model, score = running.roles.model, running.method._reward_of

    def slow(function: Any, seconds: float) -> Any:
        def call(*arguments: Any) -> Any:
            now[0] += seconds
            return function(*arguments)

        return call

    model.velocity, model.decode = slow(model.velocity, 1), slow(model.decode, 100)
    running.method._reward_of = slow(score, 10_000)
    log = running._step(0)
    assert (log["teacher_s"], log["student_s"]) == (2 * (3 + 10_100), 2 * (2 + 10_100)), "inside of the other parts"
    assert (log["decode_s"], log["reward_s"], log["backward_s"]) == (4 * 100, 4 * 10_000, 0)
    assert log["samples"] == 4 and running._step(1)["samples"] == 8


def gradients(roles: Roles, x: Tensor) -> tuple[Tensor, list[Tensor]]:
    velocity = roles.model.velocity(x, 0.5, roles.model.encode(["a red heart"]))
    found = torch.autograd.grad(velocity.square().mean(), roles.trainable)
    return velocity.detach(), list(found)


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # dynamo looks at it
def test_compiled_blocks_are_the_same_in_every_role_and_are_compiled() -> None:
    x = torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(3))
    plain, compiled = (
        Roles(family_of(tiny.flux(), max_tokens=tiny.MAX_TOKENS), 0.5, Lora(2, 4.0), compile_with=backend)
        for backend in ("", "eager")
    )
    for roles in (plain, compiled):
        with torch.no_grad():
            for parameter in roles.trainable:
                parameter.add_(0.1)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    for one, other in zip(gradients(plain, x)[1], gradients(compiled, x)[1], strict=True):
        torch.testing.assert_close(other, one, atol=1e-6, rtol=1e-4)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 2, "a block of each kind"
    for name in ("teacher", "start", "student"):
        drawn = []
        for roles in (plain, compiled):
            with roles.role(name) as model, torch.no_grad():
                drawn.append(model.velocity(x, 0.5, model.encode(["a red heart"])))
        torch.testing.assert_close(drawn[1], drawn[0], atol=1e-6, rtol=1e-4)
    assert plain.student_state().keys() == compiled.student_state().keys(), "a checkpoint of one is one of the other"
    torch._dynamo.reset()


def test_a_bucket_has_one_type_and_at_most_so_many_bytes_in_order() -> None:
    sizes = (3, 2, 1, 9, 4, 4)
    tensors = [torch.zeros(size, dtype=torch.float64 if size == 1 else torch.float32) for size in sizes]
    found = buckets(tensors, 4 * 5)
    assert [[len(one) for one in bucket] for bucket in found] == [[3, 2], [1], [9], [4], [4]], "9 is alone too large"
    assert [id(one) for bucket in found for one in bucket] == [id(one) for one in tensors]
    assert [len(bucket) for bucket in buckets(tensors[4:], 4 * 8)] == [2] and buckets([], 1) == []


def test_the_peak_memory_is_logged_in_gb_where_there_is_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    assert timing.peak_memory() == {}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 23_500_000_000)
    assert timing.peak_memory() == {"memory_gb": 23.5}


def test_what_goes_to_a_gpu_goes_by_pinned_memory_and_nobody_waits_and_what_returns_is_waited_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[tuple[str, bool]] = []
    pinned: list[Tensor] = []
    monkeypatch.setattr(Tensor, "pin_memory", lambda self: pinned.append(self) or self)
    monkeypatch.setattr(
        Tensor, "to", lambda self, device, non_blocking=False: asked.append((str(device), non_blocking)) or self
    )
    for send in (family.sent, interface.sent):
        asked.clear()
        pinned.clear()
        here, there = torch.ones(3), torch.ones(3, device="meta")
        send(here, "cuda")
        send(there, "cpu")
        assert asked == [("cuda", True), ("cpu", False)] and [id(one) for one in pinned] == [id(here)]


class Squares:
    """A reward of which the gradient needs its last tensor: that is where computing it again ends."""

    differentiable = True

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return images.flatten(1).square().mean(1)


@pytest.mark.parametrize("mode", ["full", "low_variance", "detached"])
def test_a_reward_that_is_computed_again_has_the_same_gradient(mode: str) -> None:
    model = family_of(tiny.flux(), max_tokens=tiny.MAX_TOKENS)
    reward = Term("squares", Squares())
    x = torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(3))
    batch = Batch(0, 0, 1, ["a red heart", "a blue star"], x)
    found = []
    for checkpointing in (False, True):
        config = changed(RatsConfig(), {"gradient.mode": mode, "compute.checkpointing": checkpointing})
        latents = x.clone().requires_grad_()
        value = reward_of_latents(config, model, reward.raw, latents, batch)
        found.append((value.detach(), *torch.autograd.grad(value.sum(), latents)))
    for one, again in zip(*found, strict=True):
        torch.testing.assert_close(one, again)
    assert found[0][1].abs().max() > 0

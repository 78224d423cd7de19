"""Everything that is random in training depends on the run's seed, the step, and the place in the step."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.training.rats.test_wiring import make
from training.config import changed
from training.rats.config import RatsConfig
from training.rats.gate import Gate
from training.rats.method import Batch
from training.rats.rats import Rats

MANY = {"student.nfe": (2, 3, 5), "optim.batch": 2, "optim.accumulate": 3}


def noise(trainer: Any, step: int) -> torch.Tensor:
    return torch.cat([batch.noise_BCHW for batch in trainer._batches(step)])


def test_a_steps_noise_is_of_its_seed_and_step_and_is_the_same_for_any_split(tmp_path: Path) -> None:
    """Two processes, or a larger micro-batch, see what one does with several."""
    trainer = make(tmp_path, MANY)
    first = noise(trainer, 3)
    assert first.shape == (6, 2, 2, 2) and torch.equal(first, noise(make(tmp_path, MANY), 3))
    whole = make(tmp_path, {**MANY, "optim.batch": 6, "optim.accumulate": 1})
    assert torch.equal(noise(whole, 3), first)
    others = [noise(trainer, 4), noise(make(tmp_path, {**MANY, "seed": 402}), 3)]
    assert not any(torch.equal(first, other) for other in others)
    batches = trainer._batches(3)
    assert [(batch.step, batch.at) for batch in batches] == [(3, 0), (3, 2), (3, 4)]
    assert [len(batch.prompts[0]) for batch in batches] == [1, 3, 5], "each has its own prompts"


def test_a_step_has_one_step_count_for_all_and_each_comes_up(tmp_path: Path) -> None:
    trainer = make(tmp_path, MANY)
    counts = [{batch.nfe for batch in trainer._batches(step)} for step in range(40)]
    assert all(len(found) == 1 for found in counts) and set.union(*counts) == {2, 3, 5}
    other = make(tmp_path, {**MANY, "seed": 402})
    assert [other._batches(step)[0].nfe for step in range(40)] != [found.copy().pop() for found in counts]


def test_of_two_processes_each_has_its_share(tmp_path: Path) -> None:
    settings = {**MANY, "optim.accumulate": 2}
    alone = make(tmp_path, {**settings, "optim.accumulate": 4})
    expected = [batch.noise_BCHW for batch in alone._batches(5)]
    for index in (0, 1):
        trainer = make(tmp_path, settings)
        trainer.processes._state = SimpleNamespace(num_processes=2, process_index=index)  # type: ignore[assignment]
        found = trainer._batches(5)
        assert [batch.at for batch in found] == [2 * index, 2 * index + 4], "in turns"
        assert all(torch.equal(batch.noise_BCHW, expected[batch.at // 2]) for batch in found)


def sigmas(folder: Path, method: str, seed: int) -> list[float]:
    """The random point of each of twelve micro-batches."""
    more = {"method": method, "seed": seed, "student.nfe": (8,), "teacher.nfe": 8, "teacher.guided_steps": 0}
    more |= {} if method == "tune" else {"reward.weight": 0.0}
    trainer = make(folder, more)
    prompts, found = ["x", "xx"], []
    for step, at in ((step, at) for step in range(4) for at in (0, 2, 4)):
        [batch] = trainer.method.teach([Batch(step, at, 8, prompts, torch.ones(2, 2, 2, 2))])
        found.append(float(trainer.method.step(batch).log["sigma"]))
    return found


@pytest.mark.parametrize("method", ["consistency", "tune"])
def test_a_random_point_depends_on_the_seed_the_step_and_the_place(method: str, tmp_path: Path) -> None:
    found = sigmas(tmp_path, method, 401)
    assert found == sigmas(tmp_path, method, 401) and found != sigmas(tmp_path, method, 402)
    assert len(set(found)) > 3 and len(set(found[:3])) + len(set(found[::3])) > 3


def test_the_noise_of_a_repeated_step_is_fresh_and_of_its_seed(tmp_path: Path) -> None:
    def more(seed: int = 401, step: int = 3, at: int = 0, mode: str = "low_variance") -> list[torch.Tensor]:
        config = changed(RatsConfig(), {"gradient.mode": mode, "seed": seed})
        nothing: Any = None
        return Rats(config, nothing, nothing, {})._more_noise(Batch(step, at, 4, ["a"] * 50, torch.zeros(50, 4, 8, 8)))

    [first] = more()
    assert first.shape == (50, 4, 8, 8) and abs(float(first.mean())) < 0.05 and abs(float(first.std()) - 1) < 0.05
    assert torch.equal(first, more()[0])
    for other in (more(seed=402), more(step=4), more(at=2)):
        assert not torch.equal(first, other[0])
    assert [more(mode=mode) for mode in ("full", "detached", "last_k")] == [[], [], []]


def test_a_shuffled_gate_is_shuffled_by_its_seed() -> None:
    rewards = torch.arange(16.0), torch.zeros(16)
    batch = Batch(3, 0, 4, (), torch.zeros(0))
    one, same, other = (
        Gate(changed(RatsConfig(), {"gate.kind": "shuffled", "seed": seed})).weights(*rewards, batch)
        for seed in (401, 401, 402)
    )
    assert torch.equal(one, same) and not torch.equal(one, other)


def test_uses_are_kept_apart_within_a_micro_batch_and_micro_batches_within_a_step() -> None:
    drawn = {
        float(torch.rand((), generator=Batch(step, at, 4, (), torch.zeros(0)).generator(seed)))
        for step in range(3)
        for at in (0, 1, 2)
        for seed in (0, 401 * 7_000_003, 401 * 9_000_011)
    }
    assert len(drawn) == 27

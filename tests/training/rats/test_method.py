"""What a step's figures are made of, and what is decoded for the reward."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch

from student.families.flux import Flux
from student.pipeline import open_pipeline
from tests.training.shapes import small
from training import processes
from training.config import changed
from training.prompts import Prompts
from training.rats.config import RatsConfig
from training.rats.method import Batch, step_statistics
from training.rats.peers import Matching
from training.rats.rats import SMALLEST_GAP_STD, Rats, reward_window
from training.rats.roles import Roles
from training.rats.setup import prompts_of_run
from training.sampler import Sampler
from training.sharding import shard_like


def test_a_steps_deviation_is_that_of_all_its_samples() -> None:
    """Two micro-batches, whose own deviations are 0."""
    gaps, gates = np.array([0.25, 1.25]), np.array([0.5, 0.9])
    means = {
        "gap": gaps.mean(),
        "gap_square": (gaps**2).mean(),
        "gate_mean": gates.mean(),
        "gate_square": (gates**2).mean(),
    }
    found = step_statistics({**means, "loss": 2.0})
    assert found.keys() == {"gap", "gap_std", "gate_mean", "gate_std", "loss"}
    assert found["gap_std"] == pytest.approx(gaps.std()) and found["gate_std"] == pytest.approx(gates.std())


def test_samples_that_are_all_alike_leave_tau_above_0() -> None:
    method = Rats(changed(RatsConfig(), {"gate.tau_in_std": True}), None, None, {})  # type: ignore[arg-type]
    method.after_step({"gap_std": 0.0})
    assert method.gap_std == SMALLEST_GAP_STD
    method.after_step({"gap_std": 1.0})
    assert method.gap_std == pytest.approx(0.9 * SMALLEST_GAP_STD + 0.1)


def test_the_window_walks_through_the_video_and_gives_gradient_there_alone() -> None:
    x = torch.arange(5.0).reshape(1, 1, 5, 1, 1).requires_grad_()
    seen = [reward_window(x, 2, step).flatten().tolist() for step in range(5)]
    assert seen == [[0, 1], [1, 2], [2, 3], [3, 4], [0, 1]]
    reward_window(x, 2, 1).sum().backward()
    assert x.grad is not None and x.grad.flatten().tolist() == [0, 1, 1, 0, 0]
    picture = torch.zeros(2, 4, 8, 8)
    assert reward_window(picture, 2, 1) is picture and reward_window(x, 5, 1) is x


def test_a_saved_tensor_goes_to_the_device_of_what_it_is_for() -> None:
    """A checkpoint is read into main memory; the average of a network on a GPU must not stay there."""
    assert shard_like(torch.zeros(2), torch.empty(2, device="meta")).device.type == "meta"
    assert shard_like(torch.tensor(3.0), torch.empty(2, device="meta")).device.type == "cpu"  # an optimizer's step


def test_what_processes_agree_on_lies_on_their_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """NCCL moves what lies on a GPU and refuses the rest; a device that is not the CPU stands for it."""

    class Elsewhere:
        num_processes, process_index, is_main_process, device = 2, 0, True, torch.device("meta")

    seen = []

    def reduce(tensor: torch.Tensor, kind: str) -> torch.Tensor:
        seen.append(tensor.device.type)
        return torch.full(tensor.shape, 2.0)

    monkeypatch.setattr(processes, "state", Elsewhere)
    monkeypatch.setattr(processes, "reduce", reduce)
    assert processes.Processes().agree(True) and processes.Processes().mean({"a": 1.0}) == {"a": 2.0}
    assert seen == ["meta", "meta"]


def test_a_picture_that_is_no_number_does_not_reach_the_critic(tmp_path: Path) -> None:
    small.write_models(tmp_path)
    roles = Roles(Flux(open_pipeline(tmp_path / "shapes-teacher"), max_tokens=12), 0.9)
    config = changed(RatsConfig(), {"method": "matching", "compute.precision": "fp32", "teacher.guidance": 2.0})
    matching = Matching(config, roles, None, {2: (1.0, 0.5)})  # type: ignore[arg-type]
    before = copy.deepcopy(matching.state()["critic"])
    noise = torch.full((1, 4, 8, 8), torch.nan)
    loss, _, _ = matching.step(Batch(0, 0, 2, ["a red heart"], noise))
    assert not loss.isfinite()
    assert all(torch.equal(value, before[name]) for name, value in matching.state()["critic"].items())
    loss, _, _ = matching.step(Batch(1, 0, 2, ["a red heart"], torch.randn(1, 4, 8, 8)))
    assert loss.isfinite()
    assert any(not torch.equal(value, before[name]) for name, value in matching.state()["critic"].items())


def test_of_a_long_file_only_the_prompts_of_the_runs_own_steps_are_encoded() -> None:
    def drawn(step: int, num: int) -> list[str]:
        return [f"{step}.{i}" for i in range(num)]

    config = changed(
        RatsConfig(), {"steps": 2, "optim.batch": 2, "optim.accumulate": 2, "teacher.negative_prompt": "blurred"}
    )
    prompts = Prompts(drawn, ["calibration"], ["validation"], ["test"], of_file=True)
    assert prompts_of_run(config, prompts) == [
        "blurred",
        "calibration",
        "validation",
        "test",
        *drawn(0, 4),
        *drawn(1, 4),
    ]


def test_guidance_leads_away_from_the_negative_prompt(tmp_path: Path) -> None:
    """v_negative + w (v - v_negative), against the two velocities taken one by one."""
    small.write_models(tmp_path)
    model = Flux(open_pipeline(tmp_path / "shapes-teacher"), max_tokens=12)
    x = torch.randn(1, 4, 8, 8)
    field = Sampler(model, (1.0,), 3.0, "a blue star").velocity(["a red heart"])
    with torch.no_grad():
        plain, negative = (model.velocity(x, 0.5, model.encode([text])) for text in ("a red heart", "a blue star"))
        torch.testing.assert_close(field(x, 0.5), negative + 3 * (plain - negative))


def _gates(kind: str, step: int = 3) -> torch.Tensor:
    method = Rats(changed(RatsConfig(), {"gate.kind": kind, "gate.tau": 0.5}), None, None, {})  # type: ignore[arg-type]
    batch = Batch(step, 0, 2, ["a"] * 6, torch.zeros(6, 1))
    return method._gate(torch.tensor([0.0, 1, 2, 0, 1, 5]), torch.tensor([0.0, 0, 0, 1, 1, 0]), batch)


def test_the_gate_s_controls_keep_its_mean_or_its_weights_and_lose_who_they_are_for() -> None:
    reward = _gates("reward")
    torch.testing.assert_close(_gates("batch_mean"), torch.full((6,), reward.mean().item()))
    shuffled = _gates("shuffled")
    torch.testing.assert_close(shuffled.sort().values, reward.sort().values)
    assert not torch.equal(shuffled, reward) and torch.equal(shuffled, _gates("shuffled"))
    assert not torch.equal(shuffled, _gates("shuffled", step=4))
    torch.testing.assert_close(_gates("signed"), 2 * reward - 1)
    assert (_gates("signed")[3] < 0) and (_gates("signed")[5] > 0.99)

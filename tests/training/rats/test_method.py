"""What a step's figures are made of, and what is decoded for the reward."""

from __future__ import annotations

import copy
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from rewards.weighted import Calibration, Term, Weighted
from student.families.find import family_of
from student.families.flux import Flux
from student.pipeline import open_pipeline
from tests.student.families import tiny
from tests.training.rats.own_reward import Brightness
from tests.training.shapes import small
from training import processes
from training.config import ConfigError, changed
from training.evaluate import Measure
from training.experiment.setup import prompts_of_run
from training.prompts import Prompts
from training.rats.config import RatsConfig
from training.rats.gate import SMALLEST_GAP_STD, Gate
from training.rats.method import Batch, decoded_window, step_statistics
from training.rats.peers import Matching
from training.rats.roles import Roles
from training.sampler import Sampler
from training.scorers import calibrated_on_windows, frame_windows, with_windows
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
    gate = Gate(changed(RatsConfig(), {"gate.tau_in_std": True}))
    gate.after_step({"gap_std": 0.0})
    assert gate.gap_std == SMALLEST_GAP_STD
    gate.after_step({"gap_std": 1.0})
    assert gate.gap_std == pytest.approx(0.9 * SMALLEST_GAP_STD + 0.1)


@pytest.mark.parametrize("step", range(3))
def test_a_window_of_a_video_is_decoded_with_its_past_and_gives_gradient_there_alone(step: int) -> None:
    """On Wan's real causal autoencoder: the window's pictures are those of the whole video."""
    model = family_of(tiny.wan(), max_tokens=tiny.MAX_TOKENS)
    x = torch.randn(1, *model.latent_shape(32, 32, 9), generator=torch.Generator().manual_seed(2)).requires_grad_()
    whole = model.decode(x)
    first, end = frame_windows(1, 3, 9)[step]
    assert (first, end) == [(0, 1), (1, 5), (5, 9)][step] and whole.shape[1] == 9
    window = decoded_window(model, x, 1, step)
    torch.testing.assert_close(window, whole[:, first:end], atol=1e-5, rtol=1e-5)
    window.square().sum().backward()
    assert x.grad is not None
    assert [bool(x.grad[:, :, at].any()) for at in range(3)] == [at == step for at in range(3)]
    later = x.detach()[:, :, step : step + 1].requires_grad_()
    past = x.detach()[:, :, :step]
    expected = model.decode(torch.cat([past, later], 2))[:, first:end].square().sum()
    torch.testing.assert_close(x.grad[:, :, step : step + 1], torch.autograd.grad(expected, later)[0])


def test_windows_walk_through_the_video_and_pictures_are_whole() -> None:
    assert frame_windows(2, 3, 9) == [(0, 5), (1, 9)]
    assert frame_windows(0, 3, 9) == frame_windows(3, 3, 9) == frame_windows(1, None, 1) == []
    model = family_of(tiny.wan(), max_tokens=tiny.MAX_TOKENS)
    x = torch.randn(1, *model.latent_shape(32, 32, 9))
    with torch.no_grad():
        assert [decoded_window(model, x, 2, step).shape[1] for step in range(4)] == [5, 8, 5, 8]
        assert decoded_window(model, x, 0, 1).shape[1] == decoded_window(model, x, 3, 1).shape[1] == 9
    flux = family_of(tiny.flux(), max_tokens=tiny.MAX_TOKENS)
    with torch.no_grad():
        assert decoded_window(flux, torch.randn(2, *flux.latent_shape(32, 32)), 1, 1).shape == (2, 3, 32, 32)


def test_a_trained_reward_of_windows_is_standardised_on_windows() -> None:
    """Each prompt's video scores 0 on its first picture and 1 on the four others."""
    term = Term("trained", Brightness(), asked="brightness")
    trained, windows = Weighted((term,)), frame_windows(1, 2, 5)
    video = torch.cat([torch.zeros(3, 1, 3, 4, 4), torch.ones(3, 4, 3, 4, 4)], 1)
    measure = with_windows(Measure({"trained": term.raw}, None, lambda x: x), trained, windows)
    raw = {name: score(video, ["a"] * 3).tolist() for name, score in measure.scorers.items()}
    found = calibrated_on_windows(trained, raw, windows).terms[0].calibration
    assert found == Calibration.of("x", [0.0, 0.0, 0.0, 1.0, 1.0, 1.0])


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
    gate = Gate(changed(RatsConfig(), {"gate.kind": kind, "gate.tau": 0.5}))
    batch = Batch(step, 0, 2, ["a"] * 6, torch.zeros(6, 1))
    return gate.weights(torch.tensor([0.0, 1, 2, 0, 1, 5]), torch.tensor([0.0, 0, 0, 1, 1, 0]), batch)


def test_the_gate_s_controls_keep_its_mean_or_its_weights_and_lose_who_they_are_for() -> None:
    reward = _gates("reward")
    torch.testing.assert_close(_gates("batch_mean"), torch.full((6,), reward.mean().item()))
    shuffled = _gates("shuffled")
    torch.testing.assert_close(shuffled.sort().values, reward.sort().values)
    assert not torch.equal(shuffled, reward) and torch.equal(shuffled, _gates("shuffled"))
    assert not torch.equal(shuffled, _gates("shuffled", step=4))
    torch.testing.assert_close(_gates("signed"), 2 * reward - 1)
    assert (_gates("signed")[3] < 0) and (_gates("signed")[5] > 0.99)


def test_the_gate_of_disagreement_is_zero_where_two_rewards_agree_and_grows_on_both_sides() -> None:
    gate = Gate(changed(RatsConfig(), {"gate.kind": "disagreement", "gate.tau": 0.5}))
    batch = Batch(3, 0, 2, ["a"] * 4, torch.zeros(4, 1))
    found = gate.weights(torch.full((4,), 9.0), torch.tensor([1.0, 1, 1, -2]), batch, torch.tensor([1.0, 1.5, 0.5, 9]))
    torch.testing.assert_close(found, torch.tensor([0.0, math.tanh(0.5), math.tanh(0.5), math.tanh(11)]))


@pytest.mark.parametrize("more", [{"method": "tune"}, {"reward.frames": 1}])
def test_the_gate_of_disagreement_is_refused_where_nothing_asks_the_second_reward(more: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match="disagreement"):
        changed(RatsConfig(), {"gate.kind": "disagreement", **more})

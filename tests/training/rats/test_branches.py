"""Where a reward without a gradient leads, against closed forms; and a model that is tuned by one."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from rewards.interface import RewardError
from rewards.weighted import require_gradient
from student.families.find import family_of
from tests.student.families import tiny
from tests.training.rats.test_families import OWN, run, settings
from training.config import ConfigError, changed
from training.rats.config import RatsConfig
from training.rats.method import Batch
from training.rats.roles import Roles
from training.rats.tune import Tune, branched, signed_direction
from training.steplog import read_log

NUM, SAMPLES, WIDTH = 6, 3, 5


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.double)


def test_of_a_linear_reward_it_is_the_covariance_times_the_gradient_over_the_deviation() -> None:
    ends_NBD, gradient_D = randn(NUM, SAMPLES, WIDTH), randn(WIDTH)
    found_BD = signed_direction(ends_NBD, ends_NBD @ gradient_D + 7)
    for sample in range(SAMPLES):
        covariance_DD = torch.cov(ends_NBD[:, sample].T, correction=0)
        slope_D = covariance_DD @ gradient_D
        torch.testing.assert_close(found_BD[sample], slope_D / (gradient_D @ slope_D).sqrt())


def test_rewards_that_are_all_the_same_lead_nowhere_and_the_scale_of_a_reward_does_not_matter() -> None:
    ends_NBD, reward_NB = randn(NUM, SAMPLES, WIDTH), randn(NUM, SAMPLES)
    assert not signed_direction(ends_NBD, torch.ones(NUM, SAMPLES, dtype=torch.double)).any()
    torch.testing.assert_close(signed_direction(ends_NBD, 1e3 * reward_NB), signed_direction(ends_NBD, reward_NB))
    torch.testing.assert_close(signed_direction(ends_NBD, -reward_NB), -signed_direction(ends_NBD, reward_NB))


@pytest.mark.parametrize("sigma", [1.0, 0.4])
def test_a_branch_has_the_data_of_its_sample_and_noise_of_the_same_size_at_the_angle(sigma: float) -> None:
    data_BD, noise_BD = torch.randn(2, 20_000), torch.randn(2, 20_000)
    x_BD, v_BD = (1 - sigma) * data_BD + sigma * noise_BD, noise_BD - data_BD
    one, other = branched(x_BD, v_BD, sigma, 2, 0.5, torch.Generator().manual_seed(1))
    own = (one - (1 - sigma) * data_BD) / sigma
    assert float(own.std()) == pytest.approx(1, abs=0.02)
    assert float(torch.cosine_similarity(own, noise_BD).mean()) == pytest.approx(math.cos(0.5), abs=0.02)
    assert not torch.equal(one, other)
    torch.testing.assert_close(branched(x_BD, v_BD, sigma, 1, 0.0, torch.Generator())[0], x_BD)


def test_a_model_is_tuned_by_a_reward_without_gradient() -> None:
    base = {"method": "tune", "tune.branches": 8, "tune.angle": 1.0, "tune.radius": 0.2, "student.nfe": (2,)}
    config = changed(RatsConfig(), {**base, "teacher.ema": 0.5, "compute.precision": "fp32"})
    assert not config.needs_gradient
    model = family_of(tiny.flux(), max_tokens=tiny.MAX_TOKENS)
    roles = Roles(model, config.teacher.ema)
    shape = (4, 4, 4)

    def reward(images: Tensor, prompts: Sequence[str]) -> Tensor:
        with torch.no_grad():
            return images[:, 0].mean((1, 2)) - images[:, 2].mean((1, 2))

    method = Tune(config, roles, reward, {2: model.sigmas(2, shape)})
    optimizer = torch.optim.AdamW(roles.trainable, 1e-3)
    noise, rewards = torch.randn(4, *shape, generator=torch.Generator().manual_seed(2)), []
    for step in range(24):
        [batch] = method.teach([Batch(step, 0, 2, ["a ring"] * 4, noise)])
        assert batch.teacher is not None
        rewards.append(float(reward(model.decode(batch.teacher.x[-1]), []).mean()))
        optimizer.zero_grad()
        method.step(batch).backward()
        optimizer.step()
        roles.follow()
    assert rewards[-1] > rewards[0] + 0.02


def test_one_branch_is_no_comparison() -> None:
    with pytest.raises(ConfigError, match="tune.branches is 1: accepted is 0, or 2 or more"):
        changed(RatsConfig(), {"tune.branches": 1})


def test_a_reward_without_gradient_is_told_where_it_may_train() -> None:
    class Blind:
        differentiable = False

        def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
            return images.mean((1, 2, 3))

    with pytest.raises(RewardError, match="or for the gate, or with --tune and tune.branches"):
        require_gradient("blind", Blind())


def test_the_command_tunes_by_branches_with_a_reward_that_has_no_gradient(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("training.evaluate.CACHE", tmp_path / "cache")
    more = {"reward": f"{OWN}:Counted", "tune.branches": 2, "lora_rank": 2, "warmup": 1}
    given = settings(tmp_path, "flux", **more)
    kept = [at for at, name in enumerate(given[1::2]) if not name.startswith("teacher.")]
    arguments = [part for at in kept for part in given[2 * at : 2 * at + 2]]
    code, text = run("--tune", "--out", str(tmp_path / "out"), *arguments)
    assert code == 0, text
    rows = [row for row in read_log(tmp_path / "out" / "run" / "log.jsonl") if row["step"] >= 0]
    assert len(rows) == 3 and all(row["grad_norm"] > 0 for row in rows)
    config = json.loads((tmp_path / "out" / "run" / "config.json").read_text())
    assert (config["method"], config["tune"]["branches"]) == ("tune", 2)
    code, text = run("--tune", "--out", str(tmp_path / "no"), *arguments, "--set", "tune.branches=0")
    assert code == 2 and "has no gradient" in text and "tune.branches" in text

"""A reward as a service opens it: where it computes, and which rewards get pictures rounded to bytes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from rewards import serving
from tests.rewards import small


class Own:
    differentiable = False

    def __init__(self) -> None:
        self.seen: list[tuple[Tensor, list[str], bool]] = []

    def score(self, images_BCHW: Tensor, prompts: Sequence[str]) -> Tensor:
        self.seen.append((images_BCHW, list(prompts), torch.is_grad_enabled()))
        return images_BCHW.mean((1, 2, 3)).double()


@pytest.mark.parametrize(("gpu", "device"), [(True, "cuda"), (False, "cpu")])
def test_a_reward_is_opened_on_the_gpu_where_there_is_one(
    gpu: bool, device: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked = list[tuple[str, dict[str, Any]]]()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(serving, "find", lambda name, **how: asked.append((name, how)) or Own())
    serving.open_reward("mine:Own", tmp_path)
    serving.open_reward("clip")
    assert asked == [
        ("mine:Own", {"files": tmp_path, "device": device}), ("clip", {"files": serving.FILES, "device": device}),
    ]  # fmt: skip


def test_it_is_asked_in_numpy_without_a_gradient_and_answers_in_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    own = Own()
    monkeypatch.setattr(serving, "find", lambda name, **_: own)
    images = np.random.default_rng(1).random((3, 3, 4, 4), np.float32)
    scores = serving.open_reward("mine:Own")(images, ["a", "b", "c"])
    np.testing.assert_allclose(scores, images.mean((1, 2, 3)), rtol=1e-6)
    [(seen, prompts, gradient)] = own.seen
    assert scores.dtype == np.float32 and torch.equal(seen, torch.from_numpy(images))
    assert prompts == ["a", "b", "c"] and not gradient


def test_a_published_reward_gets_pictures_rounded_to_bytes_and_is_else_what_it_was(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    reward = small.Hps()
    before = reward.preprocess
    monkeypatch.setattr(serving, "find", lambda name, **_: reward)
    serving.open_reward("hpsv2.1")
    after = reward.preprocess
    assert (after.in_bytes, after.size, after.fit, after.normalise) == (True, before.size, "pad", before.normalise)
    assert not before.in_bytes

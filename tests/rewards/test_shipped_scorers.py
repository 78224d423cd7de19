"""The starter world's scorers as they ship: the code here gives what the graphs give that were compiled from them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from rewards.interface import scored
from rewards.registry import find
from student.bundle import read_student
from student.runtimes.load import load
from training.shapes import world

MODELS = Path(__file__).resolve().parents[2] / "models"
STUDENT = MODELS / "shapes"


@pytest.fixture(scope="module")
def scenes() -> tuple[torch.Tensor, list[str]]:
    """Pictures of the world, half of them with another one's caption."""
    found = world.sample(16, 5)
    captions = found.captions()
    images = (world.render_NCHW(found) * 255).round() / 255  # as bytes, which compiled scorers read
    return images, [*captions[:8], *captions[9:], captions[8]]


@pytest.fixture(scope="module")
def compiled(scenes: tuple[torch.Tensor, list[str]]) -> dict[str, np.ndarray]:
    images, prompts = scenes
    return load(STUDENT, "onnx", threads=1).score(images.numpy(), prompts)


@pytest.mark.parametrize("name", ["trained", "heldout"])
def test_a_shipped_scorer_scores_as_its_compiled_graph(
    name: str, scenes: tuple[torch.Tensor, list[str]], compiled: dict[str, np.ndarray]
) -> None:
    """The graphs were written by an earlier release: what the code computes must not have changed since."""
    images, prompts = scenes
    reward = find(str(MODELS / "shapes-scorers" / name), tokenizer=STUDENT / "tokenizer")
    with torch.no_grad():
        raw = scored(name, reward, images, prompts).numpy()
    known = read_student(STUDENT).scorers[name]
    np.testing.assert_allclose((raw - known.mean) / known.std, compiled[name], atol=2e-3)
    assert raw[:8].mean() > raw[8:].mean() + known.std, "its own caption fits a picture better than another one's"

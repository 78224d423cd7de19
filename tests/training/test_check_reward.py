"""The gradient smoke test: passes what can be trained on, and names what cannot."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from typer import Typer
from typer.testing import CliRunner

from rewards import shapes
from tests.rewards.own import Redness
from training.check_reward import check, main
from training.probe import pictures
from training.shapes import vocabulary

APP = Typer()
APP.command()(main)


def run(*arguments: str) -> tuple[int, str]:
    done = CliRunner().invoke(APP, list(arguments), env={"COLUMNS": "400"})
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    return done.exit_code, done.output


def test_a_scorer_of_the_starter_world_passes(tmp_path: Path) -> None:
    tokenizer = vocabulary.tokenizer()
    torch.manual_seed(2)
    for kind in ("query", "clip"):
        config = shapes.ScorerConfig(kind, len(tokenizer), vocabulary.MAX_TOKENS, 1, 0, text_width=32, width=16)
        shapes.save(shapes.build(config), tmp_path / kind)
        tokenizer.save_pretrained(tmp_path / kind)
        code, output = run(str(tmp_path / kind), "--tokenizer", str(tmp_path / kind), "--num", "3")
        assert code == 0, output
        assert "3 of 3" in output and "gradient is finite" in output


def test_a_users_class_passes_at_any_size() -> None:
    code, output = run("tests.rewards.own:Redness", "--size", "24", "--num", "2")
    assert (code, "2 of 2" in output) == (0, True)


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("tests.rewards.own:Backwards", "a step along the gradient of reward 'tests.rewards.own:Backwards' does not"),
        ("tests.rewards.own:Blind", "says that it is differentiable, but its scores have no gradient"),
        ("tests.rewards.own:Flat", "is zero for 8 of 8 pictures"),
        ("tests.rewards.own:Infinite", "the gradient of reward 'tests.rewards.own:Infinite' is not finite"),
        ("tests.rewards.own:NotANumber", "returned scores that are not finite"),
        ("tests.rewards.own:jpeg_bytes", "has no gradient down to the pixels"),
        ("tests.rewards.own:Column", "returned shape (8, 1) for 8 images"),
        ("tests.rewards.own:Raising", "failed in score(images_BCHW, prompts): KeyError: 'no such prompt"),
        ("tests.rewards.own:Full", "out of memory: CUDA out of memory"),
        ("aesthetics", "unknown reward 'aesthetics': did you mean 'aesthetic'"),
    ],
)
def test_what_cannot_be_trained_on_fails_with_one_sentence(name: str, sentence: str) -> None:
    code, output = run(name)
    assert code == 1
    assert sentence in output.splitlines()[-1]


def test_a_linear_reward_rises_by_what_its_gradient_promises() -> None:
    images, prompts = pictures(4, 64, 64)
    result = check("red", Redness(), images * 0.5 + 0.25, prompts)
    assert result.climb.size == 4.0
    assert torch.allclose(result.climb.expected_B, result.climb.rise_B, atol=1e-6)
    # Red counts 1/64² a pixel, green and blue half of it: steps of 4/255, 2/255 and 2/255 at those rates.
    assert torch.allclose(result.climb.rise_B, torch.tensor(4 / 255 * (1 + 0.25 + 0.25)), atol=1e-6)


def test_pictures_are_the_worlds_and_always_the_same() -> None:
    images, prompts = pictures(3, 64, 64)
    again, _ = pictures(3, 64, 64)
    assert torch.equal(images, again) and len(prompts) == 3
    assert pictures(3, 96, 96)[0].shape == (3, 3, 96, 96)


def test_what_lies_at_an_edge_already_is_not_counted_on_to_rise() -> None:
    """Red is 1 where it should rise: of 4/255 of red and half of it of green and blue only the latter is left."""
    images = torch.zeros(1, 3, 8, 8)
    images[:, 0], images[:, 1:] = 1.0, 0.5
    result = check("red", Redness(), images, ["a red heart"])
    assert torch.allclose(result.climb.rise_B, torch.tensor(2 * 2 / 255 / 2), atol=1e-6)
    assert torch.allclose(result.climb.expected_B, result.climb.rise_B, atol=1e-6)


def test_the_largest_step_that_raises_every_score_is_the_one_that_is_told() -> None:
    """A score that rises up to a change of 1.5/255 and falls beyond it."""

    class Peak(Redness):
        def score(self, images: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
            x = images.mean((1, 2, 3)) - 0.5
            return x * (1.5 / 255 - x)

    result = check("peak", Peak(), torch.full((2, 3, 8, 8), 0.5), ["a", "b"])
    assert result.climb.size == 1.0 and result.problem() is None

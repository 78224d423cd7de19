"""The one way to ask a reward: in parts where no gradient is wanted, and a sentence for whatever goes wrong."""

from __future__ import annotations

import re
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

from rewards.gradient import pixel_gradient, require_pixel_gradient
from rewards.interface import AT_ONCE, RewardError, scored
from rewards.registry import find
from training.probe import pictures

OWN = "tests.rewards.own"


class Numbered:
    """A score that belongs to its image and its prompt alone: 100 times the prompt's number, plus the image's red."""

    differentiable = True

    def __init__(self) -> None:
        self.asked: list[int] = []

    def score(self, images_BCHW: Tensor, prompts: Sequence[str]) -> Tensor:
        self.asked.append(len(prompts))
        numbers_B = torch.tensor([float(prompt) for prompt in prompts], dtype=torch.float64)
        return 100 * numbers_B + images_BCHW[:, 0].mean((1, 2))


def test_without_gradient_many_images_are_scored_in_parts_and_in_their_order() -> None:
    num = 2 * AT_ONCE + 5
    images = (torch.arange(num) / num)[:, None, None, None].expand(num, 3, 2, 2)
    reward = Numbered()
    scores = scored("numbered", reward, images, [str(i) for i in range(num)])
    assert reward.asked == [AT_ONCE, AT_ONCE, 5]
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores, torch.tensor([100 * i + i / num for i in range(num)]))


def test_with_gradient_they_are_one_call_whose_gradient_is_known() -> None:
    num, reward = AT_ONCE + 3, Numbered()
    images = torch.rand(num, 3, 2, 2, requires_grad=True)
    (gradient,) = torch.autograd.grad(scored("numbered", reward, images, ["1"] * num).sum(), images)
    assert reward.asked == [num]
    assert torch.allclose(gradient[:, 0], torch.tensor(0.25)) and not gradient[:, 1:].any()
    with torch.no_grad():
        scored("numbered", reward, images, ["1"] * num)
    assert reward.asked == [num, AT_ONCE, 3], "nothing is learned from here"


class Elsewhere(nn.Module):
    """Weights in another place than the images, as on a GPU: what is asked there must have been moved there."""

    differentiable = False

    def __init__(self, device: str) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1, device=device))
        self.asked: list[tuple[str, int]] = []

    def score(self, images_BCHW: Tensor, prompts: Sequence[str]) -> Tensor:
        self.asked.append((images_BCHW.device.type, len(images_BCHW)))
        return torch.ones(len(images_BCHW))


def test_each_part_is_moved_to_the_rewards_device_and_no_more_than_it() -> None:
    reward = Elsewhere("meta")
    assert scored("elsewhere", reward, torch.rand(AT_ONCE + 1, 3, 2, 2), [""] * (AT_ONCE + 1)).device.type == "cpu"
    assert reward.asked == [("meta", AT_ONCE), ("meta", 1)]


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("Column", "returned shape (4, 1) for 4 images: accepted is a tensor with one score each"),
        ("MeanOfAll", "returned shape () for 4 images: accepted is"),
        ("Listed", "returned a list for 4 images: accepted is"),
        ("one_for_all", "returned shape (1,) for 4 images: accepted is"),
        ("Raising", "failed in score(images_BCHW, prompts): KeyError: 'no such prompt"),
    ],
)
def test_a_reward_that_does_not_keep_to_the_interface_is_named(name: str, sentence: str) -> None:
    with pytest.raises(RewardError, match=re.escape(f"reward '{OWN}:{name}' {sentence}")) as caught:
        scored(f"{OWN}:{name}", find(f"{OWN}:{name}"), torch.rand(4, 3, 8, 8), ["a"] * 4)
    assert "\n" not in str(caught.value)


def test_full_memory_is_no_mistake_of_the_rewards() -> None:
    with pytest.raises(torch.OutOfMemoryError):
        scored("full", find(f"{OWN}:Full"), torch.rand(1, 3, 8, 8), ["a"])


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("Blind", "says that it is differentiable, but its scores have no gradient"),
        ("Flat", "is zero for every picture: no student can be trained on it"),
        ("Infinite", "is not finite: no student can be trained on it"),
        ("NotANumber", "returned scores that are not finite"),
        ("Torn", "failed in the backward pass: RuntimeError: one of the variables needed for gradient computation"),
        ("Redness", ""),
    ],
)
def test_what_nothing_can_be_learned_from_is_refused(name: str, sentence: str) -> None:
    reward = find(f"{OWN}:{name}")
    images, prompts = pictures(2, 32, 48)
    assert images.shape == (2, 3, 32, 48)

    def score(images: Tensor, prompts: Sequence[str]) -> Tensor:
        return scored(name, reward, images, prompts)

    if not sentence:
        require_pixel_gradient(name, score, images, prompts)
        return
    with pytest.raises(RewardError, match=re.escape(sentence)), torch.no_grad():
        require_pixel_gradient(name, score, images, prompts)


def test_the_gradient_on_the_pixels_is_that_of_the_formula() -> None:
    images = torch.rand(2, 3, 4, 4, generator=torch.Generator().manual_seed(3))
    scores, gradient = pixel_gradient("red", find(f"{OWN}:Redness").score, images, ["red", "blue"])
    assert torch.allclose(gradient[0, 0], torch.tensor(1 / 16)) and torch.allclose(
        gradient[1, 0], torch.tensor(-1 / 16)
    )
    assert torch.allclose(gradient[0, 1:], torch.tensor(-1 / 32)) and not scores.requires_grad

"""Every reward that is a network: in bf16, under autocast, in any batch, with a gradient, and frozen."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from rewards import shapes
from rewards.interface import Network, scored
from rewards.tokenized import CustomTokenizer, Tokenized
from tests.rewards import small
from training.shapes import vocabulary, world

TOKENIZER = vocabulary.tokenizer()
SCENES = world.sample(4, 3)
PROMPTS = SCENES.captions()


def of_the_world(kind: str) -> Callable[[], Network]:
    def make() -> Network:
        torch.manual_seed(1)
        config = shapes.ScorerConfig(kind, len(TOKENIZER), vocabulary.MAX_TOKENS, 1, 0, text_width=32, width=16)
        words = CustomTokenizer(lambda texts: torch.tensor(vocabulary.encode(TOKENIZER, list(texts))))
        return Tokenized(shapes.build(config), words)

    return make


REWARDS: dict[str, Callable[[], Network]] = {
    "pickscore": small.Pick, "clip": small.Clip, "hps": small.Hps, "aesthetic": small.Aesthetic,
    "imagereward": small.Image, **{kind: of_the_world(kind) for kind in ("query", "clip scorer", "reader")},
}  # fmt: skip
REWARDS["clip scorer"] = of_the_world("clip")


@pytest.fixture(params=REWARDS)
def reward(request: pytest.FixtureRequest) -> Network:
    return REWARDS[request.param]()


def images() -> Tensor:
    return world.render_NCHW(SCENES)


def spread(values: Tensor) -> float:
    return float(values.std())


def test_in_bf16_and_under_autocast_scores_are_fp32_and_close(reward: Network) -> None:
    with torch.no_grad():
        full = reward.score(images(), PROMPTS)
        with torch.autocast("cpu", torch.bfloat16):
            mixed = reward.score(images(), PROMPTS)
        reward.to(torch.bfloat16)
        half = reward.score(images().bfloat16(), PROMPTS)
    assert {one.dtype for one in (full, mixed, half)} == {torch.float32} and reward.dtype == torch.bfloat16
    size = float(full.abs().max())
    assert spread(full) > 1e-5 * size
    for other in (mixed, half):
        assert other.shape == (4,) and 0 < (other - full).abs().max() < 0.1 * size


def test_a_score_is_of_its_own_picture_and_prompt_whatever_is_beside_it(reward: Network) -> None:
    with torch.no_grad():
        together = scored("own", reward, images(), PROMPTS)
        alone = torch.cat([scored("own", reward, images()[i, None], PROMPTS[i : i + 1]) for i in range(4)])
        turned = scored("own", reward, images().flip(0), PROMPTS[::-1])
    close = 1e-4 * float(together.abs().max())
    assert (together - alone).abs().max() < close and (together - turned.flip(0)).abs().max() < close


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_its_gradient_reaches_every_picture_and_no_weight(dtype: torch.dtype, reward: Network) -> None:
    reward.to(dtype).train()
    pixels = images().requires_grad_()
    reward.score(pixels, PROMPTS).sum().backward()
    assert pixels.grad is not None and pixels.grad.isfinite().all()
    assert (pixels.grad.flatten(1).abs().amax(1) > 0).all()
    assert not any(part.training for part in reward.modules()), "whatever a trainer does to its modules"
    assert not any(p.requires_grad or p.grad is not None for p in reward.parameters())


class Elsewhere(Network):
    """Weights on another device, which a picture must be moved to and its score be brought back from."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.drop = nn.Parameter(torch.ones(1, device="meta")), nn.Dropout(0.5)
        self.seen: list[str] = []
        self.freeze()

    def forward(self, images_BCHW: Tensor, prompts: object) -> Tensor:
        self.seen.append(images_BCHW.device.type)
        return torch.ones(len(images_BCHW), dtype=torch.float64)


def test_pictures_are_scored_where_the_weights_are_and_scores_are_where_the_pictures_are() -> None:
    network = Elsewhere()
    assert network.score(images(), PROMPTS).device.type == "cpu" and network.seen == ["meta"]
    assert network.score(images().to("meta"), PROMPTS).device.type == "meta"
    assert not network.weight.requires_grad and not network.training and not network.drop.training


@pytest.mark.parametrize("device", ["meta", None])
def test_a_reward_without_weights_is_asked_on_the_device_that_is_named(device: str | None) -> None:
    class Own:
        differentiable = True

        def __init__(self) -> None:
            self.seen: list[str] = []

        def score(self, images_BCHW: Tensor, prompts: object) -> Tensor:
            self.seen.append(images_BCHW.device.type)
            return torch.ones(len(images_BCHW))

    own = Own()
    assert scored("own", own, images(), PROMPTS, device).device.type == "cpu" and own.seen == [device or "cpu"]


@pytest.mark.parametrize("make", [small.Pick, small.Clip, small.Hps])
def test_vectors_are_compared_in_fp32_whatever_computes_them(make: Callable[[], small.ClipReward]) -> None:
    """Eight bits of a cosine are less than what two pictures differ by."""
    reward = make().to(torch.bfloat16)
    with torch.no_grad():
        assert reward.words is not None
        pictures = reward.embed_images(reward.preprocess(images()))
        texts = reward.embed_texts(*reward.words.read(PROMPTS))
        for vectors in (pictures, texts):
            assert vectors.dtype == torch.float32
            torch.testing.assert_close(vectors.norm(dim=-1), torch.ones(4), atol=1e-6, rtol=0)
        cosine = (pictures * texts).sum(-1)
        expected = cosine * reward.logit_scale.float().exp() if reward.scaled else cosine
        torch.testing.assert_close(reward.score(images(), PROMPTS), expected, atol=1e-6, rtol=1e-6)

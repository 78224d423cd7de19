"""The scorers: their loss, their file form, their gradient down to the pixels."""

from pathlib import Path

import pytest
import torch

from rewards import shapes as rewards
from training.shapes import scorer, vocabulary, world

TOKENIZER = vocabulary.tokenizer()


def _small(kind: str) -> rewards.Scorer:
    torch.manual_seed(1)
    return rewards.build(rewards.ScorerConfig(kind, len(TOKENIZER), vocabulary.MAX_TOKENS, 1, 0, width=32))


@pytest.mark.parametrize("kind", ["query", "clip", "reader"])
def test_a_scorer_is_what_its_file_says(kind: str, tmp_path: Path) -> None:
    model = _small(kind)
    rewards.save(model, tmp_path)
    images = world.render_NCHW(world.sample(3, 1))
    ids = torch.tensor(vocabulary.encode(TOKENIZER, world.sample(3, 1).captions()))
    first = rewards.load(tmp_path)
    torch.testing.assert_close(first(images, ids), model.eval()(images, ids), atol=5e-3, rtol=5e-3)
    rewards.save(first, tmp_path)
    assert torch.equal(rewards.load(tmp_path)(images, ids), first(images, ids))


@pytest.mark.parametrize("kind", ["query", "clip", "reader"])
def test_one_ascent_step_on_pixels_raises_the_score(kind: str) -> None:
    model = _small(kind).eval()
    images = world.render_NCHW(world.sample(4, 2)).requires_grad_()
    ids = torch.tensor(vocabulary.encode(TOKENIZER, world.sample(4, 2).captions()))
    before = model(images, ids)
    (gradient,) = torch.autograd.grad(before.sum(), images)
    assert gradient.isfinite().all() and (gradient.flatten(1).norm(dim=1) > 0).all()
    assert (model(images + 1e-2 * gradient / gradient.abs().max(), ids) > before).all()


@pytest.mark.parametrize("kind", ["query", "clip"])
def test_comparing_many_prompts_equals_scoring_each(kind: str) -> None:
    model = _small(kind).eval()
    batch = scorer.draw_pairs(3, 4, None, TOKENIZER, 7)
    with torch.no_grad():
        many, _, _ = scorer.scores(model, batch)
        each = torch.stack([model(batch.right_NCHW, batch.ids_NPL[:, p]) for p in range(5)], 1)
    torch.testing.assert_close(many, each, atol=1e-5, rtol=1e-4)


def test_shared_captions_are_those_of_the_other_scenes() -> None:
    model = _small("clip").eval()
    batch = scorer.draw_pairs(3, 2, None, TOKENIZER, 7)
    with torch.no_grad():
        right, _, _ = scorer.scores(model, batch, shared=True)
        other = model(batch.right_NCHW, batch.ids_NPL[:, 0].roll(-1, 0))
    assert right.shape == (3, 3 + 2)
    torch.testing.assert_close(right[:, 3], other, atol=1e-5, rtol=1e-4)


def test_training_lowers_the_loss_and_resumes(tmp_path: Path) -> None:
    config = scorer.ScorerTraining("trained", "clip", 0, 5, width=16, steps=12, batch=8, wrong_captions=2, save_every=6)
    whole = scorer.train(config, tmp_path / "whole")
    (tmp_path / "cut").mkdir()
    with pytest.raises(KeyboardInterrupt), pytest.MonkeyPatch.context() as patch:
        patch.setattr(scorer, "loss", _stops_after(8))
        scorer.train(config, tmp_path / "cut")
    resumed = scorer.train(config, tmp_path / "cut")
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name


def _stops_after(calls: int):  # type: ignore[no-untyped-def]
    real, made = scorer.loss, []

    def loss(model: rewards.Scorer, batch: scorer.PairBatch) -> torch.Tensor:
        made.append(1)
        if len(made) > calls:
            raise KeyboardInterrupt
        return real(model, batch)

    return loss


def test_a_perfect_and_a_blind_scorer_are_told_apart() -> None:
    """The loss prefers a scorer that knows the right caption to one that knows nothing."""
    batch = scorer.draw_pairs(4, 3, None, TOKENIZER, 7)

    class Oracle(torch.nn.Module):
        def __init__(self, strength: float) -> None:
            super().__init__()
            self.strength = strength

        def encode_text(self, ids: torch.Tensor) -> torch.Tensor:
            return ids.float()

        def encode_image(self, images: torch.Tensor) -> torch.Tensor:
            quality = torch.cat([torch.ones(4), torch.zeros(8)])
            return torch.cat([batch.ids_NPL[:, 0].repeat(3, 1).float(), quality[:, None]], 1)

        def compare(self, image: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
            same = (image[:, None, :-1] == text).all(-1).float()
            return self.strength * (same + image[:, None, -1])

    knowing, blind = Oracle(20.0), Oracle(0.0)
    assert scorer.loss(knowing, batch) < 1e-3 < scorer.loss(blind, batch)  # type: ignore[arg-type]


def test_the_two_halves_share_no_scene() -> None:
    scenes = world.sample(4000, 2)
    first, second = scorer.in_half(scenes, 0), scorer.in_half(scenes, 1)
    assert not (first & second).any() and (first | second).all()
    assert 0.4 < first.mean() < 0.6

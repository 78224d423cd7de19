"""The scorers: their loss, their file form, their gradient down to the pixels."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from rewards import shapes as rewards
from training.shapes import pairs, scorer, vocabulary, world
from training.shapes.degrade import KINDS as DEFECTS

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


def scored(right: list[list[float]], altered: list[list[float]], degraded: list[list[float]]) -> Callable[..., Any]:
    def scores(model: object, batch: object, shared: bool = False) -> tuple[Tensor, Tensor, Tensor]:
        assert shared, "the captions of all other scenes count too"
        return torch.tensor(right), torch.tensor(altered), torch.tensor(degraded)

    return scores


def test_a_scorers_loss_is_of_captions_on_two_pictures_and_of_pictures_for_one_caption(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    right, altered, degraded = (
        [[2.0, 0.5, 1.0], [0.0, 1.0, -1.0]],
        [[1.0, 9, 9], [3.0, 9, 9]],
        [[0.0, 1, 2], [1.0, 1, 1]],
    )
    monkeypatch.setattr(scorer, "scores", scored(right, altered, degraded))

    def unlikely(rows: list[list[float]]) -> float:
        return float(np.mean([math.log(sum(map(math.exp, row))) - row[0] for row in rows]))

    def softplus(x: float) -> float:
        return math.log1p(math.exp(x))

    gaps = [softplus(bad[k][0] - right[k][0]) for bad in (altered, degraded) for k in range(2)]
    expected = unlikely(right) + 0.5 * unlikely(degraded) + sum(gaps) / 2
    nothing: Any = None
    assert float(scorer.loss(nothing, nothing)) == pytest.approx(expected, rel=1e-6)


def test_accuracy_is_counted_by_kind_of_caption_picture_and_defect(monkeypatch: pytest.MonkeyPatch) -> None:
    """A scorer that is wrong about colours in captions, shapes in pictures and blur, and right about all else."""
    drawn: list[tuple[Any, ...]] = []
    real = scorer.draw_pairs

    def draw_pairs(*arguments: Any) -> scorer.PairBatch:
        drawn.append(arguments)
        return real(*arguments)

    def scores(model: object, batch: scorer.PairBatch) -> tuple[Tensor, Tensor, Tensor]:
        wrong = batch.caption_kind_NP == pairs.KINDS.index("color")
        right = np.where(wrong, 1.0, -1.0)
        right[:, 0] = 0
        altered = np.where(batch.altered_kind_N == pairs.KINDS.index("shape"), 1.0, -1.0)
        degraded = np.where(batch.degraded_kind_N == DEFECTS.index("blur"), 1.0, -1.0)
        return torch.from_numpy(right), torch.from_numpy(altered)[:, None], torch.from_numpy(degraded)[:, None]

    monkeypatch.setattr(scorer, "draw_pairs", draw_pairs)
    monkeypatch.setattr(scorer, "scores", scores)
    found = scorer.accuracy(nn.Identity(), num=130, seed=5)  # type: ignore[arg-type]
    assert [(a[0], a[1], a[2], a[4:]) for a in drawn] == [(64, 4, None, (5, 0)), (64, 4, None, (5, 1))]
    names = {f"caption:{kind}" for kind in pairs.KINDS} | {f"image:{kind}" for kind in pairs.KINDS}
    assert set(found) == {"all", *names, *(f"degraded:{kind}" for kind in DEFECTS)}
    wrong = {"caption:color", "image:shape", "degraded:blur"}
    assert all(value == (name not in wrong) for name, value in found.items() if name != "all")
    batches = [real(*arguments) for arguments in drawn]
    missed = sum(
        (b.caption_kind_NP == 1).sum() + (b.altered_kind_N == 2).sum() + (b.degraded_kind_N == 4).sum() for b in batches
    )
    assert found["all"] == pytest.approx(1 - missed / (128 * 6))


def test_a_batch_of_pairs_is_of_one_half_and_each_picture_is_what_its_name_says(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(scorer.degrade, "photograph", lambda images, gen: images)
    monkeypatch.setattr(
        scorer.degrade, "draw", lambda scenes, seed: (1 - world.render_NCHW(scenes), np.arange(len(scenes)))
    )
    batch = scorer.draw_pairs(5, 3, 1, TOKENIZER, 7, 8)
    drawn = world.sample(20, 7, 8)
    scenes = drawn.take(np.flatnonzero(scorer.in_half(drawn, 1))[:5])
    truth = world.render_NCHW(scenes)
    assert torch.equal(batch.right_NCHW, truth) and torch.equal(batch.degraded_NCHW, 1 - truth)
    apart = (batch.altered_NCHW - truth).abs().flatten(1).amax(1)
    assert (apart > 0.05).all() and batch.ids_NPL.shape == (5, 4, vocabulary.MAX_TOKENS)
    assert (batch.caption_kind_NP[:, 0] == -1).all() and (batch.caption_kind_NP[:, 1:] >= 0).all()
    named = [pairs.captions(scenes, pairs.full_styles(5))]
    said = torch.tensor([vocabulary.encode(TOKENIZER, texts) for texts in named])[0]
    words = [{int(i) for i in row if i > 2} for row in said]
    for k in range(5):
        own = {int(i) for i in batch.ids_NPL[k, 0] if i > 2}
        assert own <= words[k] and len(own) >= 2, "the first caption is the scene's, with parts left out"
        assert all(not torch.equal(batch.ids_NPL[k, p], batch.ids_NPL[k, 0]) for p in range(1, 4))

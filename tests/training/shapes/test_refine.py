"""The sharper decoder, the generators' failures and the bounded scorers: what stays as it was, and going on."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from rewards import shapes as rewards
from tests.training.shapes import small
from training.shapes import autoencoder, failures, prompts, refine, scorer, sharpen, vocabulary, world

TOKENIZER = vocabulary.tokenizer()


def _vae() -> autoencoder.AutoencoderTiny:
    torch.manual_seed(1)
    return autoencoder.build(autoencoder.AutoencoderConfig(width=8, latent_channels=4))


def _scorer(kind: str) -> rewards.Scorer:
    torch.manual_seed(1)
    return rewards.build(rewards.ScorerConfig(kind, len(TOKENIZER), vocabulary.MAX_TOKENS, 1, 0, width=16)).eval()


def test_a_deeper_decoder_has_one_block_more_and_the_same_latents() -> None:
    vae = _vae()
    vae.register_to_config(scaling_factor=2.0, shift_factor=0.25)
    new = sharpen.deepened(vae)
    x = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    assert torch.equal(new.encoder(x), vae.encoder(x))
    assert (new.config.scaling_factor, new.config.shift_factor) == (2.0, 0.25)
    assert len(new.decoder.layers) == len(vae.decoder.layers) + 1
    for mine, theirs in zip(new.decoder.layers[:-2], vae.decoder.layers[:-1], strict=True):
        assert all(torch.equal(a, b) for a, b in zip(mine.parameters(), theirs.parameters(), strict=True))


def test_sharpening_trains_the_decoder_alone_and_resumes(tmp_path: Path) -> None:
    _vae().save_pretrained(tmp_path / "vae")
    config = sharpen.SharpenConfig(steps=6, batch=2, save_every=2)
    whole = sharpen.train(config, tmp_path / "vae", tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt), pytest.MonkeyPatch.context() as patch:
        patch.setattr(sharpen, "loss", _stops_after(3))
        sharpen.train(config, tmp_path / "vae", tmp_path / "cut")
    cut = sharpen.train(config, tmp_path / "vae", tmp_path / "cut")
    assert all(torch.equal(value, cut.state_dict()[name]) for name, value in whole.state_dict().items())
    start = _vae().state_dict()
    assert all(torch.equal(value, start[name]) for name, value in whole.state_dict().items() if "encoder" in name)
    assert not torch.equal(whole.decoder.layers[0].weight, start["decoder.layers.0.weight"])


def _stops_after(calls: int):  # type: ignore[no-untyped-def]
    real, made = sharpen.loss, []

    def loss(*args: object) -> torch.Tensor:
        made.append(1)
        if len(made) > calls:
            raise KeyboardInterrupt
        return real(*args)  # type: ignore[arg-type]

    return loss


def test_failures_are_the_models_pictures_of_training_captions_and_go_on(tmp_path: Path) -> None:
    small.write_models(tmp_path)
    models = (str(tmp_path / "shapes-teacher"),)
    failures.draw(failures.FailuresConfig(64, models), tmp_path / "a.pt")
    failures.draw(failures.FailuresConfig(128, models), tmp_path / "a.pt")
    failures.draw(failures.FailuresConfig(128, models), tmp_path / "b.pt")
    gone_on, whole = (failures.read([tmp_path / name]) for name in ("a.pt", "b.pt"))
    assert whole.images_NCHW.shape == (128, 3, 64, 64) and len(whole.texts) == len(whole.scenes) == 128
    assert torch.equal(gone_on.images_NCHW, whole.images_NCHW) and gone_on.texts == whole.texts
    assert not prompts.held_out(whole.scenes).any()
    at = np.array([3, 70])
    full = whole.scenes.take(at).captions()
    said = set("please draw show me a picture of an image with".split())
    for i, text in zip(at, full, strict=True):
        assert set(whole.texts[i].split()) - set(text.split()) <= said


@pytest.mark.parametrize("kind", ["query", "clip"])
def test_a_bounded_scorer_is_a_probability_in_the_old_scorer_s_order(kind: str, tmp_path: Path) -> None:
    old = _scorer(kind)
    new = refine.bounded(old).eval()
    images = world.render_NCHW(world.sample(12, 1))
    ids = torch.tensor(vocabulary.encode(TOKENIZER, world.sample(12, 1).captions()))
    with torch.no_grad():
        before, after = old(images, ids), new(images, ids)
        torch.testing.assert_close(after, torch.sigmoid(refine.SHRINK * before + refine.OFFSET))
        torch.testing.assert_close(torch.sigmoid(refine.logits(new, images, ids, ids[:1, None])[0]), after)
    rewards.save(new, tmp_path)
    assert rewards.load(tmp_path).config.bounded
    torch.testing.assert_close(rewards.load(tmp_path)(images, ids), after, atol=2e-3, rtol=1e-2)


class _Knows(torch.nn.Module):
    """Adds ``confidence`` for a right picture of its caption, and takes it off for all others."""

    def __init__(self, right: torch.Tensor, confidence: float) -> None:
        super().__init__()
        self.probability, self.right, self.confidence = rewards.Probability(True), right, confidence

    def encode_image(self, images: torch.Tensor) -> torch.Tensor:
        return torch.arange(len(images))

    def encode_text(self, ids: torch.Tensor) -> torch.Tensor:
        return ids.float()

    def compare(self, index: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        own = text.shape[1] == 1
        known = self.right[index][:, None].expand(-1, text.shape[1]) if own else torch.zeros(text.shape[:2])
        return self.confidence * (2 * known.float() - 1)


@pytest.mark.parametrize("kind", ["query", "clip"])
def test_a_scorer_that_is_bounded_already_goes_on_as_it_is(kind: str) -> None:
    once = refine.bounded(_scorer(kind))
    before = {name: value.clone() for name, value in once.state_dict().items()}
    again = refine.bounded(once)
    assert again.config == once.config
    assert all(torch.equal(value, before[name]) for name, value in again.state_dict().items())


def test_the_loss_falls_to_zero_for_a_scorer_that_knows_and_rises_for_one_that_is_wrong() -> None:
    batch = scorer.draw_pairs(2, 2, None, TOKENIZER, 3)
    truth = world.render_NCHW(world.sample(3, 5))
    ids = torch.tensor(vocabulary.encode(TOKENIZER, world.sample(3, 5).captions()))
    right = torch.tensor([1, 1, 0, 0, 0, 0, 1, 1, 1, 0, 0, 0])  # right, altered, degraded, truth, drawn

    def value(confidence: float) -> float:
        knows = _Knows(right, confidence)
        grain = torch.zeros(12, 3, 64, 64)
        return refine.loss(knows, _vae(), batch, (truth, truth, ids), grain).item()  # type: ignore[arg-type]

    assert value(30.0) == pytest.approx(0.0, abs=1e-6)
    assert value(0.0) == pytest.approx((1 + 1 + 0.5 * 4) * np.log(2), rel=1e-5)
    assert value(-5.0) > 10


def test_a_bounded_scorer_s_training_resumes(tmp_path: Path) -> None:
    small.write_models(tmp_path)
    failures.draw(failures.FailuresConfig(64, (str(tmp_path / "shapes-teacher"),)), tmp_path / "f.pt")
    drawn = failures.read([tmp_path / "f.pt"])
    config = refine.RefineConfig(steps=4, scenes=2, pictures=3, save_every=2)
    start = tmp_path / "shapes-scorers" / "trained"
    whole = refine.train(config, scorer.TRAINED, start, _vae(), drawn, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt), pytest.MonkeyPatch.context() as patch:
        real, made = refine.loss, []

        def loss(*args: object) -> torch.Tensor:
            made.append(1)
            if len(made) > 3:
                raise KeyboardInterrupt
            return real(*args)  # type: ignore[arg-type]

        patch.setattr(refine, "loss", loss)
        refine.train(config, scorer.TRAINED, start, _vae(), drawn, tmp_path / "cut")
    cut = refine.train(config, scorer.TRAINED, start, _vae(), drawn, tmp_path / "cut")
    assert all(torch.equal(value, cut.state_dict()[name]) for name, value in whole.state_dict().items())


def test_every_model_draws_in_all_of_its_ways(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[tuple[str, int]] = []

    def way(name: str, number: int) -> SimpleNamespace:
        def draw(texts: list[str], *_: object) -> torch.Tensor:
            called.append((name, number))
            return torch.zeros(len(texts), 3, 64, 64)

        return SimpleNamespace(model=SimpleNamespace(latent_shape=lambda *_: (4, 8, 8)), draw=draw)

    monkeypatch.setattr(failures, "samplers", lambda name: [way(name, 0), way(name, 1)])
    failures.draw(failures.FailuresConfig(6 * failures.BATCH, ("a", "b")), tmp_path / "drawn.pt")
    assert called == [("a", 0), ("b", 0), ("a", 1), ("b", 1), ("a", 0), ("b", 0)]

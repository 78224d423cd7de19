"""The scorer that only reports: its closed form, what is true of a scene, and that training teaches it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from rewards import shapes as rewards
from tests.training.shapes import small
from training.shapes import autoencoder, failures, pairs, reader, vocabulary, world

TOKENIZER = vocabulary.tokenizer()
VOCABULARY = TOKENIZER.get_vocab()


def _reader() -> rewards.TokenReader:
    torch.manual_seed(1)
    config = rewards.ScorerConfig("reader", len(TOKENIZER), vocabulary.MAX_TOKENS, 1, 0, width=16)
    return rewards.TokenReader(config).eval()


def _ids(*texts: str) -> torch.Tensor:
    return torch.tensor(vocabulary.encode(TOKENIZER, list(texts)))


@torch.no_grad()
def test_the_score_is_the_product_of_what_the_prompt_asks_for() -> None:
    model = _reader()
    image = world.render_NCHW(world.sample(1, 1))
    probability_V = torch.sigmoid(model.encode_image(image))[0]
    asked = ["top_red", "top_heart", "bottom_blue", "bottom_star", "navy"]
    expected = probability_V[-1]  # well drawn
    for word in asked:
        expected = expected * probability_V[VOCABULARY[word]]
    for text in (
        "a red heart above a blue star",
        "a blue star below a red heart",
        "please draw red heart above blue star",
    ):
        text = f"{text} on a navy background"
        torch.testing.assert_close(model(image, _ids(text))[0], expected)
    torch.testing.assert_close(model(image, _ids("something else"))[0], probability_V[-1])
    assert model(image, _ids("a red heart"))[0] == pytest.approx(
        float(probability_V[-1] * probability_V[VOCABULARY["red"]] * probability_V[VOCABULARY["heart"]])
    )


def test_what_is_true_of_a_scene_is_what_any_of_its_captions_says() -> None:
    scenes = world.sample(64, 4)
    true_NV = reader.words_of(scenes, len(TOKENIZER))
    styles = pairs.sample_styles(64, world.rng(5))
    asked_NV = _reader().encode_text(_ids(*pairs.captions(scenes, styles)))[:, :-1]
    assert (asked_NV <= true_NV).all() and (asked_NV.sum(1) >= 2).all()
    altered, _ = pairs.alter(scenes, styles, world.rng(6))
    wrong_NV = _reader().encode_text(_ids(*pairs.captions(altered, styles)))[:, :-1]
    assert ((wrong_NV > true_NV).any(1)).all()
    words = {"left": 0, "top": 0}
    for row in true_NV[scenes.count_N == 2]:
        named = [word for word, i in VOCABULARY.items() if row[i]]
        for side in words:
            words[side] += any(word.startswith(f"{side}_") for word in named)
    assert all(words.values()) and sum(words.values()) == (scenes.count_N == 2).sum()


def _failures(tmp_path: Path, *models: str, num: int = 64) -> failures.Failures:
    small.write_models(tmp_path)
    failures.draw(failures.FailuresConfig(num, tuple(str(tmp_path / name) for name in models)), tmp_path / "drawn.pt")
    return failures.read([tmp_path / "drawn.pt"])


def _vae() -> autoencoder.AutoencoderTiny:
    torch.manual_seed(1)
    return autoencoder.build(autoencoder.AutoencoderConfig(width=8, latent_channels=4))


def test_a_reader_that_knows_has_the_smallest_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    """The answer key: a network that returns the truth with certainty, and one with each part of it wrong."""
    scenes = world.sample(6, 1)
    true_NV = reader.words_of(scenes, len(TOKENIZER))
    monkeypatch.setattr(reader, "seen_through", lambda vae, images: images)
    some = scenes.take(np.arange(4))
    case = (some, world.render_NCHW(some), _ids(*some.captions()))

    def loss(words: float, drawn_well: float, generators: float) -> float:
        """All of 20 in size: positive is right."""
        model = _reader()
        sign_NV = words * (2 * true_NV - 1)
        quality = drawn_well * torch.tensor([1.0] * 6 + [-1.0] * 6 + [1.0] * 4 + [-generators] * 4)
        logits = torch.cat([torch.cat([sign_NV, sign_NV, sign_NV[:4], sign_NV[:4]]), quality[:, None]], 1)
        model.encode_image = lambda _: logits  # type: ignore[method-assign]
        return float(reader.loss(model, None, scenes, 3, case))

    assert loss(20, 20, 1) < 1e-3
    assert loss(-20, 20, 1) > 100 and loss(20, -20, 1) > 20
    assert 0.3 < loss(20, 20, -1) < 0.4  # Bradley-Terry of two equals: log 2, with weight 0.5


def test_training_teaches_and_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = _failures(tmp_path, "shapes-teacher")
    config = reader.ReaderConfig(steps=24, scenes=4, pictures=4, width=16, lr=4e-3, save_every=2)
    whole = reader.train(config, _vae(), drawn, tmp_path / "whole")
    assert isinstance(whole, rewards.TokenReader)
    (tmp_path / "cut").mkdir()
    real, made = reader.loss, []

    def stops(*args: object) -> torch.Tensor:
        made.append(1)
        if len(made) > 5:
            raise KeyboardInterrupt
        return real(*args)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(reader, "loss", stops)
        with pytest.raises(KeyboardInterrupt):
            reader.train(config, _vae(), drawn, tmp_path / "cut")
    resumed = reader.train(config, _vae(), drawn, tmp_path / "cut")
    assert all(torch.equal(value, resumed.state_dict()[name]) for name, value in whole.state_dict().items())
    start, scenes = _reader(), world.sample(64, 9)
    case = (scenes.take(np.arange(8)), drawn.images(np.arange(8)), _ids(*drawn.texts[:8]))
    with torch.no_grad():
        assert reader.loss(whole, _vae(), scenes, 1, case) < 0.8 * reader.loss(start, _vae(), scenes, 1, case)


def test_a_student_s_failures_are_of_its_own_step_counts() -> None:
    ways = failures.samplers("models/shapes")
    assert [len(way.sigmas) for way in ways] == [1, 2, 4, 8] and {way.guidance for way in ways} == {1.0}
    assert len({id(way.model) for way in ways}) == 1
    teachers = failures.samplers("models/shapes-teacher")
    assert [(len(way.sigmas), way.guidance) for way in teachers] == list(failures.WAYS)

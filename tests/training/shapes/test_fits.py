"""What each of the starter world's models is trained on at each step, by which optimizer, and at which rate."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from rewards import shapes as rewards
from tests.training.shapes import small
from training import checkpoint
from training.optim import one_cycle, trapezoid
from training.shapes import (
    autoencoder,
    degrade,
    failures,
    pairs,
    prompts,
    reader,
    refine,
    scorer,
    sharpen,
    teacher,
    vocabulary,
    world,
)
from training.shapes.grammar import parse
from training.shapes.loop import fit
from training.steplog import read_log

TOKENIZER = vocabulary.tokenizer()


@dataclass
class Fit:
    """What ``fit`` was called with."""

    name: str
    path: Path
    model: Any
    optimizer: torch.optim.Optimizer
    loss: Callable[[int], Any]
    lr: Callable[[int], float]
    num_steps: int
    every: dict[str, int]


@pytest.fixture
def fits(monkeypatch: pytest.MonkeyPatch) -> list[Fit]:
    """No model is trained; what would have been done is kept."""
    kept: list[Fit] = []
    for module in (autoencoder, sharpen, scorer, refine, reader):
        monkeypatch.setattr(module, "fit", lambda *given, **every: kept.append(Fit(*given, every)))
    return kept


def adam(fit: Fit) -> tuple[Any, ...]:
    """Its settings, and how many numbers it trains."""
    assert isinstance(fit.optimizer, torch.optim.AdamW)
    [group] = fit.optimizer.param_groups
    return group["lr"], group["betas"], group["weight_decay"], sum(p.numel() for p in group["params"])


def numbers(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def seen(patch: pytest.MonkeyPatch, module: Any) -> list[tuple[Any, ...]]:
    """What the module's loss is asked."""
    asked: list[tuple[Any, ...]] = []
    patch.setattr(module, "loss", lambda *given: asked.append(given))
    return asked


def test_the_autoencoder_is_trained_on_other_scenes_and_noise_at_each_step(
    fits: list[Fit], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = autoencoder.AutoencoderConfig(steps=40, batch=3, lr=0.03, width=8, latent_channels=4, seed=9, save_every=7)
    asked = seen(monkeypatch, autoencoder)
    monkeypatch.setattr(autoencoder, "finish", lambda model, config: None)
    model = autoencoder.train(config, tmp_path)
    [fit] = fits
    assert (fit.name, fit.path, fit.num_steps, fit.every["save_every"]) == (
        "autoencoder", tmp_path / "autoencoder.pt", 40, 7,
    )  # fmt: skip
    assert adam(fit) == (0.03, (0.9, 0.99), 0.0, numbers(model)) and fit.model is model
    assert [fit.lr(step) for step in range(40)] == [one_cycle(step, 40, 0.03) for step in range(40)]
    for step in (0, 5):
        fit.loss(step)
        own, images, noise, given = asked.pop()
        assert own is model and given is config
        assert torch.equal(images, autoencoder.draw_batch(3, 9, step))
        assert torch.equal(noise, autoencoder.draw_noise(config, step))
    assert (tmp_path / "autoencoder" / "config.json").is_file()


def test_a_decoder_is_sharpened_alone_on_scenes_of_its_own_seed(
    fits: list[Fit], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(1)
    autoencoder.build(autoencoder.AutoencoderConfig(width=8, latent_channels=4)).save_pretrained(tmp_path / "vae")
    config = sharpen.SharpenConfig(steps=40, batch=3, lr=0.02, seed=8, save_every=6)
    asked = seen(monkeypatch, sharpen)
    model = sharpen.train(config, tmp_path / "vae", tmp_path)
    [fit] = fits
    assert (fit.path, fit.num_steps, fit.every["save_every"]) == (tmp_path / "sharpen.pt", 40, 6)
    assert adam(fit) == (0.02, (0.9, 0.99), 0.0, numbers(model.decoder))
    assert not any(p.requires_grad for p in model.encoder.parameters())
    assert [fit.lr(step) for step in (0, 20, 39)] == [one_cycle(step, 40, 0.02) for step in (0, 20, 39)]
    for step in (0, 5):
        fit.loss(step)
        own, images, given, at = asked.pop()
        assert own is model and (given, at) == (config, step)
        assert torch.equal(images, autoencoder.draw_batch(3, 8, step))


def same(one: scorer.PairBatch, other: scorer.PairBatch) -> bool:
    return all(
        np.array_equal(value, getattr(other, name)) if isinstance(value, np.ndarray)
        else torch.equal(value, getattr(other, name))
        for name, value in vars(one).items()
    )  # fmt: skip


@pytest.mark.parametrize("kind", ["query", "clip"])
def test_a_scorer_is_trained_on_pairs_of_its_own_half_and_seed(
    kind: str, fits: list[Fit], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = scorer.ScorerTraining(
        "own", kind, 1, 5, width=16, steps=200, batch=3, lr=0.01, wrong_captions=2, save_every=4
    )
    asked = seen(monkeypatch, scorer)
    kept = scorer.train(config, tmp_path)
    [fit] = fits
    assert (fit.path, fit.num_steps, fit.every["save_every"]) == (tmp_path / "scorer-own.pt", 200, 4)
    assert adam(fit) == (0.01, (0.9, 0.98), 0.02, numbers(fit.model))
    steps = (0, 99, 150, 199)
    assert [fit.lr(step) for step in steps] == [trapezoid(step, 200, 0.01, 100, 0.3) for step in steps]
    for step in (0, 7):
        fit.loss(step)
        own, batch = asked.pop()
        assert own is fit.model and same(batch, scorer.draw_pairs(3, 2, 1, TOKENIZER, 5, step))
    assert kept.config == fit.model.config and kept.config.kind == kind and kept.config.width == 16
    rows = fit.model.text.get_input_embeddings().weight
    at = {word: 3 + i for i, word in enumerate(vocabulary.words())}
    moved = rows[at["left_red"]] - rows[at["top_red"]]
    torch.testing.assert_close(moved, rows[at["left_star"]] - rows[at["top_star"]], atol=1e-6, rtol=1e-4)


def drawn(num: int = 9) -> failures.Failures:
    scenes = world.sample(num, 5)
    images = torch.randint(0, 256, (num, 3, 64, 64), generator=torch.Generator().manual_seed(2), dtype=torch.uint8)
    return failures.Failures(images, scenes.captions(), scenes)


def test_a_bounded_scorer_is_trained_on_its_own_half_and_on_failures_with_their_own_truth(
    fits: list[Fit], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small.write_models(tmp_path)
    config = refine.RefineConfig(steps=40, scenes=2, pictures=4, generated=0.5, lr=0.02, seed=6, save_every=5)
    training = scorer.ScorerTraining("trained", "query", 1, 7, width=32)
    given, asked = drawn(), seen(monkeypatch, refine)
    vae: Any = nn.Identity()
    kept = refine.train(config, training, tmp_path / "shapes-scorers" / "trained", vae, given, tmp_path)
    [fit] = fits
    assert (fit.path, fit.num_steps, fit.every["save_every"]) == (tmp_path / "bounded-trained.pt", 40, 5)
    assert adam(fit) == (0.02, (0.9, 0.98), 0.02, numbers(fit.model)) and fit.model.training
    assert [fit.lr(step) for step in (0, 1, 20)] == [one_cycle(step, 40, 0.02, warmup=0.05) for step in (0, 1, 20)]
    found = []
    for step in (0, 3):
        fit.loss(step)
        own, _, batch, (truth, images, ids), grain, generated = asked.pop()
        assert own is fit.model and generated == 0.5 and same(batch, scorer.draw_pairs(2, 2, 1, TOKENIZER, 7, step, 7))
        at = world.rng(6, 7, step).integers(0, 9, 4)
        assert torch.equal(truth, world.render_NCHW(given.scenes.take(at)))
        assert torch.equal(images, given.images_NCHW[torch.from_numpy(at)] / 255)
        assert ids.tolist() == vocabulary.encode(TOKENIZER, [given.texts[i] for i in at])
        assert grain.shape == (3 * 2 + 2 * 4, 3, 64, 64) and abs(float(grain.std()) - 1) < 0.02
        found.append((at, grain))
    assert not np.array_equal(found[0][0], found[1][0]) and not torch.equal(found[0][1], found[1][1])
    assert kept.config.bounded


def test_the_reader_is_trained_on_fresh_scenes_and_on_failures_with_their_own_scenes(
    fits: list[Fit], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = reader.ReaderConfig(steps=40, scenes=3, pictures=4, width=16, lr=0.02, seed=6, save_every=5)
    given, asked = drawn(), seen(monkeypatch, reader)
    reader.train(config, nn.Identity(), given, tmp_path)
    [fit] = fits
    assert (fit.path, fit.num_steps, fit.every["save_every"]) == (tmp_path / "scorer-reported.pt", 40, 5)
    assert adam(fit) == (0.02, (0.9, 0.98), 0.02, numbers(fit.model))
    assert [fit.lr(step) for step in (0, 1, 20)] == [one_cycle(step, 40, 0.02, warmup=0.05) for step in (0, 1, 20)]
    seeds = []
    for step in (0, 3):
        fit.loss(step)
        own, _, scenes, seed, (some, images, ids) = asked.pop()
        gen = world.rng(6, step, 1)
        at = gen.integers(0, 9, 4)
        assert own is fit.model and scenes.captions() == world.sample(3, 6, step).captions()
        assert some.captions() == given.scenes.take(at).captions()
        assert torch.equal(images, given.images_NCHW[torch.from_numpy(at)] / 255)
        assert ids.tolist() == vocabulary.encode(TOKENIZER, [given.texts[i] for i in at])
        seeds.append(seed)
        assert seed == int(gen.integers(2**31))
    assert len(set(seeds)) == 2


def softplus(x: Tensor) -> Tensor:
    return torch.log1p(torch.exp(x.double()))


@pytest.mark.parametrize("generated", [1.0, 0.25, 0.0])
def test_a_bounded_scorers_loss_has_each_part_with_its_own_weight(
    generated: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Right ones up, four kinds of wrong ones down by a quarter each, and half of each gap within a caption.

    A generator's pictures may count for less: then the other three kinds are a larger part of what is wrong.
    """
    gen = torch.Generator().manual_seed(4)
    num, many, wrong = 2, 3, 2
    own, captions = torch.randn(3 * num + 2 * many, generator=gen), torch.randn(num, wrong, generator=gen)
    asked: list[Any] = []
    monkeypatch.setattr(refine, "logits", lambda *given: (asked.append(given), (own, captions))[1])
    monkeypatch.setattr(refine, "seen_through", lambda vae, images: 0.5 * images)
    batch = scorer.draw_pairs(num, wrong, None, TOKENIZER, 3)
    truth, pictures = (torch.rand(many, 3, 64, 64, generator=gen) for _ in range(2))
    ids, grain = torch.arange(many * 12).view(many, 12), torch.randn(12, 3, 64, 64, generator=gen)
    given = (truth, pictures, ids)
    found = refine.loss("model", None, batch, given, grain, generated)  # type: ignore[arg-type]
    if generated == 1:
        assert found == refine.loss("model", None, batch, given, grain)  # type: ignore[arg-type]
        asked.pop()
    right, altered, degraded, true, made = own.split([num, num, num, many, many])
    expected = softplus(-torch.cat([right, true])).mean()
    worse = {"altered": altered, "degraded": degraded, "captions": captions, "made": made}
    weights = {"altered": 1.0, "degraded": 1.0, "captions": 1.0, "made": generated}
    expected += sum(weights[k] * softplus(part).mean() for k, part in worse.items()) / sum(weights.values())
    better = {"altered": right, "degraded": right, "captions": right[:, None], "made": true}
    expected += 0.5 * sum(weights[k] * softplus(part - better[k]).mean() for k, part in worse.items())
    assert float(found) == pytest.approx(float(expected), rel=1e-5)
    [(model, images, first, others)] = asked
    rendered = torch.cat([batch.right_NCHW, batch.altered_NCHW, batch.degraded_NCHW, truth])
    shown = (torch.cat([0.5 * rendered, pictures]) + refine.SOFTEST * grain).clamp(0, 1)
    assert model == "model" and torch.allclose(images, shown), "a generator's pictures have been through it already"
    assert torch.equal(first, torch.cat([batch.ids_NPL[:, 0]] * 3 + [ids] * 2))
    assert torch.equal(others, batch.ids_NPL[:, 1:])


def test_a_readers_loss_has_each_part_with_its_own_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(1)
    config = rewards.ScorerConfig("reader", len(TOKENIZER), vocabulary.MAX_TOKENS, 1, 0, width=16)
    model = rewards.TokenReader(config)
    scenes, some = world.sample(4, 1), world.sample(3, 2)
    logits = torch.randn(2 * 4 + 2 * 3, len(TOKENIZER) + 1, generator=torch.Generator().manual_seed(3))
    shown: list[Tensor] = []
    monkeypatch.setattr(model, "encode_image", lambda images: (shown.append(images), logits)[1])
    monkeypatch.setattr(reader, "seen_through", lambda vae, images: 0.5 * images)
    monkeypatch.setattr(degrade, "photograph", lambda images, gen: images)
    pictures = torch.rand(3, 3, 64, 64, generator=torch.Generator().manual_seed(5))
    ids = torch.tensor(vocabulary.encode(TOKENIZER, some.captions()))
    found = reader.loss(model, None, scenes, 7, (some, pictures, ids))
    right, degraded, truth, made = logits.double().split([4, 4, 3, 3])
    good, no = torch.cat([right, truth]), rewards.TokenReader.no_words
    true = torch.cat([reader.words_of(part, len(TOKENIZER)) for part in (scenes, some)]).double()
    words = (softplus(good[:, no:-1]) - true[:, no:] * good[:, no:-1]).sum(1).mean()
    well = softplus(-good[:, -1]).mean() + softplus(degraded[:, -1]).mean()
    asked = torch.cat([true[4:, :], torch.ones(3, 1)], 1)
    asked[:, :no] = 0
    gap = ((softplus(-truth) - softplus(-made)) * asked).sum(1)
    assert float(found) == pytest.approx(float(words + well + 0.5 * softplus(gap).mean()), rel=1e-4)
    rendered = torch.cat([world.render_NCHW(scenes), degrade.draw(scenes, 7)[0], world.render_NCHW(some)])
    apart = shown[0] - torch.cat([0.5 * rendered, pictures])
    assert 0.005 < float(apart.std()) < 0.015, "a hundredth of grain on all of them"


def test_failures_are_of_each_batchs_own_scenes_words_noise_and_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []

    def way(name: str) -> Any:
        def draw(texts: list[str], seeds: list[int], shape: Any, batch: int) -> Tensor:
            asked.append((name, texts, list(seeds), shape, batch))
            return torch.full((len(texts), 3, 64, 64), 0.4999)

        return SimpleNamespace(model=SimpleNamespace(latent_shape=lambda *size: size), draw=draw)

    monkeypatch.setattr(failures, "samplers", lambda name: [way(name)])
    config = failures.FailuresConfig(2 * failures.BATCH - 3, ("a", "b"), singles=0.25, seed=13)
    failures.draw(config, tmp_path / "drawn.pt")
    found = failures.read([tmp_path / "drawn.pt"])
    for i, (name, texts, seeds, shape, batch) in enumerate(asked):
        scenes = prompts.training_scenes(64, 13, i, singles=0.25)
        assert texts == pairs.captions(scenes, prompts.training_styles(scenes, world.rng(13, i, 3)))
        assert found.texts[64 * i : 64 * (i + 1)] == texts and (name, shape, batch) == ("ab"[i], (64, 64), 64)
        assert seeds == world.rng(13, i, 4).integers(2**31, size=64).tolist() and len(set(seeds)) == 64
        assert found.scenes.captions()[64 * i : 64 * (i + 1)] == scenes.captions()
        assert (scenes.count_N == 1).mean() == 0.25
    assert len(asked) == 2 and asked[0][2] != asked[1][2] and (found.images_NCHW == 127).all(), "to the nearest byte"
    assert math.isclose(float(found.images(np.array([3, 70])).mean()), 127 / 255, rel_tol=1e-6)


def test_half_of_a_runs_prompts_are_single_objects_of_its_own_seed_and_step() -> None:
    given = prompts.source(5)
    drawn_texts = given.train(3, 40)
    assert sum(parse_plain(text).relation is None for text in drawn_texts) == 20
    assert drawn_texts == prompts.training_prompts(40, 5, 3, singles=0.5)
    assert drawn_texts != given.train(4, 40) and drawn_texts != prompts.source(6).train(3, 40)
    assert (given.calibration, given.validation, given.test) == prompts.measuring_prompts() and not given.of_file


def parse_plain(text: str) -> Any:
    for filler in pairs.FILLERS[1:]:
        text = text.removeprefix(filler)
    return parse(text)


@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")  # fp32 norms under bf16, as wanted
def test_a_teachers_average_is_as_slow_as_it_is_told_and_its_gradient_is_clipped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []
    norms: list[float] = []

    class Average(teacher.EMAModel):
        def __init__(self, parameters: Any, **how: Any) -> None:
            asked.append(how)
            super().__init__(parameters, **how)

    real = torch.nn.utils.clip_grad_norm_
    monkeypatch.setattr(teacher, "EMAModel", Average)
    monkeypatch.setattr(
        teacher.torch.nn.utils, "clip_grad_norm_", lambda ps, most: (norms.append(most), real(ps, most))[1]
    )
    torch.manual_seed(1)
    autoencoder.build(autoencoder.AutoencoderConfig(width=8, latent_channels=4)).save_pretrained(
        tmp_path / "autoencoder"
    )
    config = teacher.TeacherConfig(width=32, single_blocks=1, batch=2, cached_batches=1, steps=2, ema=0.7)
    teacher.train(config, tmp_path)
    assert asked == [{"decay": 0.7, "use_ema_warmup": True, "power": 0.75}] and norms == [1.0, 1.0]


def test_a_fit_clips_what_it_trains_logs_and_saves_every_so_many_steps_and_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A slope of 3 and 4 is clipped to 0.6 and 0.8; the rate of step k is k + 1, with momentum from step to step."""
    saved: list[int] = []
    real = checkpoint.save
    monkeypatch.setattr(checkpoint, "save", lambda path, state: (saved.append(state["step"]), real(path, state)))

    def run(folder: Path, num_steps: int) -> tuple[list[float], float]:
        model = nn.ParameterDict({"w": nn.Parameter(torch.zeros(2)), "still": nn.Parameter(torch.zeros(1))})
        optimizer = torch.optim.SGD([model["w"]], 99.0, momentum=0.5)

        def loss(step: int) -> Tensor:
            return (model["w"] * torch.tensor([3.0, 4.0])).sum() + 100 * model["still"].sum()

        fit(
            "it",
            folder / "it.pt",
            model,
            optimizer,
            loss,
            lambda step: step + 1.0,
            num_steps,
            save_every=2,
            log_every=3,
        )
        return model["w"].tolist(), float(model["still"].detach())

    far, speed = 0.0, 0.0
    for step in range(7):
        speed = 0.5 * speed + 1
        far += (step + 1) * speed
    assert run(tmp_path / "whole", 7) == (pytest.approx([-0.6 * far, -0.8 * far]), 0.0)
    assert saved == [2, 4, 6]
    run(tmp_path / "cut", 3)
    assert run(tmp_path / "cut", 7) == run(tmp_path / "whole", 7) and saved[3:] == [2, 4, 6]
    for name in ("whole", "cut"):
        rows = read_log(tmp_path / name / "it.jsonl")
        assert [row["step"] for row in rows] == [0, 3, 6], name

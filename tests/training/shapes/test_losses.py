"""The starter world's autoencoder: its losses by hand, the noise in them, its figures; and the loop that trains all."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from training import checkpoint
from training.shapes import autoencoder, loop, sharpen, vocabulary, world
from training.steplog import read_log

TOKENIZER = vocabulary.tokenizer()
NUM = 400


class Coder:
    """Latents are a picture's colours, averaged over cells; what is decoded is a third of what is asked for."""

    def __init__(self) -> None:
        self.asked: list[tuple[Tensor, bool]] = []
        self.gradient: list[bool] = []

    def encoder(self, x_BCHW: Tensor) -> Tensor:
        self.gradient.append(torch.is_grad_enabled())
        return 1 + 2 * F.avg_pool2d(x_BCHW, 8).repeat(1, 2, 1, 1)[:, :4]

    def decoder(self, z_BCHW: Tensor) -> Tensor:
        self.asked.append((z_BCHW, torch.is_grad_enabled()))
        return F.interpolate(z_BCHW[:, :3], scale_factor=8) / 3


def pictures(num: int = 4) -> Tensor:
    return 2 * torch.rand(num, 3, 64, 64, generator=torch.Generator().manual_seed(1)) - 1


def test_the_autoencoders_loss_is_l1_and_twice_l2_and_its_channels_moments() -> None:
    config = autoencoder.AutoencoderConfig(moment_weight=0.25)
    x, noise = pictures(), torch.randn(4, 4, 8, 8, generator=torch.Generator().manual_seed(2))
    model = Coder()
    found = autoencoder.loss(model, x, noise, config)
    z = model.encoder(x).numpy().astype(np.float64)
    y = model.decoder(torch.from_numpy(z).float() + noise).numpy()
    apart = y - x.numpy()
    means, stds = z.mean((0, 2, 3)), z.std((0, 2, 3), ddof=1)
    moments = (means**2).mean() + ((stds - 1) ** 2).mean()
    assert min(abs(means)) > 0.5 and min(abs(stds - 1)) > 0.1
    assert float(found) == pytest.approx(np.abs(apart).mean() + 2 * (apart**2).mean() + 0.25 * moments, rel=1e-5)
    torch.testing.assert_close(model.asked[0][0], model.encoder(x) + noise)


def strengths(noise_BCHW: Tensor) -> Tensor:
    return noise_BCHW.flatten(1).std(1)


def test_latent_noise_is_of_every_strength_up_to_the_largest() -> None:
    """One strength for a picture, uniform from 0; the same at the same step."""
    config = autoencoder.AutoencoderConfig(batch=NUM, latent_noise=0.5)
    noise = autoencoder.draw_noise(config, 3)
    assert noise.shape == (NUM, config.latent_channels, 8, 8)
    found = strengths(noise)
    assert 0 <= found.min() < 0.02 and 0.48 < found.max() < 0.53 and found.mean() == pytest.approx(0.25, abs=0.03)
    unit = noise / found[:, None, None, None]
    assert unit.mean().abs() < 0.01 and float(unit.std(0).mean()) == pytest.approx(1, abs=0.02)
    assert torch.equal(noise, autoencoder.draw_noise(config, 3))
    assert not torch.equal(noise, autoencoder.draw_noise(config, 4))
    assert torch.equal(2 * noise, autoencoder.draw_noise(autoencoder.AutoencoderConfig(batch=NUM, latent_noise=1), 3))


def test_a_batch_is_the_worlds_scenes_of_its_seed_and_step_from_minus_one_to_one() -> None:
    found = autoencoder.draw_batch(6, 5, 9)
    assert torch.equal(found, 2 * world.render_NCHW(world.sample(6, 5, 9)) - 1)
    assert found.is_contiguous(memory_format=torch.channels_last)


def test_the_decoder_alone_is_sharpened_from_latents_with_noise() -> None:
    """L1 and twice L2 of what is decoded; the encoder has no gradient, and the noise is of every strength."""
    config, x, model = sharpen.SharpenConfig(latent_noise=0.35), pictures(NUM), Coder()
    found = sharpen.loss(model, x, config, 7)
    (asked, gradient), plain = model.asked[0], Coder()
    apart = (plain.decoder(asked) - x).double()
    assert float(found) == pytest.approx(float(apart.abs().mean() + 2 * apart.square().mean()), rel=1e-5)
    assert model.gradient == [False] and gradient
    noise = asked - plain.encoder(x)
    spread = strengths(noise)
    assert 0 <= spread.min() < 0.02 and 0.33 < spread.max() < 0.38 and spread.mean() == pytest.approx(0.175, abs=0.02)
    sharpen.loss(again := Coder(), x, config, 7)
    sharpen.loss(other := Coder(), x, config, 8)
    assert torch.equal(again.asked[0][0], asked) and not torch.equal(other.asked[0][0], asked)


def test_the_round_trips_error_is_of_fresh_scenes_in_decibels() -> None:
    halved = SimpleNamespace(encoder=lambda x: x, decoder=lambda z: z / 2)
    x = world.render_NCHW(world.sample(70, 9)).double()
    expected = -10 * math.log10(float((x - (x / 2 + 0.25)).square().mean()))
    assert autoencoder.psnr_db(halved, 70) == pytest.approx(expected, rel=1e-5)
    bright = SimpleNamespace(encoder=lambda x: x, decoder=lambda z: z + 9)
    assert (autoencoder.round_trip(bright, x[:2].float()) == 1).all(), "nothing lies outside of 0 to 1"


def test_the_scale_and_shift_of_latents_are_measured_on_scenes_that_no_step_saw() -> None:
    torch.manual_seed(1)
    config = autoencoder.AutoencoderConfig(width=8, latent_channels=4, seed=7, steps=3)
    model = autoencoder.build(config)
    autoencoder.finish(model, config)
    with torch.no_grad():
        z = torch.cat([model.encoder(part) for part in autoencoder.draw_batch(2048, 7, 3).split(256)])
    assert model.config.scaling_factor == pytest.approx(1 / float(z.std()), rel=1e-4)
    assert model.config.shift_factor == pytest.approx(float(z.mean()), rel=1e-3, abs=1e-5)
    assert not model.training


def test_a_loop_clips_what_it_trains_logs_and_saves_as_often_as_it_is_told(tmp_path: Path) -> None:
    """w falls by the rate times a gradient of at most 1."""
    weight, still = nn.Parameter(torch.tensor(0.0)), nn.Parameter(torch.tensor(5.0))
    model = nn.ParameterDict({"w": weight, "still": still})

    def fit(num_steps: int) -> None:
        optimizer = torch.optim.SGD([weight], 1.0)
        loop.fit(
            "w", tmp_path / "w.pt", model, optimizer, lambda step: (0.5 if step % 2 else 8.0) * weight + 0 * still,
            lambda step: 0.1 * (step + 1), num_steps, save_every=2, log_every=3,
        )  # fmt: skip

    fit(5)
    assert float(weight.detach()) == pytest.approx(-(0.1 + 0.5 * 0.2 + 0.3 + 0.5 * 0.4 + 0.5))
    saved = checkpoint.load(tmp_path / "w.pt")
    assert saved is not None and saved["step"] == 4
    assert float(saved["model"]["w"]) == pytest.approx(-0.7) and float(saved["model"]["still"]) == 5.0
    assert [row["step"] for row in read_log(tmp_path / "w.jsonl")] == [0, 3]
    fit(6)  # from the fourth step
    assert float(weight.detach()) == pytest.approx(-0.7 - 0.5 - 0.5 * 0.6)

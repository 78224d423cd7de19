"""The starter world's autoencoder: a diffusers AutoencoderTiny, 8x down, 16 channels.

Trained with L1 + 2 MSE on freshly sampled scenes, with noise of every strength up to ``latent_noise`` on the latents:
the decoder learns to draw clean shapes from the rough latents of a generator. Each channel is kept near mean 0 and
standard deviation 1, so that one scaling factor serves all channels.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderTiny
from torch import Tensor

from training.optim import one_cycle
from training.shapes import world
from training.shapes.loop import fit


@dataclass(frozen=True)
class AutoencoderConfig:
    """Defaults: about 15 minutes on two cores."""

    steps: int = 7_000
    batch: int = 16
    lr: float = 2e-3
    width: int = 32
    latent_channels: int = 16
    latent_noise: float = 0.5
    moment_weight: float = 1e-2
    seed: int = 101
    save_every: int = 500


def build(config: AutoencoderConfig) -> Any:
    """No residual block at full resolution: half of the time would go there for 64x64 edges."""
    return AutoencoderTiny(
        latent_channels=config.latent_channels,
        encoder_block_out_channels=(config.width,) * 4,
        decoder_block_out_channels=(config.width,) * 4,
        num_encoder_blocks=(0, 1, 2, 2),
        num_decoder_blocks=(4, 2, 1, 0),
    )


def loss(model: Any, x_BCHW: Tensor, noise_BCHW: Tensor, config: AutoencoderConfig) -> Tensor:
    """Reconstruction loss of images in [-1, 1], plus a penalty that keeps each channel at mean 0, deviation 1."""
    with torch.autocast("cpu", torch.bfloat16):
        z_BCHW = model.encoder(x_BCHW)
        y_BCHW = model.decoder(z_BCHW + noise_BCHW)
    y_BCHW, z_BCHW = y_BCHW.float(), z_BCHW.float()
    moments = z_BCHW.mean((0, 2, 3)).square().mean() + (z_BCHW.std((0, 2, 3)) - 1).square().mean()
    return F.l1_loss(y_BCHW, x_BCHW) + 2 * F.mse_loss(y_BCHW, x_BCHW) + config.moment_weight * moments


def draw_batch(num: int, seed: int, step: int) -> Tensor:
    """The images of one step, in [-1, 1]: a function of (seed, step) alone."""
    images = world.render_NCHW(world.sample(num, seed, step))
    return images.mul(2).sub(1).to(memory_format=torch.channels_last)


def draw_noise(config: AutoencoderConfig, step: int) -> Tensor:
    """Latent noise of one step; its deviation is uniform in [0, latent_noise], one for each image."""
    gen = torch.Generator().manual_seed(step)
    strength = config.latent_noise * torch.rand(config.batch, 1, 1, 1, generator=gen)
    return strength * torch.randn(config.batch, config.latent_channels, 8, 8, generator=gen)


def train(config: AutoencoderConfig, run_dir: Path) -> Any:
    """Train the autoencoder, or resume; its folder ``run_dir/autoencoder`` opens with from_pretrained."""
    done = run_dir / "autoencoder"
    if done.exists():
        return AutoencoderTiny.from_pretrained(done)
    torch.manual_seed(config.seed)
    model = build(config).to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(model.parameters(), config.lr, betas=(0.9, 0.99), weight_decay=0.0)
    fit(
        "autoencoder",
        run_dir / "autoencoder.pt",
        model,
        optimizer,
        lambda step: loss(model, draw_batch(config.batch, config.seed, step), draw_noise(config, step), config),
        lambda step: one_cycle(step, config.steps, config.lr),
        config.steps,
        save_every=config.save_every,
        log_every=50,
    )
    finish(model, config)
    model.save_pretrained(done)
    return model


@torch.no_grad()
def finish(model: Any, config: AutoencoderConfig) -> None:
    """Measure the latents' mean and deviation and write them into the config, as Flux expects them."""
    model.eval().to(memory_format=torch.contiguous_format)
    x = world.render_NCHW(world.sample(2048, config.seed, config.steps)).mul(2).sub(1)
    z = torch.cat([model.encoder(part) for part in x.split(64)])
    model.register_to_config(scaling_factor=1 / float(z.std()), shift_factor=float(z.mean()))


@torch.no_grad()
def psnr_db(model: Any, num: int = 512, seed: int = 9) -> float:
    """Peak signal-to-noise ratio of the round trip on fresh scenes."""
    x = world.render_NCHW(world.sample(num, seed))
    y = torch.cat([round_trip(model, part) for part in x.split(64)])
    return float(-10 * torch.log10(F.mse_loss(y, x)))


@torch.no_grad()
def round_trip(model: Any, x_BCHW: Tensor) -> Tensor:
    """Encode and decode images in [0, 1]."""
    y_BCHW = model.decoder(model.encoder(x_BCHW.mul(2).sub(1)))
    return y_BCHW.add(1).div(2).clamp(0, 1)

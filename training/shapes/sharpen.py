"""A sharper decoder for unchanged latents: one more residual block, at full resolution.

The first decoder's last nonlinearity is at 32x32: what it draws at 64x64 is interpolated, and thin parts of small
shapes are rounded off. The encoder is frozen, so a teacher that was trained on its latents need not be trained again.
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
from training.shapes.autoencoder import draw_batch
from training.shapes.loop import fit


@dataclass(frozen=True)
class SharpenConfig:
    """Defaults: about 12 minutes on one core."""

    steps: int = 2_000
    batch: int = 16
    lr: float = 1.2e-3
    latent_noise: float = 0.35
    seed: int = 777
    save_every: int = 250


def deepened(old: Any) -> Any:
    """The same autoencoder with one more block before the decoder's last convolution; the rest keeps its weights."""
    blocks = list(old.config.num_decoder_blocks)
    new: Any = AutoencoderTiny(
        latent_channels=old.config.latent_channels,
        encoder_block_out_channels=tuple(old.config.encoder_block_out_channels),
        decoder_block_out_channels=tuple(old.config.decoder_block_out_channels),
        num_encoder_blocks=tuple(old.config.num_encoder_blocks),
        num_decoder_blocks=(*blocks[:-1], blocks[-1] + 1),
    )
    new.register_to_config(scaling_factor=old.config.scaling_factor, shift_factor=old.config.shift_factor)
    new.encoder.load_state_dict(old.encoder.state_dict())
    *before, last = old.decoder.layers
    for layer, known in zip(new.decoder.layers, before, strict=False):
        layer.load_state_dict(known.state_dict())
    new.decoder.layers[-1].load_state_dict(last.state_dict())
    return new


def loss(model: Any, x_BCHW: Tensor, config: SharpenConfig, step: int) -> Tensor:
    """L1 + 2 MSE of images in [-1, 1] from latents with noise of every strength up to ``latent_noise``."""
    gen = torch.Generator().manual_seed(step)
    with torch.autocast("cpu", torch.bfloat16):
        with torch.no_grad():
            z_BCHW = model.encoder(x_BCHW)
        strength = config.latent_noise * torch.rand(len(x_BCHW), 1, 1, 1, generator=gen)
        y_BCHW = model.decoder(z_BCHW + strength * torch.randn(z_BCHW.shape, generator=gen))
    return F.l1_loss(y_BCHW.float(), x_BCHW) + 2 * F.mse_loss(y_BCHW.float(), x_BCHW)


def train(config: SharpenConfig, start: Path, run_dir: Path) -> Any:
    """Train the decoder of the autoencoder at ``start``, or resume; it is written to ``run_dir/sharpened``."""
    done = run_dir / "sharpened"
    if done.exists():
        return AutoencoderTiny.from_pretrained(done)
    torch.manual_seed(config.seed)
    model = deepened(AutoencoderTiny.from_pretrained(start)).to(memory_format=torch.channels_last)
    model.encoder.requires_grad_(False)
    optimizer = torch.optim.AdamW(model.decoder.parameters(), config.lr, betas=(0.9, 0.99), weight_decay=0.0)
    fit(
        "decoder",
        run_dir / "sharpen.pt",
        model,
        optimizer,
        lambda step: loss(model, draw_batch(config.batch, config.seed, step), config, step),
        lambda step: one_cycle(step, config.steps, config.lr),
        config.steps,
        save_every=config.save_every,
        log_every=50,
    )
    model.eval().to(memory_format=torch.contiguous_format).save_pretrained(done)
    return model

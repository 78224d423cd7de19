"""What the tiny pipelines of several families have in common."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import AutoencoderKL
from torch import nn

CHANNELS = 4
LEAST_STD = 0.1  # of the pixels of a random decoder, in [0, 1]


def autoencoder() -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(4, 4, 4, 4),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        latent_channels=CHANNELS,
        norm_num_groups=2,
        scaling_factor=0.36,
        shift_factor=0.12,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )


def ready(pipe: Any) -> Any:
    pipe.set_progress_bar_config(disable=True)
    for part in pipe.components.values():
        if isinstance(part, nn.Module):
            part.requires_grad_(False).eval()
    with torch.no_grad():
        experts = (pipe.transformer, getattr(pipe, "transformer_2", None))
        for name, weight in (pair for expert in experts if expert is not None for pair in expert.named_parameters()):
            if weight.ndim == 2 and ("norm" in name or "proj_out" in name or "embed" in name):
                weight.normal_(std=weight.shape[1] ** -0.5)
        _enliven(pipe.vae)
    return pipe


def _enliven(vae: Any) -> None:
    """A random decoder may answer almost with a constant: its last layer is raised until the pixels differ."""
    frames = (1,) if "z_dim" in vae.config else ()
    z = 1.5 * torch.randn(4, CHANNELS, *frames, 8, 4, generator=torch.Generator().manual_seed(0))
    pixels = vae.decode(z, return_dict=False)[0]
    vae.decoder.conv_out.weight *= max(1.0, LEAST_STD / (pixels.std().item() / 2))  # pixels are from -1 to 1

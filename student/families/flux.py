"""FLUX.1: the four things that a sampler asks of a pipeline, made of the pipeline's own components.

Legend: B images, C latent channels, H x W latent cells, L tokens, E token features, P pooled features.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from student.sampler import pack, unpack


@dataclass(frozen=True)
class Condition:
    """What the text encoders make of B prompts: every token (T5), and one pooled vector (CLIP)."""

    tokens_BLE: Tensor
    pooled_BP: Tensor


class Flux(nn.Module):
    """Encoders, transformer and decoder of a FluxPipeline; latents go in and out unpacked.

    ``guidance`` is the value fed to a guidance-distilled transformer (FLUX.1-dev), else None.
    """

    def __init__(self, pipe: Any, guidance: float | None = None) -> None:
        super().__init__()
        self.text_encoder = pipe.text_encoder
        self.text_encoder_2 = pipe.text_encoder_2
        self.transformer = pipe.transformer
        self.vae = pipe.vae
        self.guidance = guidance if pipe.transformer.config.guidance_embeds else None

    def encode(self, ids_clip_BL: Tensor, ids_t5_BL: Tensor) -> Condition:
        """Token ids (int64) of the two tokenizers -> condition."""
        pooled_BP = self.text_encoder(ids_clip_BL).pooler_output
        return Condition(self.text_encoder_2(ids_t5_BL)[0], pooled_BP)

    def velocity(self, x_BCHW: Tensor, sigma: float | Tensor, condition: Condition) -> Tensor:
        """``noise - data`` as predicted at ``sigma``: one value for all images, or a tensor of B."""
        batch, _, height, width = x_BCHW.shape
        tokens = condition.tokens_BLE
        sigma_B = torch.as_tensor(sigma, dtype=x_BCHW.dtype, device=x_BCHW.device).expand(batch)
        guidance_B = None if self.guidance is None else torch.full_like(sigma_B, self.guidance)
        v_BND: Tensor = self.transformer(
            hidden_states=pack(x_BCHW),
            timestep=sigma_B,
            guidance=guidance_B,
            pooled_projections=condition.pooled_BP,
            encoder_hidden_states=tokens,
            txt_ids=torch.zeros(tokens.shape[1], 3, device=x_BCHW.device, dtype=x_BCHW.dtype),
            img_ids=_places(height // 2, width // 2, x_BCHW),
            return_dict=False,
        )[0]
        return unpack(v_BND, height, width)

    def decode(self, x_BCHW: Tensor) -> Tensor:
        """Latents -> images_BCHW in [0, 1]."""
        config = self.vae.config
        raw_BCHW = x_BCHW / config.scaling_factor + config.shift_factor
        images_BCHW: Tensor = self.vae.decode(raw_BCHW, return_dict=False)[0]
        return (images_BCHW * 0.5 + 0.5).clamp(0, 1)


def _places(rows: int, columns: int, like: Tensor) -> Tensor:
    """Where each token lies, (N, 3), as FluxPipeline._prepare_latent_image_ids says it."""
    places = torch.zeros(rows, columns, 3, device=like.device, dtype=like.dtype)
    places[..., 1] += torch.arange(rows, device=like.device)[:, None]
    places[..., 2] += torch.arange(columns, device=like.device)[None, :]
    return places.reshape(rows * columns, 3)

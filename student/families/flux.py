"""FLUX.1 (dev, schnell, and the starter world's teacher and students).

Legend: B images, C latent channels, H x W latent cells, N = (H/2)(W/2) packed tokens, D their channels, L text tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from student.families.family import Condition, Family, check_size, check_still, scaled_decode, token_ids
from student.sampler import pack, unpack

MAX_TOKENS, GUIDANCE = 512, 3.5  # FluxPipeline's defaults


class Flux(Family):
    """A FluxPipeline; ``guidance`` is the input of a guidance-distilled transformer (FLUX.1-dev), None for others."""

    name = "flux"
    encoders = ("text_encoder", "text_encoder_2")
    packing = 2
    text_encoder: Any
    text_encoder_2: Any

    def __init__(self, pipe: Any, guidance: float | None = None, max_tokens: int | None = None) -> None:
        super().__init__(pipe, max_tokens or MAX_TOKENS)
        self.tokenizer, self.tokenizer_2 = pipe.tokenizer, pipe.tokenizer_2
        distilled = pipe.transformer.config.guidance_embeds
        self.guidance = (GUIDANCE if guidance is None else guidance) if distilled else None
        self._channels = pipe.transformer.config.in_channels // 4
        self._cell_px = pipe.vae_scale_factor

    @property
    def baked(self) -> dict[str, float]:
        """The guidance input of a guidance-distilled transformer; the others have none."""
        return {} if self._guidance_input is None else {"guidance_scale": self._guidance_input}

    @property
    def _guidance_input(self) -> float | None:
        """The guidance, where this transformer reads one: FLUX.1-schnell beside a teacher that is dev does not."""
        return self.guidance if self.transformer.config.guidance_embeds else None

    def tokenise(self, prompts: Sequence[str]) -> tuple[Tensor, ...]:
        """Ids for CLIP and for T5."""
        clip_BL = token_ids(self.tokenizer, prompts, self.tokenizer.model_max_length)
        return clip_BL, token_ids(self.tokenizer_2, prompts, self.max_tokens)

    def encode_ids(self, *ids_BL: Tensor) -> Condition:
        """Ids for CLIP (pooled) and for T5 (tokens)."""
        ids_clip_BL, ids_t5_BL = ids_BL
        pooled_BP = self.text_encoder(ids_clip_BL).pooler_output
        return Condition(self.text_encoder_2(ids_t5_BL)[0], pooled_BP)

    @property
    def sides_px(self) -> tuple[int, int | None]:
        """Multiples of two cells, of any length."""
        return 2 * self._cell_px, None

    def latent_shape(self, height_px: int, width_px: int, frames: int = 1) -> tuple[int, ...]:
        """(C, H, W); sides are multiples of two cells."""
        check_still(frames)
        check_size(height_px, width_px, *self.sides_px)
        return (self._channels, height_px // self._cell_px, width_px // self._cell_px)

    def _predict(self, x: Tensor, sigma_B: Tensor, condition: Condition) -> Tensor:
        _, _, height, width = x.shape
        tokens = condition.tokens_BLE
        v_BND: Tensor = self.transformer(
            hidden_states=pack(x),
            timestep=sigma_B,
            guidance=None if self._guidance_input is None else torch.full_like(sigma_B, self._guidance_input),
            pooled_projections=condition.pooled_BP,
            encoder_hidden_states=tokens,
            txt_ids=torch.zeros(tokens.shape[1], 3, device=x.device, dtype=x.dtype),
            img_ids=_places(height // 2, width // 2, x),
            return_dict=False,
        )[0]
        return unpack(v_BND, height, width)

    def decode(self, x: Tensor) -> Tensor:
        """Latents -> images_BCHW in [0, 1]."""
        return scaled_decode(self.vae, x)

    def _num_tokens(self, shape: Sequence[int]) -> int:
        return (shape[-2] // 2) * (shape[-1] // 2)


def _places(rows: int, columns: int, like: Tensor) -> Tensor:
    """The position of each token, (N, 3), as in FluxPipeline._prepare_latent_image_ids."""
    places = torch.zeros(rows, columns, 3, device=like.device, dtype=like.dtype)
    places[..., 1] += torch.arange(rows, device=like.device)[:, None]
    places[..., 2] += torch.arange(columns, device=like.device)[None, :]
    return places.reshape(rows * columns, 3)

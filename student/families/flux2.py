"""FLUX.2 klein (distilled and base).

Legend: B images, C latent channels (a 2x2 patch of the autoencoder's), H x W patches, N = H W, L text tokens.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu
from torch import Tensor

from student.families.family import Condition, Family, chat_ids, check_chat, check_size, check_still

MAX_TOKENS = 512  # Flux2KleinPipeline's default
LAYERS = (9, 18, 27)  # of the language model; their states, concatenated, are a token's features


class Flux2(Family):
    """A Flux2KleinPipeline; its transformer reads the padding of a prompt like the rest."""

    name = "flux2"
    encoders = ("text_encoder",)
    text_encoder: Any

    def __init__(self, pipe: Any, max_tokens: int | None = None) -> None:
        super().__init__(pipe, max_tokens or MAX_TOKENS)
        self.tokenizer = pipe.tokenizer
        self.is_distilled = bool(pipe.config.is_distilled)
        check_chat(self.name, pipe.tokenizer, enable_thinking=False)
        self._channels = pipe.transformer.config.in_channels
        self._patch_px = 2 * pipe.vae_scale_factor

    def tokenise(self, prompts: Sequence[str]) -> tuple[Tensor, ...]:
        """Ids and mask (1: a token, 0: padding) of each prompt in the chat template."""
        return chat_ids(self.name, self.tokenizer, prompts, self.max_tokens)

    def encode_ids(self, *ids_BL: Tensor) -> Condition:
        """Ids and mask -> the states of three layers, concatenated."""
        ids, mask = ids_BL
        model = self.text_encoder.model
        states = model(input_ids=ids, attention_mask=mask, output_hidden_states=True, use_cache=False).hidden_states
        return Condition(torch.cat([states[layer] for layer in LAYERS], dim=-1))

    @property
    def sides_px(self) -> tuple[int, int | None]:
        """Multiples of a patch, of any length."""
        return self._patch_px, None

    def latent_shape(self, height_px: int, width_px: int, frames: int = 1) -> tuple[int, ...]:
        """(C, H, W) in patches; sides are multiples of a patch."""
        check_still(frames)
        check_size(height_px, width_px, *self.sides_px)
        return (self._channels, height_px // self._patch_px, width_px // self._patch_px)

    def _predict(self, x: Tensor, sigma_B: Tensor, condition: Condition) -> Tensor:
        _, _, height, width = x.shape
        v_BNC: Tensor = self.transformer(
            hidden_states=x.flatten(2).transpose(1, 2),
            timestep=sigma_B,
            guidance=None,
            encoder_hidden_states=condition.tokens_BLE,
            txt_ids=_places(1, 1, condition.tokens_BLE.shape[1], x),
            img_ids=_places(height, width, 1, x),
            return_dict=False,
        )[0]
        return v_BNC.transpose(1, 2).reshape(x.shape)

    def decode(self, x: Tensor) -> Tensor:
        """Latents -> images_BCHW in [0, 1]: the autoencoder's batch norm undone, unpatched, decoded."""
        norm, dtype = self.vae.bn, self.vae.dtype
        std = torch.sqrt(norm.running_var + self.vae.config.batch_norm_eps)
        x = x * std.to(x.dtype).view(1, -1, 1, 1) + norm.running_mean.to(x.dtype).view(1, -1, 1, 1)
        images_BCHW: Tensor = self.vae.decode(torch.pixel_shuffle(x, 2).to(dtype), return_dict=False)[0].float()
        return (images_BCHW * 0.5 + 0.5).clamp(0, 1)

    def _num_tokens(self, shape: Sequence[int]) -> int:
        return math.prod(shape[-2:])

    def _dynamic_mu(self, config: Mapping[str, Any], tokens: int, nfe: int) -> float:
        return float(compute_empirical_mu(tokens, nfe))


def _places(rows: int, columns: int, words: int, like: Tensor) -> Tensor:
    """The position of each token (time, row, column, word), as in Flux2KleinPipeline."""
    axes = [torch.arange(size, device=like.device) for size in (1, rows, columns, words)]
    return torch.cartesian_prod(*axes)

"""Wan 2.1 and 2.2, text to video; one frame is a picture.

Legend: B videos, C latent channels, F frames (latent or decoded), H x W latent cells or pixels, L tokens, E features.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any

import torch
from diffusers.pipelines.wan.pipeline_wan import prompt_clean
from torch import Tensor

from student.bundle import BundleError
from student.families.family import Condition, Family, SizeError, by_channel, check_size
from student.families.two_experts import TIMESTEPS, by_time, called

MAX_TOKENS = 512  # WanPipeline's default
FPS, FPS_5B = 16, 24
# Feature maps of a frame, as wide as the decoder's last layers, that it holds at once: counted at full size on a
# make-believe device (51 and 85; tests/student/families/test_video_memory.py), and a little more.
MAPS, RESIDUAL_MAPS = 54, 90
FRAME_COPIES = 8  # of the drawn frames in float32: joined, scaled, clamped, moved, scored and encoded
SIDE_MULTIPLE_PX = 16  # WanPipeline refuses other sides, whatever its autoencoder and patches are


class Wan(Family):
    """A WanPipeline. Euler steps for teacher and student, whatever scheduler was published.

    Wan 2.2 5B is called with a time for each token, which for text to video is the same for all. Wan 2.2 14B has a
    second transformer for sigmas below ``boundary``; training joins the two (``student.families.two_experts``).

    Raises:
        BundleError: the transformer for high noise is missing.
    """

    name = "wan"
    encoders = ("text_encoder",)
    in_float32 = ("vae",)
    decoder_bytes_px = 24_000
    text_encoder: Any

    def __init__(self, pipe: Any, max_tokens: int | None = None) -> None:
        if pipe.transformer is None or (pipe.transformer_2 is None and pipe.config.boundary_ratio is not None):
            missing = "transformer" if pipe.transformer is None else "transformer_2"
            raise BundleError(f"this Wan pipeline has no {missing}: accepted are Wan 2.1, and 2.2 with both experts")
        super().__init__(pipe, max_tokens or MAX_TOKENS)
        self.boundary = pipe.config.boundary_ratio
        self.fps = FPS_5B if pipe.config.expand_timesteps else FPS
        self.transformer_2 = None if self.boundary is None else pipe.transformer_2
        self.tokenizer = pipe.tokenizer
        self._channels = pipe.transformer.config.in_channels
        self._cell_px, self._cell_frames = pipe.vae_scale_factor_spatial, pipe.vae_scale_factor_temporal
        self._patch = tuple(pipe.transformer.config.patch_size)

    def tokenise(self, prompts: Sequence[str]) -> tuple[Tensor, ...]:
        """Ids and mask (1: a token, 0: padding) for UMT5; entities and white space are cleaned as WanPipeline does."""
        batch = self.tokenizer(
            [prompt_clean(prompt) for prompt in prompts],  # type: ignore[no-untyped-call]
            padding="max_length",
            max_length=self.max_tokens,
            truncation=True,
            return_attention_mask=True,
            return_tensors="pt",
        )
        return batch.input_ids, batch.attention_mask

    def encode_ids(self, *ids_BL: Tensor) -> Condition:
        """Ids and mask -> tokens; what follows a prompt's end is zero."""
        ids, mask_BL = ids_BL
        tokens_BLE = self.text_encoder(ids, mask_BL).last_hidden_state
        after_BL = torch.arange(ids.shape[1], device=ids.device) >= mask_BL.sum(dim=1, keepdim=True)
        return Condition(tokens_BLE.masked_fill(after_BL[..., None], 0))

    @property
    def sides_px(self) -> tuple[int, int | None]:
        """Multiples of a patch and of what WanPipeline requires, of any length."""
        return math.lcm(SIDE_MULTIPLE_PX, *(self._cell_px * side for side in self._patch[1:])), None

    def latent_shape(self, height_px: int, width_px: int, frames: int = 1) -> tuple[int, ...]:
        """(C, F, H, W); the first frame has its own latent frame, each later latent frame holds several."""
        check_size(height_px, width_px, *self.sides_px)
        if frames < 1 or (frames - 1) % self._cell_frames:
            raise SizeError(f"frames is {frames}: accepted is 1 plus a multiple of {self._cell_frames}")
        latent_frames = (frames - 1) // self._cell_frames + 1
        return (self._channels, latent_frames, height_px // self._cell_px, width_px // self._cell_px)

    def video_memory(self, height_px: int, width_px: int) -> tuple[int, int, int]:
        """See ``Family.video_memory``. The decoder goes latent frame by latent frame, and keeps two of each layer."""
        pixels, config = height_px * width_px, self.transformer.config
        width = config.num_attention_heads * config.attention_head_dim
        token_bytes = self.transformer.dtype.itemsize * (8 * width + 2 * config.ffn_dim) + 8 * width
        frame_tokens = pixels / (self._cell_px**2 * math.prod(self._patch) * self._cell_frames)
        vae = self.vae.config
        cells, channels = pixels // (vae.patch_size or 1) ** 2, vae.decoder_base_dim or vae.base_dim
        fixed_bytes = 4 * cells * channels * (RESIDUAL_MAPS if vae.is_residual else MAPS)
        return self._cell_frames, fixed_bytes, int(frame_tokens * token_bytes) + pixels * 3 * 4 * FRAME_COPIES

    def _predict(self, x: Tensor, sigma_B: Tensor, condition: Condition) -> Tensor:
        if self.boundary is None:
            return called(self.transformer, x, sigma_B * TIMESTEPS, condition.tokens_BLE)
        experts = (self.transformer, self.transformer_2)
        return by_time(experts, self.boundary, x, sigma_B * TIMESTEPS, condition.tokens_BLE)

    def experts(self) -> tuple[Family, ...]:
        """See ``Family.experts``."""
        if self.transformer_2 is None:
            return (self,)
        return self._alone(self.transformer), self._alone(self.transformer_2)

    def _alone(self, transformer: Any) -> Wan:
        found = copy.copy(self)
        found._modules = {**self._modules, "transformer": transformer, "transformer_2": None}
        found.boundary = None
        return found

    def decode(self, x: Tensor) -> Tensor:
        """Latents -> videos (B, F, C, H, W) in [0, 1], in the autoencoder's own type whatever that of the rest."""
        config, x = self.vae.config, x.to(self.vae.dtype)
        mean, std = by_channel(config.latents_mean, x), by_channel(config.latents_std, x)
        with torch.autocast(x.device.type, enabled=False):
            video_BCFHW: Tensor = self.vae.decode(x * std + mean, return_dict=False)[0].float()
        return (video_BCFHW * 0.5 + 0.5).clamp(0, 1).transpose(1, 2)

    def _num_tokens(self, shape: Sequence[int]) -> int:
        return math.prod(size // patch for size, patch in zip(shape[-3:], self._patch, strict=True))

"""Stable Diffusion 3 and 3.5.

Legend: B images, C latent channels, H x W latent cells, L tokens, E token features, P pooled features.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from student.families.family import Condition, Family, check_size, check_still, scaled_decode, token_ids

MAX_TOKENS = 256  # StableDiffusion3Pipeline's default


class SD3(Family):
    """A StableDiffusion3Pipeline: two CLIP encoders and, unless the pipeline has None in its place, T5.

    The transformer takes no guidance; classifier-free guidance is left to the caller, on two velocities.
    """

    name = "sd3"
    encoders = ("text_encoder", "text_encoder_2", "text_encoder_3")
    text_encoder: Any
    text_encoder_2: Any
    text_encoder_3: Any

    def __init__(self, pipe: Any, max_tokens: int | None = None) -> None:
        super().__init__(pipe, max_tokens or MAX_TOKENS)
        self.tokenizer, self.tokenizer_2, self.tokenizer_3 = pipe.tokenizer, pipe.tokenizer_2, pipe.tokenizer_3
        self.clip_tokens: int = pipe.tokenizer.model_max_length
        self.longest = "max_tokens" if pipe.text_encoder_3 is not None else "clip_tokens"
        config = pipe.transformer.config
        self._channels, self._width = config.in_channels, config.joint_attention_dim
        self._cell_px: int = pipe.vae_scale_factor
        self._patch: int = config.patch_size
        self._most_patches: int = config.pos_embed_max_size

    def tokenise(self, prompts: Sequence[str]) -> tuple[Tensor, ...]:
        """Ids for the two CLIPs, both of the first one's length, and for T5 where there is one."""
        ids = [token_ids(tokenizer, prompts, self.clip_tokens) for tokenizer in (self.tokenizer, self.tokenizer_2)]
        if self.text_encoder_3 is not None:
            ids.append(token_ids(self.tokenizer_3, prompts, self.max_tokens))
        return tuple(ids)

    def encode_ids(self, *ids_BL: Tensor) -> Condition:
        """CLIP's tokens (second-to-last layers, concatenated, padded with zeros) and T5's; CLIP's pooled vectors."""
        answers = [
            encoder(ids, output_hidden_states=True)
            for encoder, ids in zip((self.text_encoder, self.text_encoder_2), ids_BL[:2], strict=True)
        ]
        clip_BLE = torch.cat([answer.hidden_states[-2] for answer in answers], dim=-1)
        t5_BLE = self._t5(ids_BL[2:], clip_BLE)
        clip_BLE = pad(clip_BLE, (0, t5_BLE.shape[-1] - clip_BLE.shape[-1]))
        pooled_BP = torch.cat([answer.text_embeds for answer in answers], dim=-1)
        return Condition(torch.cat([clip_BLE, t5_BLE], dim=1), pooled_BP)

    def _t5(self, ids: tuple[Tensor, ...], like: Tensor) -> Tensor:
        if not ids:
            return like.new_zeros(like.shape[0], self.max_tokens, self._width)
        tokens_BLE: Tensor = self.text_encoder_3(ids[0])[0]
        return tokens_BLE

    @property
    def sides_px(self) -> tuple[int, int | None]:
        """Multiples of a patch, up to the largest picture whose patches all have their own position."""
        patch_px = self._cell_px * self._patch
        return patch_px, patch_px * self._most_patches

    def latent_shape(self, height_px: int, width_px: int, frames: int = 1) -> tuple[int, ...]:
        """(C, H, W); sides are multiples of a patch, up to the number of positions."""
        check_still(frames)
        check_size(height_px, width_px, *self.sides_px)
        return (self._channels, height_px // self._cell_px, width_px // self._cell_px)

    def _predict(self, x: Tensor, sigma_B: Tensor, condition: Condition) -> Tensor:
        v_BCHW: Tensor = self.transformer(
            hidden_states=x,
            timestep=sigma_B * 1000,
            encoder_hidden_states=condition.tokens_BLE,
            pooled_projections=condition.pooled_BP,
            return_dict=False,
        )[0]
        return v_BCHW

    def decode(self, x: Tensor) -> Tensor:
        """Latents -> images_BCHW in [0, 1]."""
        return scaled_decode(self.vae, x)

    def _num_tokens(self, shape: Sequence[int]) -> int:
        return (shape[-2] // self._patch) * (shape[-1] // self._patch)

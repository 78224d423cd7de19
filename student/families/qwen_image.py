"""Qwen-Image.

Legend: B images, C latent channels, H x W latent cells, N = (H/2)(W/2) packed tokens, D their channels, L text tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from student.families.family import Condition, Family, by_channel, chat_ids, check_size, check_still, sent
from student.families.rotary import Turns
from student.prompts import CHATS
from student.sampler import pack, unpack

MAX_TOKENS = 512  # QwenImagePipeline's default


class QwenImage(Family):
    """A QwenImagePipeline. As in the pipeline, its guidance keeps the norm of each token's velocity."""

    name = "qwen_image"
    encoders = ("text_encoder",)
    packing = 2
    decoder_bytes_px = 3_700
    text_encoder: Any

    def __init__(self, pipe: Any, max_tokens: int | None = None) -> None:
        super().__init__(pipe, max_tokens or MAX_TOKENS)
        self.tokenizer = pipe.tokenizer
        self._channels = pipe.transformer.config.in_channels // 4
        self._cell_px = pipe.vae_scale_factor
        if not isinstance(pipe.transformer.pos_embed, Rope):
            pipe.transformer.pos_embed = Rope(pipe.transformer.pos_embed)

    @property
    def baked(self) -> dict[str, float]:
        """Its classifier-free guidance has another name."""
        return {"true_cfg_scale": 1.0}

    def tokenise(self, prompts: Sequence[str]) -> tuple[Tensor, ...]:
        """Ids and mask (1: a token, 0: padding) of each prompt in the pipeline's template."""
        return chat_ids(self.name, self.tokenizer, prompts, self.max_tokens)

    def encode_ids(self, *ids_BL: Tensor) -> Condition:
        """Ids and mask -> the last states, without the template's beginning; what follows a prompt's end is zero."""
        ids, mask = ids_BL
        model = self.text_encoder.model.language_model
        tokens_BLE = model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
        first = CHATS[self.name].dropped
        return Condition(tokens_BLE[:, first:].masked_fill(mask[:, first:, None] == 0, 0))

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
        v_BND: Tensor = self.transformer(
            hidden_states=pack(x),
            timestep=sigma_B,
            guidance=None,
            encoder_hidden_states=condition.tokens_BLE,
            encoder_hidden_states_mask=condition.mask_BL,
            img_shapes=[[(1, height // 2, width // 2)]],
            return_dict=False,
        )[0]
        return unpack(v_BND, height, width)

    def guided(self, v: Tensor, without: Tensor, guidance: float) -> Tensor:
        """Guidance that keeps the norm of each packed token's velocity."""
        plain, mixed = pack(v), pack(super().guided(v, without, guidance))
        lengths = [torch.norm(part, dim=-1, keepdim=True) for part in (plain, mixed)]
        kept: Tensor = unpack(mixed * (lengths[0] / lengths[1]), *v.shape[-2:])
        return kept

    def decode(self, x: Tensor) -> Tensor:
        """Latents -> images_BCHW in [0, 1]: the first frame of the autoencoder for videos."""
        config, x = self.vae.config, x.to(self.vae.dtype)
        mean, std = by_channel(config.latents_mean, x), by_channel(config.latents_std, x)
        images_BCHW: Tensor = self.vae.decode((x * std + mean)[:, :, None], return_dict=False)[0][:, :, 0].float()
        return (images_BCHW * 0.5 + 0.5).clamp(0, 1)

    def _num_tokens(self, shape: Sequence[int]) -> int:
        return (shape[-2] // 2) * (shape[-1] // 2)


class Rope(nn.Module):
    """QwenEmbedRope for one picture, in real numbers; it has no weights."""

    def __init__(self, rope: Any) -> None:
        super().__init__()
        self.theta, self.axes_dim = rope.theta, list(rope.axes_dim)

    def forward(self, img_shapes: Any, max_txt_seq_len: int, device: torch.device) -> tuple[Turns, Turns]:
        """The rotations of the picture's tokens, whose rows and columns count from its centre, and of the text's."""
        _, rows, columns = img_shapes[0][0]
        axes = [torch.arange(size, device=device) for size in (1, rows, columns)]
        middle = sent(torch.tensor([0, rows - rows // 2, columns - columns // 2]), device)
        text_L = torch.arange(max_txt_seq_len, device=device) + max(rows // 2, columns // 2)
        return self._turns(torch.cartesian_prod(*axes) - middle), self._turns(text_L[:, None].expand(-1, 3))

    def _turns(self, places_S3: Tensor) -> Turns:
        angles = []
        for axis, size in enumerate(self.axes_dim):
            even = torch.arange(0, size, 2, dtype=torch.float32, device=places_S3.device)
            angles.append(places_S3[:, axis, None] * (1.0 / torch.pow(self.theta, even / size)))
        return Turns.by(torch.cat(angles, dim=-1))

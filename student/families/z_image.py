"""Z-Image and Z-Image-Turbo.

Legend: B images, C latent channels, H x W latent cells, N tokens of a picture, L of a prompt, S of both, D features.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import MethodType
from typing import Any

import torch
from diffusers.models.transformers.transformer_z_image import SEQ_MULTI_OF
from torch import Tensor
from torch.nn.functional import pad

from student.families.family import Condition, Family, chat_ids, check_chat, check_size, check_still, scaled_decode
from student.families.rotary import Turns
from student.sampler import pack, unpack

MAX_TOKENS = 512  # ZImagePipeline's default
PATCH = 2


class ZImage(Family):
    """A ZImagePipeline. Its transformer reads lists of sequences, each of its prompt's length; here it also gets a
    forward for a whole batch at one length (``_batched``), which can be compiled.
    """

    name = "z_image"
    encoders = ("text_encoder",)
    text_encoder: Any

    def __init__(self, pipe: Any, max_tokens: int | None = None) -> None:
        super().__init__(pipe, max_tokens or MAX_TOKENS)
        self.tokenizer = pipe.tokenizer
        check_chat(self.name, pipe.tokenizer, enable_thinking=True)
        self._channels = pipe.transformer.in_channels
        self._cell_px = pipe.vae_scale_factor

    @property
    def baked(self) -> dict[str, float]:
        """The pipeline's guidance counts from 0, which is none."""
        return {"guidance_scale": 0.0}

    def tokenise(self, prompts: Sequence[str]) -> tuple[Tensor, ...]:
        """Ids and mask (1: a token, 0: padding) of each prompt in the chat template."""
        return chat_ids(self.name, self.tokenizer, prompts, self.max_tokens)

    def encode_ids(self, *ids_BL: Tensor) -> Condition:
        """Ids and mask -> the second-to-last states; what follows a prompt's end is zero."""
        ids, mask = ids_BL
        answer = self.text_encoder(input_ids=ids, attention_mask=mask, output_hidden_states=True, use_cache=False)
        return Condition(answer.hidden_states[-2].masked_fill(mask[..., None] == 0, 0))

    @property
    def sides_px(self) -> tuple[int, int | None]:
        """Multiples of a patch, up to the largest picture whose patches all have their own position."""
        patch_px = PATCH * self._cell_px
        return patch_px, patch_px * min(self.transformer.axes_lens[1:])

    def latent_shape(self, height_px: int, width_px: int, frames: int = 1) -> tuple[int, ...]:
        """(C, H, W); sides are multiples of two cells, up to the number of positions."""
        check_still(frames)
        check_size(height_px, width_px, *self.sides_px)
        return (self._channels, height_px // self._cell_px, width_px // self._cell_px)

    def _predict(self, x: Tensor, sigma_B: Tensor, condition: Condition) -> Tensor:
        transformer = self.transformer
        if "forward" not in vars(transformer):
            transformer.forward = MethodType(_forward, transformer)
        v_BCHW: Tensor = -transformer(x, 1 - sigma_B, condition)
        return v_BCHW

    def decode(self, x: Tensor) -> Tensor:
        """Latents -> images_BCHW in [0, 1]."""
        return scaled_decode(self.vae, x)

    def _num_tokens(self, shape: Sequence[int]) -> int:
        return (shape[-2] // PATCH) * (shape[-1] // PATCH)


def _forward(self: Any, x: Any, t: Tensor, *rest: Any, **options: Any) -> Any:
    """The transformer's own forward for the pipeline's lists, ``_batched`` for a family's batch."""
    return _batched(self, x, t, *rest) if isinstance(x, Tensor) else type(self).forward(self, x, t, *rest, **options)


def _batched(self: Any, x: Tensor, t_B: Tensor, condition: Condition) -> Tensor:
    """ZImageTransformer2DModel.forward at one length for all prompts: as there, each is padded to a multiple of 32 with
    the learnt token; beyond that it is masked, where the original's shorter sequences end.
    """
    _, _, height, width = x.shape
    kind = f"{PATCH}-1"
    lengths_B = condition.mask_BL.sum(dim=1)
    padded_B = (lengths_B + SEQ_MULTI_OF - 1) // SEQ_MULTI_OF * SEQ_MULTI_OF
    time_BD = self.t_embedder(t_B * self.t_scale).type_as(x)
    patches_BND = _cells_first(pack(x), -1, PATCH * PATCH)
    number = patches_BND.shape[1]
    x_BND = _ended(self.all_x_embedder[kind](patches_BND), self.x_pad_token)
    image_turns = _image_turns(self, height // PATCH, width // PATCH, padded_B, x_BND.shape[1])
    x_BND = _through(self, self.noise_refiner, x_BND, None, image_turns, time_BD)
    words_BLD, read_BL, word_turns = _words(self, condition.tokens_BLE, lengths_B, padded_B)
    words_BLD = _through(self, self.context_refiner, words_BLD, read_BL, word_turns)
    both_BSD = torch.cat([x_BND, words_BLD], dim=1)
    read_BS = torch.cat([torch.ones_like(x_BND[..., 0], dtype=torch.bool), read_BL], dim=1)
    turns = Turns.joined([image_turns, word_turns], dim=1)
    both_BSD = _through(self, self.layers, both_BSD, read_BS, turns, time_BD)
    out_BND = self.all_final_layer[kind](both_BSD[:, :number], c=time_BD)
    return unpack(_cells_first(out_BND, PATCH * PATCH, -1), height, width)


def _cells_first(x_BND: Tensor, outer: int, inner: int) -> Tensor:
    """Reorder a patch's features: this transformer has row, column, channel; ``pack`` has channel, row, column."""
    batch, number, features = x_BND.shape
    return x_BND.reshape(batch, number, outer, inner).transpose(2, 3).reshape(batch, number, features)


def _through(self: Any, blocks: Any, x: Tensor, *rest: Any) -> Tensor:
    for block in blocks:
        if torch.is_grad_enabled() and self.gradient_checkpointing:
            x = self._gradient_checkpointing_func(block, x, *rest)
        else:
            x = block(x, *rest)
    return x


def _ended(x_BND: Tensor, end: Tensor) -> Tensor:
    """The tokens, padded to a multiple of 32 with the learnt token."""
    missing = -x_BND.shape[1] % SEQ_MULTI_OF
    return torch.cat([x_BND, end[None].to(x_BND.dtype).expand(x_BND.shape[0], missing, -1)], dim=1)


def _words(self: Any, tokens_BLE: Tensor, lengths_B: Tensor, padded_B: Tensor) -> tuple[Tensor, Tensor, Turns]:
    """A prompt's embedded tokens, which of them are read, and their rotations, at positions 1, 2, 3, ..."""
    tokens_BLE = pad(tokens_BLE, (0, 0, 0, -tokens_BLE.shape[1] % SEQ_MULTI_OF))
    at_L = torch.arange(tokens_BLE.shape[1], device=tokens_BLE.device)
    own_BL = at_L < lengths_B[:, None]
    words_BLD = torch.where(own_BL[..., None], self.cap_embedder(tokens_BLE), self.cap_pad_token)
    places_L3 = torch.stack([at_L + 1, at_L * 0, at_L * 0], dim=-1)
    return words_BLD, at_L < padded_B[:, None], _turns(self, places_L3[None].expand(*own_BL.shape, 3))


def _image_turns(self: Any, rows: int, columns: int, padded_B: Tensor, number: int) -> Turns:
    """The rotations of a picture's tokens, positioned after the prompt's last; padding is at the origin."""
    axes = [torch.arange(size, device=padded_B.device) for size in (1, rows, columns)]
    places_N3 = torch.cartesian_prod(*axes)
    behind_B13 = torch.stack([padded_B + 1, padded_B * 0, padded_B * 0], dim=-1)[:, None]
    return _turns(self, pad(places_N3 + behind_B13, (0, 0, 0, number - places_N3.shape[0])))


def _turns(self: Any, places_BS3: Tensor) -> Turns:
    """Looked up in tables of every position's angles, as in the original: computed in float64, kept in float32."""
    rope = self.rope_embedder
    angles = []
    for axis, (size, number) in enumerate(zip(rope.axes_dims, rope.axes_lens, strict=True)):
        even = torch.arange(0, size, 2, dtype=torch.float64, device=places_BS3.device)
        places = torch.arange(number, dtype=torch.float64, device=places_BS3.device)
        angles.append(torch.outer(places, 1.0 / rope.theta ** (even / size)).float()[places_BS3[..., axis]])
    return Turns.by(torch.cat(angles, dim=-1))

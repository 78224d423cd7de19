"""The interface to a flow model for training, evaluation, export and runtimes, whichever diffusers pipeline it is from.

Legend: B images, C latent channels, F latent frames, H x W latent cells, L tokens, E token features, P pooled features.
A picture's latents are BCHW, a video's BCFHW; they are packed only inside a family.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from student import schedule
from student.bundle import BundleError, Latents
from student.prompts import CHATS


def sent(value: Tensor, device: torch.device | str | None) -> Tensor:
    """A tensor on a device (None: where it is). From main memory to a GPU it goes through pinned memory, so that the
    host does not wait until the GPU has done all that it was given before.
    """
    if device is None or value.device == torch.device(device):
        return value
    from_here = value.device.type == "cpu"  # the other way the host would read what is not there yet
    if from_here and torch.device(device).type == "cuda":
        value = value.pin_memory()
    return value.to(device, non_blocking=from_here)


class SizeError(ValueError):
    """A size that a family cannot generate; the message is one sentence."""


@dataclass(frozen=True, eq=False)
class Condition:
    """The text encoders' output for B prompts: all tokens, and one pooled vector where the family has one.

    Where the transformer must not read beyond a prompt's end (Qwen-Image, Z-Image, Wan), the rest is zero.
    """

    tokens_BLE: Tensor
    pooled_BP: Tensor | None = None

    @property
    def mask_BL(self) -> Tensor:
        """True where a prompt has a token, in families that put zeros after its end."""
        return self.tokens_BLE.ne(0).any(dim=-1)

    def __len__(self) -> int:
        return self.tokens_BLE.shape[0]

    def take(self, index: int | slice | Sequence[int]) -> Condition:
        """The rows of some prompts; a single index keeps the batch axis."""
        if isinstance(index, int):
            index = [index]
        return Condition(self.tokens_BLE[index], None if self.pooled_BP is None else self.pooled_BP[index])

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Condition:
        """The same numbers on another device or in another type."""
        pooled_BP = None if self.pooled_BP is None else sent(self.pooled_BP, device).to(dtype=dtype)
        return Condition(sent(self.tokens_BLE, device).to(dtype=dtype), pooled_BP)

    @staticmethod
    def stack(conditions: Sequence[Condition]) -> Condition:
        """One batch of several conditions of one family, in their order."""
        pooled = [condition.pooled_BP for condition in conditions if condition.pooled_BP is not None]
        tokens_BLE = torch.cat([condition.tokens_BLE for condition in conditions])
        return Condition(tokens_BLE, torch.cat(pooled) if pooled else None)


class Family(nn.Module, ABC):
    """Encoders, transformer and decoder of one pipeline; packing, timestep scale and guidance embedding are hidden.

    ``transformer`` is the part that is trained. The pipeline itself is not kept, so that ``drop_encoders`` frees the
    encoders' memory once the caller drops the pipeline too; ``max_tokens`` is the length to which T5's tokens are
    padded.
    """

    name: ClassVar[str]
    encoders: ClassVar[tuple[str, ...]]
    packing: ClassVar[int] = 1  # side of the patch of cells that the pipeline's own latents hold as one token
    decoder_bytes_px: ClassVar[int] = 1700  # that decoding takes beside weights for a pixel (of one frame), as measured
    in_float32: ClassVar[tuple[str, ...]] = ()  # parts that the published pipeline is never run narrower with
    fps: int | None = None  # of videos, the frames a second that the published model was trained at
    boundary: float | None = None  # sigmas below it are those of a second transformer
    is_distilled: bool = False  # guidance is part of the weights: the model's pipeline applies no other
    longest: str = "max_tokens"  # the attribute with the length that the encoder reads which reads most of a prompt
    transformer: Any
    vae: Any

    def __init__(self, pipe: Any, max_tokens: int) -> None:
        super().__init__()
        for name in (*self.encoders, "transformer", "vae"):
            setattr(self, name, getattr(pipe, name))
        self.max_tokens = max_tokens
        self._remembered: Mapping[str, Condition] = {}
        self.scheduler_config = dict(pipe.scheduler.config)
        schedule.check(self.scheduler_config)  # a schedule that cannot be followed is refused at once

    @property
    def device(self) -> torch.device:
        """The transformer's device."""
        found: torch.device = next(self.transformer.parameters()).device
        return found

    @abstractmethod
    def tokenise(self, prompts: Sequence[str]) -> tuple[Tensor, ...]:
        """The inputs of ``encode_ids``, int64 (B, L) each, made from the prompts as the diffusers pipeline does."""

    @property
    def most_tokens(self) -> int:
        """How many tokens of a prompt are read, by the encoder that reads most of them."""
        return int(getattr(self, self.longest))

    def cuts(self, prompts: Sequence[str]) -> list[bool]:
        """Which prompts (in a chat template: with the template) are longer than ``most_tokens``.

        If one more token is allowed, those change before it too, since their last one was replaced by the end token; in
        a chat template, which is cut off without one, they have one more.
        """
        longer = copy.copy(self)
        setattr(longer, self.longest, self.most_tokens + 1)
        pairs = list(zip(self.tokenise(prompts), longer.tokenise(prompts), strict=True))
        if self.name in CHATS:
            mask_BL, more_BL = pairs[-1]
            cut_B = more_BL.sum(1) > mask_BL.sum(1)
        else:
            differs = [(ids_BL != more_BL[:, : ids_BL.shape[1]]).any(1) for ids_BL, more_BL in pairs]
            cut_B = torch.stack(differs).any(0)
        return [bool(cut) for cut in cut_B]

    @abstractmethod
    def encode_ids(self, *ids_BL: Tensor) -> Condition:
        """Token ids -> condition."""

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> Condition:
        """Prompts -> condition, without gradient.

        Raises:
            RuntimeError: the encoders were dropped, and a prompt was not remembered.
        """
        if prompts and all(prompt in self._remembered for prompt in prompts):
            return Condition.stack([self._remembered[prompt] for prompt in prompts]).to(self.device)
        present = [encoder for name in self.encoders if (encoder := getattr(self, name)) is not None]
        if not present:
            raise RuntimeError("the text encoders were dropped: encode all prompts before")
        return self.encode_ids(*(ids_BL.to(present[0].device) for ids_BL in self.tokenise(prompts)))

    def remember(self, conditions: Mapping[str, Condition]) -> None:
        """Take the conditions of prompts from here on from ``conditions``, and let go of the encoders."""
        self._remembered = conditions
        self.drop_encoders()

    def drop_encoders(self) -> None:
        """Drop the text encoders; from here on ``encode`` knows only the prompts that it remembers."""
        for name in self.encoders:
            setattr(self, name, None)

    @abstractmethod
    def latent_shape(self, height_px: int, width_px: int, frames: int = 1) -> tuple[int, ...]:
        """Shape of one image's noise, (C, H, W), or of one video's, (C, F, H, W).

        Raises:
            SizeError: a size that the family cannot generate; the message names the accepted multiple.
        """

    @property
    @abstractmethod
    def sides_px(self) -> tuple[int, int | None]:
        """The number that a picture's sides are multiples of, and their largest length (None: limited by memory)."""

    def geometry(self, height_px: int, width_px: int, frames: int = 1) -> Latents:
        """The manifest's entry for latents of this size; SizeError as for ``latent_shape``."""
        channels, *latent_frames, height, width = self.latent_shape(height_px, width_px, frames)
        config = self.vae.config
        scale, shift = (config.get(name, default) for name, default in (("scaling_factor", 1.0), ("shift_factor", 0.0)))
        return Latents(height, width, channels, self.packing, scale, shift, *latent_frames)

    def velocity(self, x: Tensor, sigma: float | Tensor, condition: Condition) -> Tensor:
        """``noise - data`` as predicted at ``sigma`` (one value for all, or a tensor of B), in the type of ``x``."""
        dtype = self.transformer.dtype
        if not isinstance(sigma, Tensor):
            sigma = torch.full((), sigma, dtype=torch.float32, device=x.device)
        sigma_B = sigma.to(x.device, torch.float32).expand(x.shape[0])
        return self._predict(x.to(dtype), sigma_B, condition.to(dtype=dtype)).to(x.dtype)

    @abstractmethod
    def _predict(self, x: Tensor, sigma_B: Tensor, condition: Condition) -> Tensor:
        """The transformer's answer; ``x`` and ``condition`` in its type, ``sigma_B`` in float32."""

    def guided(self, v: Tensor, without: Tensor, guidance: float) -> Tensor:
        """Classifier-free guidance as the family's pipeline applies it: ``without + w (v - without)``."""
        return without + guidance * (v - without)

    @property
    def baked(self) -> dict[str, float]:
        """What the diffusers pipeline must be called with for one call a step, without classifier-free guidance."""
        return {"guidance_scale": 1.0}

    def video_memory(self, height_px: int, width_px: int) -> tuple[int, int, int]:
        """Frames of a latent frame, and the bytes that drawing takes beside the weights: of any video, of each frame.

        An estimate: what the network's and the decoder's largest layers hold at once, and copies of the frames.
        """
        raise NotImplementedError(f"{self.name} generates images, not videos")

    def experts(self) -> tuple[Family, ...]:
        """The family with each of its transformers alone, at every sigma; of two, that of the higher sigmas first."""
        return (self,)

    @abstractmethod
    def decode(self, x: Tensor) -> Tensor:
        """Latents -> images_BCHW in [0, 1], float32; videos (B, F, C, H, W)."""

    def sigmas(self, nfe: int, shape: Sequence[int], config: Mapping[str, Any] | None = None) -> tuple[float, ...]:
        """The sigmas of the sampler for this latent shape, from 1 downwards, without the final 0.

        They are shifted once, as ``config`` says (by default the pipeline's scheduler's), and are the ones actually
        used: to reproduce a picture with diffusers, pass them to a scheduler that does not shift again
        (``student.pipeline.shift_no_more``).
        """
        config = self.scheduler_config if config is None else config
        return schedule.scheduled(config, nfe, self._dynamic_mu(config, self._num_tokens(shape), nfe))

    def _dynamic_mu(self, config: Mapping[str, Any], tokens: int, nfe: int) -> float:
        """The mu that the pipeline passes to a scheduler whose shift depends on the picture's size."""
        return schedule.linear_mu(config, tokens)

    @abstractmethod
    def _num_tokens(self, shape: Sequence[int]) -> int:
        """The number of tokens that the transformer sees for latents of this shape."""


def token_ids(tokenizer: Any, prompts: Sequence[str], length: int) -> Tensor:
    """Ids padded or cut to ``length``, int64 (B, L)."""
    batch = tokenizer(list(prompts), padding="max_length", max_length=length, truncation=True, return_tensors="pt")
    ids_BL: Tensor = batch.input_ids
    return ids_BL


def chat_ids(family: str, tokenizer: Any, prompts: Sequence[str], length: int) -> tuple[Tensor, Tensor]:
    """Ids and mask of the prompts in the family's chat template, padded or cut to the template plus ``length``."""
    chat = CHATS[family]
    batch = tokenizer(
        [chat.of(prompt) for prompt in prompts],
        padding="max_length",
        max_length=length + chat.dropped,
        truncation=True,
        return_tensors="pt",
        **({"padding_side": "right"} if chat.ends_are_cut else {}),
    )
    return batch.input_ids, batch.attention_mask


def check_chat(family: str, tokenizer: Any, **options: bool) -> None:
    """Raises BundleError for a tokenizer whose chat template is not the family's published one.

    Serving fills in the template without transformers, from a copy of it (``student.prompts.CHATS``).
    """
    asked = [{"role": "user", "content": "PROMPT"}]
    said = tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True, **options)
    if said != CHATS[family].of("PROMPT"):
        raise BundleError(f"the tokenizer's chat template gives {said!r}: accepted is {CHATS[family].of('PROMPT')!r}")


def by_channel(values: Sequence[float], like: Tensor) -> Tensor:
    """One number for each channel, shaped to be broadcast over (B, C, ...)."""
    return sent(torch.tensor(values, dtype=like.dtype), like.device).view(1, -1, *[1] * (like.ndim - 2))


def check_size(height_px: int, width_px: int, multiple: int, most: int | None = None) -> None:
    """Raises SizeError for a side that is not a positive multiple, or longer than ``most``."""
    for side, value in (("height", height_px), ("width", width_px)):
        if value < multiple or value % multiple or (most is not None and value > most):
            limit = "" if most is None else f" up to {most}"
            raise SizeError(f"{side} is {value}: accepted are multiples of {multiple}{limit}")


def check_still(frames: int) -> None:
    """Raises SizeError for more than one frame."""
    if frames != 1:
        raise SizeError(f"frames is {frames}: this family generates single images, accepted is 1")


def scaled_decode(vae: Any, x_BCHW: Tensor) -> Tensor:
    """Decode latents of an image autoencoder (one scale, one shift): images_BCHW in [0, 1]."""
    config = vae.config
    raw_BCHW = (x_BCHW / config.scaling_factor + config.shift_factor).to(vae.dtype)
    images_BCHW: Tensor = vae.decode(raw_BCHW, return_dict=False)[0].float()
    return (images_BCHW * 0.5 + 0.5).clamp(0, 1)

"""Rewards that are the cosine of a CLIP model's image and text vectors: CLIP score, and PickScore.

Shape suffixes: B batch, C channels, H/W pixels, L tokens, D feature width.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import CLIPModel, CLIPTokenizer

from rewards.files import Published, locate
from rewards.preprocess import Preprocess, square_side
from rewards.twostage import PromptTokenizer, TwoStage

MODEL = ("config.json", "model.safetensors")
VOCABULARY = ("vocab.json", "merges.txt")
PICKSCORE = Published("yuvalkirstain/PickScore_v1", MODEL)
# PickScore's authors and HPSv2 take their words from the model that both were tuned from.
CLIP_H_VOCABULARY = Published("laion/CLIP-ViT-H-14-laion2B-s32B-b79K", VOCABULARY)
CLIP_L = Published("openai/clip-vit-large-patch14", MODEL)
CLIP_L_VOCABULARY = Published(CLIP_L.repo, VOCABULARY)


class ImageTower(TwoStage):
    """The image half of a CLIP model."""

    def __init__(self, clip: CLIPModel, fit: Literal["crop", "pad"] = "crop") -> None:
        super().__init__()
        self.preprocess = Preprocess(square_side(clip.vision_model.config.image_size), fit)
        self.vision, self.image_projection = clip.vision_model, clip.visual_projection

    def embed_images(self, pixels_BCHW: Tensor) -> Tensor:
        """Preprocessed images -> unit vectors (B, D) in fp32."""
        # The tower and its projection by name: what get_image_features returns differs between releases.
        pooled = self.vision(pixel_values=pixels_BCHW.to(self.dtype)).pooler_output
        return F.normalize(self.image_projection(pooled).float(), dim=-1)


class ClipReward(ImageTower):
    """The cosine of image and prompt; ``scaled`` multiplies it by the model's own temperature, as PickScore does.

    ``fit`` is how images are made square (``Preprocess``). Prompts longer than the model reads are cut.
    """

    def __init__(
        self, clip: CLIPModel, tokenizer: Any, *, fit: Literal["crop", "pad"] = "crop", scaled: bool = False
    ) -> None:
        super().__init__(clip, fit)
        # The model pools at the first end token, and CLIP pads with end tokens: which of several equal ones argmax
        # picks is not defined on every device. Attention is causal, so what the padding is changes nothing else.
        self.words = PromptTokenizer(tokenizer, clip.text_model.config.max_position_embeddings, pad_id=0)
        self.scaled = scaled
        self.text, self.text_projection = clip.text_model, clip.text_projection
        self.logit_scale = clip.logit_scale
        self.freeze()

    def embed_texts(self, ids_BL: Tensor) -> Tensor:
        """Token ids -> unit vectors (B, D) in fp32."""
        return F.normalize(self.text_projection(self.text(ids_BL).pooler_output).float(), dim=-1)

    def judge(self, pixels_BCHW: Tensor, *words_BL: Tensor) -> Tensor:
        """Raw scores (B,)."""
        cosine_B = (self.embed_images(pixels_BCHW) * self.embed_texts(*words_BL)).sum(-1)
        return cosine_B * self.logit_scale.float().exp() if self.scaled else cosine_B


def open_clip_model(folder: Path) -> CLIPModel:
    """A CLIP model in transformers' format, in fp32."""
    model: CLIPModel = CLIPModel.from_pretrained(folder, dtype=torch.float32)
    return model


def pickscore(files: Path) -> ClipReward:
    """PickScore v1 (Kirstain et al. 2023): 100 times the cosine, about 18 to 25; some papers divide by 26."""
    clip = open_clip_model(locate(PICKSCORE, files))
    tokenizer = CLIPTokenizer.from_pretrained(locate(CLIP_H_VOCABULARY, files))
    return ClipReward(clip, tokenizer, scaled=True)


def clip_score(files: Path) -> ClipReward:
    """CLIP score (Hessel et al. 2021) with OpenAI's ViT-L/14: the plain cosine, about 0.1 to 0.35."""
    clip = open_clip_model(locate(CLIP_L, files))
    tokenizer = CLIPTokenizer.from_pretrained(locate(CLIP_L_VOCABULARY, files))
    return ClipReward(clip, tokenizer)

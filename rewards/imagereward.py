"""ImageReward v1.0 (Xu et al. 2023): BLIP's text encoder reads the prompt with cross-attention to the image.

The checkpoint's names (BLIP's own ``vit.py`` and ``med.py``) are mapped onto transformers' BLIP classes, whose
mathematics is the same; no code of the published package is needed.
Shape suffixes: B batch, C channels, H/W pixels, M map positions, L tokens, D feature width.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import BertTokenizer, BlipTextConfig, BlipVisionConfig, BlipVisionModel
from transformers.models.blip.modeling_blip_text import BlipTextModel

from rewards.aesthetic import Head
from rewards.checkpoint import State, fill, tensors
from rewards.files import Published, locate
from rewards.interface import RewardError
from rewards.preprocess import Preprocess, square_side
from rewards.twostage import PromptTokenizer, TwoStage

IMAGEREWARD = Published("zai-org/ImageReward", ("ImageReward.pt",))
VOCABULARY = Published("google-bert/bert-base-uncased", ("vocab.txt",))
MAX_TOKENS = 35
MEAN, STD = 0.16717362830052426, 1.0333394966054072  # ImageReward.py: the package's own standardisation

_TEXT, _VISION, _HEAD = "blip.text_encoder.", "blip.visual_encoder.", "mlp."
_UNUSED = ("blip.text_proj.", "blip.vision_proj.", f"{_TEXT}embeddings.position_ids")
_VISION_NAMES = {
    "cls_token": "embeddings.class_embedding",
    "pos_embed": "embeddings.position_embedding",
    "patch_embed.proj": "embeddings.patch_embedding",
    "norm": "post_layernorm",
    "norm1": "layer_norm1",
    "norm2": "layer_norm2",
    "attn.qkv": "self_attn.qkv",
    "attn.proj": "self_attn.projection",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}


@dataclass(frozen=True)
class Architecture:
    """The two halves of BLIP."""

    text: BlipTextConfig
    vision: BlipVisionConfig


def published() -> Architecture:
    """The package's med_config.json and its ViT-L/16 for images of 224 pixels."""
    text = BlipTextConfig(
        vocab_size=30524, hidden_size=768, encoder_hidden_size=1024, num_hidden_layers=12, num_attention_heads=12
    )
    vision = BlipVisionConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=24,
        num_attention_heads=16,
        image_size=224,
        patch_size=16,
        layer_norm_eps=1e-6,
    )
    return Architecture(text, vision)


class ImageReward(TwoStage):
    """About -2 to 2; 0 is the mean of the package's own reference."""

    def __init__(self, text: BlipTextModel, vision: BlipVisionModel, head: Head, tokenizer: Any) -> None:
        super().__init__()
        self.text, self.vision, self.head = text, vision, head
        self.words = PromptTokenizer(tokenizer, MAX_TOKENS, masked=True, fixed=True)
        self.preprocess = Preprocess(square_side(vision.config.image_size))
        self.freeze()

    def judge(self, pixels_BCHW: Tensor, *words_BL: Tensor) -> Tensor:
        """Raw scores (B,)."""
        seen_BMD = self.vision(pixel_values=pixels_BCHW).last_hidden_state
        read_BLD = self.text(*words_BL, encoder_hidden_states=seen_BMD).last_hidden_state
        score_B: Tensor = self.head(read_BLD[:, 0])
        return (score_B.float() - MEAN) / STD


def split(state: State, source: str) -> tuple[State, State, State]:
    """The checkpoint's weights of text encoder, image encoder and head, under transformers' names.

    Raises:
        RewardError: a name that the published model does not have; ``source`` names the checkpoint.
    """
    text, vision, head = {}, {}, {}
    for name, value in state.items():
        if name.startswith(_UNUSED):
            continue
        if name.startswith(_TEXT):
            text[name.removeprefix(_TEXT)] = value
        elif name.startswith(_VISION):
            vision[_vision_name(name.removeprefix(_VISION), source)] = value
        elif name.startswith(_HEAD):
            head[name.removeprefix(_HEAD)] = value
        else:
            raise RewardError(f"{source}: {name} is unknown")
    return text, vision, head


def _vision_name(name: str, source: str) -> str:
    prefix, part, kind = "", name, ""
    if name.startswith("blocks."):
        _, layer, part = name.split(".", 2)
        prefix = f"encoder.layers.{layer}."
    if part.endswith((".weight", ".bias")):
        part, _, kind = part.rpartition(".")
    if part not in _VISION_NAMES:
        raise RewardError(f"{source}: {_VISION}{name} is unknown")
    return prefix + _VISION_NAMES[part] + (f".{kind}" if kind else "")


def imagereward(files: Path, architecture: Architecture | None = None) -> ImageReward:
    """ImageReward v1.0. The package crops odd margins one pixel further right or down (torchvision's crop)."""
    source, arch = IMAGEREWARD.names[0], architecture or published()
    text, vision, head = split(tensors(IMAGEREWARD, files), source)
    return ImageReward(
        fill(BlipTextModel, arch.text, text, source, add_pooling_layer=False),
        fill(BlipVisionModel, arch.vision, vision, source),
        Head.of(arch.text.hidden_size, head, source),
        BertTokenizer.from_pretrained(locate(VOCABULARY, files)),
    )

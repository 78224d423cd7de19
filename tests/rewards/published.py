"""Tiny models in the layout of the published checkpoints, with reference forwards written from the authors' code.

``OpenClip`` follows open_clip's model.py and transformer.py, ``Blip`` follows BLIP's vit.py and med.py: their
``state_dict`` has the published names by construction. They share no code with ``rewards``.
"""

from __future__ import annotations

import json
import math
import re
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

SIDE = 28
LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789,.'"
MERGES = [("r", "e"), ("re", "d</w>"), ("b", "l"), ("bl", "u"), ("blu", "e</w>"), ("o", "n</w>")]
START, END = "<|startoftext|>", "<|endoftext|>"
PROMPTS = ["a red heart above a blue star", "blue"]


def vocabulary() -> dict[str, int]:
    """CLIP's: letters, letters that end a word, merges, then the two special tokens with the highest ids."""
    tokens = [*LETTERS, *(f"{letter}</w>" for letter in LETTERS), *("".join(pair) for pair in MERGES), START, END]
    return {token: i for i, token in enumerate(tokens)}


def write_vocabulary(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps(vocabulary()))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *(" ".join(pair) for pair in MERGES)]) + "\n")


def encode(prompt: str) -> list[int]:
    """Byte pair encoding by hand, for words of letters and digits that need no cleaning; digits stand alone."""
    known, ids = vocabulary(), []
    for word in re.findall(r"[a-z]+|[0-9]", prompt):
        parts = [*word[:-1], f"{word[-1]}</w>"]
        for pair in MERGES:
            at = 0
            while at < len(parts) - 1:
                if (parts[at], parts[at + 1]) == pair:
                    parts[at : at + 2] = ["".join(pair)]
                at += 1
        ids += [known[part] for part in parts]
    return [known[START], *ids, known[END]]


def clip_config(act: str = "gelu", eos_token_id: int | None = None) -> CLIPConfig:
    text = {"hidden_size": 32, "intermediate_size": 128, "num_attention_heads": 4, "num_hidden_layers": 2}
    text |= {"vocab_size": len(vocabulary()), "max_position_embeddings": 40, "bos_token_id": vocabulary()[START]}
    text |= {"eos_token_id": vocabulary()[END] if eos_token_id is None else eos_token_id, "pad_token_id": 0}
    vision = {"hidden_size": 48, "intermediate_size": 192, "num_attention_heads": 4, "num_hidden_layers": 2}
    vision |= {"image_size": SIDE, "patch_size": 7}
    shared = {"hidden_act": act, "projection_dim": 16}
    return CLIPConfig(text_config={**text, **shared}, vision_config={**vision, **shared}, projection_dim=16)


def pick_score(
    model: CLIPModel, tokenizer: CLIPTokenizer, pictures: Sequence[Image.Image], prompts: Sequence[str]
) -> Tensor:
    """PickScore's README on pictures as they lie in files; transformers 5 wraps the features."""
    processor = CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE})
    pixels = processor(images=list(pictures), return_tensors="pt").pixel_values
    text = tokenizer(list(prompts), padding=True, truncation=True, max_length=40, return_tensors="pt")
    with torch.no_grad():
        image_embs = model.get_image_features(pixel_values=pixels).pooler_output
        text_embs = model.get_text_features(**text).pooler_output
        image_embs = image_embs / torch.norm(image_embs, dim=-1, keepdim=True)
        text_embs = text_embs / torch.norm(text_embs, dim=-1, keepdim=True)
        return model.logit_scale.exp() * torch.diagonal(text_embs @ image_embs.T)


def hps_pixels(picture: Image.Image) -> Tensor:
    """HPSv2's transform: floats, the longer side to SIDE by PIL's bicubic, black around it, CLIP's scale."""
    pixels_HWC = np.asarray(picture.convert("RGB"), np.float32) / 255
    scale = SIDE / max(picture.size)
    width, height = (round(side * scale) for side in picture.size)
    planes = [Image.fromarray(pixels_HWC[..., c]).resize((width, height), Image.Resampling.BICUBIC) for c in range(3)]
    padded = torch.zeros(3, SIDE, SIDE)
    top, left = (SIDE - height) // 2, (SIDE - width) // 2
    padded[:, top : top + height, left : left + width] = torch.from_numpy(np.stack([np.array(one) for one in planes]))
    mean, std = torch.tensor([0.48145466, 0.4578275, 0.40821073]), torch.tensor([0.26862954, 0.26130258, 0.27577711])
    return (padded - mean[:, None, None]) / std[:, None, None]


def randomise(module: nn.Module, seed: int) -> None:
    """Every weight far from its usual start, so that no two can be confused unnoticed."""
    gen = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in module.named_parameters():
            noise = torch.randn(value.shape, generator=gen)
            if value.ndim > 1:
                value.copy_(1.5 * noise / value[0].numel() ** 0.5)
            else:
                value.copy_(noise / 3 + (1 if name.endswith("weight") else 0))


def write_clip(folder: Path, config: CLIPConfig) -> CLIPModel:
    model = CLIPModel(config).eval().requires_grad_(False)
    randomise(model, 3)
    model.save_pretrained(folder)
    return model


class Block(nn.Module):
    """open_clip's ResidualAttentionBlock."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = nn.MultiheadAttention(width, heads, batch_first=True)
        layers = [("c_fc", nn.Linear(width, 4 * width)), ("gelu", nn.GELU()), ("c_proj", nn.Linear(4 * width, width))]
        self.mlp = nn.Sequential(OrderedDict(layers))

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        y = self.ln_1(x)
        x = x + self.attn(y, y, y, need_weights=False, attn_mask=mask)[0]
        return x + self.mlp(self.ln_2(x))


class Transformer(nn.Module):
    def __init__(self, width: int, heads: int, layers: int) -> None:
        super().__init__()
        self.resblocks = nn.ModuleList([Block(width, heads) for _ in range(layers)])

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        for block in self.resblocks:
            x = block(x, mask)
        return x


class Visual(nn.Module):
    def __init__(self, width: int, heads: int, layers: int, patch: int, out: int) -> None:
        super().__init__()
        self.class_embedding = nn.Parameter(torch.zeros(width))
        self.positional_embedding = nn.Parameter(torch.zeros((SIDE // patch) ** 2 + 1, width))
        self.proj = nn.Parameter(torch.zeros(width, out))
        self.conv1 = nn.Conv2d(3, width, patch, patch, bias=False)
        self.ln_pre, self.ln_post = nn.LayerNorm(width), nn.LayerNorm(width)
        self.transformer = Transformer(width, heads, layers)

    def forward(self, pixels: Tensor) -> Tensor:
        x = self.conv1(pixels).flatten(2).transpose(1, 2)
        x = torch.cat([self.class_embedding.expand(len(x), 1, -1), x], 1) + self.positional_embedding
        return self.ln_post(self.transformer(self.ln_pre(x))[:, 0]) @ self.proj


class OpenClip(nn.Module):
    def __init__(self, width: int = 32, heads: int = 4, layers: int = 2, length: int = 40, out: int = 16) -> None:
        super().__init__()
        self.positional_embedding = nn.Parameter(torch.zeros(length, width))
        self.text_projection = nn.Parameter(torch.zeros(width, out))
        self.logit_scale = nn.Parameter(torch.tensor(0.0))
        self.visual = Visual(48, 4, layers, 7, out)
        self.transformer = Transformer(width, heads, layers)
        self.token_embedding = nn.Embedding(len(vocabulary()), width)
        self.ln_final = nn.LayerNorm(width)
        randomise(self, 5)

    def score(self, pixels: Tensor, prompts: list[str]) -> Tensor:
        """HPSv2's img_score.py: the diagonal of image_features @ text_features.T."""
        image = F.normalize(self.visual(pixels), dim=-1)
        text = F.normalize(self.encode_text(prompts), dim=-1)
        return torch.diagonal(image @ text.T)

    def encode_text(self, prompts: list[str]) -> Tensor:
        length = len(self.positional_embedding)
        ids = torch.zeros(len(prompts), length, dtype=torch.long)
        for row, prompt in zip(ids, prompts, strict=True):
            tokens = encode(prompt)
            row[: len(tokens)] = torch.tensor(tokens)
        mask = torch.full((length, length), -math.inf).triu(1)
        x = self.ln_final(self.transformer(self.token_embedding(ids) + self.positional_embedding, mask))
        return x[torch.arange(len(ids)), ids.argmax(-1)] @ self.text_projection


class VitAttention(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        batch, num, dim = x.shape
        q, k, v = self.qkv(x).reshape(batch, num, 3, self.heads, dim // self.heads).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, num, dim))


class VitMlp(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class VitBlock(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps=1e-6), nn.LayerNorm(dim, eps=1e-6)
        self.attn, self.mlp = VitAttention(dim, heads), VitMlp(dim)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class PatchEmbed(nn.Module):
    def __init__(self, dim: int, patch: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, dim, patch, patch)


class Vit(nn.Module):
    def __init__(self, dim: int, heads: int, layers: int, patch: int) -> None:
        super().__init__()
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, (SIDE // patch) ** 2 + 1, dim))
        self.patch_embed = PatchEmbed(dim, patch)
        self.blocks = nn.ModuleList([VitBlock(dim, heads) for _ in range(layers)])
        self.norm = nn.LayerNorm(dim, eps=1e-6)

    def forward(self, pixels: Tensor) -> Tensor:
        x = self.patch_embed.proj(pixels).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1) + self.pos_embed
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


class BertSelf(nn.Module):
    def __init__(self, dim: int, seen: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value = nn.Linear(dim, dim), nn.Linear(seen, dim), nn.Linear(seen, dim)

    def forward(self, x: Tensor, seen: Tensor, mask: Tensor | None) -> Tensor:
        q, k, v = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for part in (self.query(x), self.key(seen), self.value(seen))
        )
        weights = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
        weights = weights if mask is None else weights + mask
        return (weights.softmax(-1) @ v).transpose(1, 2).flatten(2)


class BertOutput(nn.Module):
    def __init__(self, inner: int, dim: int) -> None:
        super().__init__()
        self.dense, self.LayerNorm = nn.Linear(inner, dim), nn.LayerNorm(dim, eps=1e-12)

    def forward(self, hidden: Tensor, x: Tensor) -> Tensor:
        return self.LayerNorm(self.dense(hidden) + x)


class BertAttention(nn.Module):
    def __init__(self, dim: int, seen: int, heads: int) -> None:
        super().__init__()
        self.self, self.output = BertSelf(dim, seen, heads), BertOutput(dim, dim)

    def forward(self, x: Tensor, seen: Tensor, mask: Tensor | None) -> Tensor:
        return self.output(self.self(x, seen, mask), x)


class BertDense(nn.Module):
    def __init__(self, dim: int, inner: int) -> None:
        super().__init__()
        self.dense = nn.Linear(dim, inner)


class BertLayer(nn.Module):
    """med.py's BertLayer in its mode 'multimodal': words, then image, then the two-layer MLP."""

    def __init__(self, dim: int, seen: int, heads: int) -> None:
        super().__init__()
        self.attention, self.crossattention = BertAttention(dim, dim, heads), BertAttention(dim, seen, heads)
        self.intermediate, self.output = BertDense(dim, 2 * dim), BertOutput(2 * dim, dim)

    def forward(self, x: Tensor, mask: Tensor, seen: Tensor) -> Tensor:
        x = self.attention(x, x, mask)
        x = self.crossattention(x, seen, None)
        return self.output(F.gelu(self.intermediate.dense(x)), x)


class BertEmbeddings(nn.Module):
    def __init__(self, words: int, positions: int, dim: int) -> None:
        super().__init__()
        self.word_embeddings, self.position_embeddings = nn.Embedding(words, dim), nn.Embedding(positions, dim)
        self.LayerNorm = nn.LayerNorm(dim, eps=1e-12)
        self.register_buffer("position_ids", torch.arange(positions)[None])

    def forward(self, ids: Tensor) -> Tensor:
        return self.LayerNorm(self.word_embeddings(ids) + self.position_embeddings.weight[: ids.shape[1]])


class BertEncoder(nn.Module):
    def __init__(self, dim: int, seen: int, heads: int, layers: int) -> None:
        super().__init__()
        self.layer = nn.ModuleList([BertLayer(dim, seen, heads) for _ in range(layers)])


class Bert(nn.Module):
    def __init__(self, words: int, positions: int, dim: int, seen: int) -> None:
        super().__init__()
        self.embeddings, self.encoder = BertEmbeddings(words, positions, dim), BertEncoder(dim, seen, 4, 2)

    def forward(self, ids: Tensor, attended: Tensor, seen: Tensor) -> Tensor:
        mask = (1.0 - attended[:, None, None, :].float()) * -10000.0
        x = self.embeddings(ids)
        for layer in self.encoder.layer:
            x = layer(x, mask, seen)
        return x


class BlipPretrain(nn.Module):
    def __init__(self, words: int) -> None:
        super().__init__()
        self.visual_encoder = Vit(48, 4, 2, 7)
        self.text_encoder = Bert(words, 64, 32, 48)
        self.vision_proj, self.text_proj = nn.Linear(48, 8), nn.Linear(32, 8)


class Mlp(nn.Module):
    """The head of ImageReward and of the aesthetic predictor, with its dropouts."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(width, 1024),
            nn.Dropout(0.2),
            nn.Linear(1024, 128),
            nn.Dropout(0.2),
            nn.Linear(128, 64),
            nn.Dropout(0.1),
            nn.Linear(64, 16),
            nn.Linear(16, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class Blip(nn.Module):
    """ImageReward.py's model."""

    def __init__(self, words: int) -> None:
        super().__init__()
        self.blip, self.mlp = BlipPretrain(words), Mlp(32)
        randomise(self, 7)

    def score(self, pixels: Tensor, ids: Tensor, attended: Tensor) -> Tensor:
        seen = self.blip.visual_encoder(pixels)
        rewards = self.mlp(self.blip.text_encoder(ids, attended, seen)[:, 0])
        return ((rewards - 0.16717362830052426) / 1.0333394966054072)[:, 0]

"""Learned preference scorers of the starter world: (image, prompt) -> how well they match.

There are three of different make: ``QueryScorer`` is the one that RATS may train on, ``ClipScorer`` the held-out one,
and ``TokenReader`` only reports. All are differentiable down to the pixels and return scores that are not standardised.

Shape suffixes: B batch, P prompts per image, L tokens, V vocabulary, T text width, M map positions, D feature width, Q
queries, C channels, H/W pixels.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel


@dataclass(frozen=True)
class ScorerConfig:
    """``kind`` is "query", "clip" or "reader"; widths of the text tower and of the image tower's map."""

    kind: str
    vocab_size: int
    max_tokens: int
    eos_token_id: int
    pad_token_id: int
    text_width: int = 128
    text_layers: int = 2
    width: int = 128
    bounded: bool = False  # the score is a probability, in (0, 1): that of the picture being right


def text_tower(config: ScorerConfig) -> CLIPTextModel:
    """The CLIP text model whose pooled output encodes the prompt; the teacher's text encoder has the same form."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.text_width,
            intermediate_size=2 * config.text_width,
            num_hidden_layers=config.text_layers,
            num_attention_heads=4,
            max_position_embeddings=config.max_tokens,
            eos_token_id=config.eos_token_id,
            pad_token_id=config.pad_token_id,
            bos_token_id=config.eos_token_id,
            attn_implementation="eager",  # type: ignore[call-arg]
        )
    )


class Probability(nn.Module):
    """The score as a probability for a bounded scorer, otherwise unchanged."""

    def __init__(self, bounded: bool) -> None:
        super().__init__()
        self.offset = nn.Parameter(torch.zeros(())) if bounded else None

    def forward(self, score: Tensor) -> Tensor:
        """The same shape."""
        return score if self.offset is None else torch.sigmoid(score + self.offset)


class Residual(nn.Module):
    """Two 3x3 convolutions with a skip connection."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(8, width)
        self.first = nn.Conv2d(width, width, 3, padding=1)
        self.second = nn.Conv2d(width, width, 3, padding=1)
        self.act = nn.GELU()

    def forward(self, x_BCHW: Tensor) -> Tensor:
        hidden: Tensor = self.second(self.act(self.first(self.act(self.norm(x_BCHW)))))
        return x_BCHW + hidden


class QueryScorer(nn.Module):
    """The prompt attends to an 8x8 feature map with four queries; an MLP reads the results."""

    num_queries = 4

    def __init__(self, config: ScorerConfig) -> None:
        super().__init__()
        self.config = config
        width, text = config.width, config.text_width
        self.text = text_tower(config)
        self.stem = nn.Sequential(
            nn.Conv2d(3, width // 2, 6, 4, 1),
            Residual(width // 2),
            nn.Conv2d(width // 2, width, 2, 2),
            Residual(width),
            Residual(width),
            nn.GroupNorm(8, width),
        )
        self.place = nn.Parameter(0.02 * torch.randn(64, width))
        self.key = nn.Linear(width, width)
        self.value = nn.Linear(width, width)
        self.query = nn.Linear(text, self.num_queries * width)
        self.match = nn.Linear(text, self.num_queries * width)
        hidden = 2 * width
        self.read = nn.Sequential(
            nn.Linear(2 * self.num_queries * width + text, hidden),
            nn.GELU(),
            nn.Linear(hidden, hidden),
            nn.GELU(),
            nn.Linear(hidden, 1),
        )
        self.probability = Probability(config.bounded)

    def encode_text(self, ids_BL: Tensor) -> Tensor:
        """Token ids -> pooled text vector (B, T)."""
        pooled: Tensor = self.text(ids_BL).pooler_output
        return pooled

    def encode_image(self, images_BCHW: Tensor) -> Tensor:
        """Images in [0, 1] -> map (B, M, D)."""
        map_BMD: Tensor = self.stem(images_BCHW * 2 - 1).flatten(2).transpose(1, 2)
        return map_BMD + self.place

    def compare(self, map_BMD: Tensor, text_BPT: Tensor) -> Tensor:
        """Scores (B, P) of P prompts for each image."""
        batch, prompts, _ = text_BPT.shape
        key, value = self.key(map_BMD), self.value(map_BMD)
        query = self.query(text_BPT).reshape(batch, prompts * self.num_queries, -1)
        weights = torch.softmax(query @ key.transpose(1, 2) / query.shape[-1] ** 0.5, -1)
        answer = (weights @ value).reshape(batch, prompts, -1)
        features = torch.cat([answer, answer * self.match(text_BPT), text_BPT], -1)
        score: Tensor = self.read(features)[..., 0]
        return score

    def forward(self, images_BCHW: Tensor, ids_BL: Tensor) -> Tensor:
        """Score of each image for its own prompt: (B, 3, 64, 64) in [0, 1] and (B, L) -> (B,)."""
        text_BPT = self.encode_text(ids_BL)[:, None]
        score: Tensor = self.probability(self.compare(self.encode_image(images_BCHW), text_BPT)[:, 0])
        return score


class Mixer(nn.Module):
    """A ConvNeXt block: depthwise 5x5, then a two-layer MLP on channels."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.spatial = nn.Conv2d(width, width, 5, padding=2, groups=width)
        self.norm = nn.GroupNorm(1, width)
        self.mlp = nn.Sequential(nn.Conv2d(width, 3 * width, 1), nn.GELU(), nn.Conv2d(3 * width, width, 1))

    def forward(self, x_BCHW: Tensor) -> Tensor:
        hidden: Tensor = self.mlp(self.norm(self.spatial(x_BCHW)))
        return x_BCHW + hidden


class ClipScorer(nn.Module):
    """The form of CLIP and PickScore: the scaled inner product of an image vector and a text vector."""

    def __init__(self, config: ScorerConfig) -> None:
        super().__init__()
        self.config = config
        width, text = config.width, config.text_width
        self.text = text_tower(config)
        self.stem = nn.Sequential(
            nn.Conv2d(3, width // 2, 4, 4),
            Mixer(width // 2),
            Mixer(width // 2),
            nn.Conv2d(width // 2, width, 2, 2),
            Mixer(width),
            Mixer(width),
            nn.Conv2d(width, width, 2, 2),
            nn.GELU(),
        )
        self.image_head = nn.Sequential(nn.Linear(16 * width, 2 * width), nn.GELU(), nn.Linear(2 * width, 2 * width))
        self.text_head = nn.Sequential(nn.Linear(text, 4 * width), nn.GELU(), nn.Linear(4 * width, 2 * width))
        self.log_scale = nn.Parameter(torch.tensor(2.0))
        self.probability = Probability(config.bounded)

    def encode_text(self, ids_BL: Tensor) -> Tensor:
        """Token ids -> unit text vector (B, 2D)."""
        return nn.functional.normalize(self.text_head(self.text(ids_BL).pooler_output), dim=-1)

    def encode_image(self, images_BCHW: Tensor) -> Tensor:
        """Images in [0, 1] -> image vector (B, 2D), not normalised: its length can express how clean the image is."""
        hidden = self.stem(images_BCHW * 2 - 1).flatten(1)
        vector: Tensor = self.image_head(hidden)
        return vector

    def compare(self, image_BD: Tensor, text_BPD: Tensor) -> Tensor:
        """Scores (B, P) of P prompts for each image."""
        product = torch.einsum("bd,bpd->bp", image_BD, text_BPD)
        score: Tensor = self.log_scale.exp() * product / image_BD.shape[-1] ** 0.5
        return score

    def forward(self, images_BCHW: Tensor, ids_BL: Tensor) -> Tensor:
        """Score of each image for its own prompt: (B, 3, 64, 64) in [0, 1] and (B, L) -> (B,)."""
        text_BPD = self.encode_text(ids_BL)[:, None]
        score: Tensor = self.probability(self.compare(self.encode_image(images_BCHW), text_BPD)[:, 0])
        return score


class TokenReader(nn.Module):
    """It reads the picture alone: the probability of each word of the vocabulary, and of being well drawn.

    The score is the product of those that a prompt asks for, so it is a probability, and there is no text tower.
    Padding, end and unknown tokens ask for nothing.
    """

    no_words = 3

    def __init__(self, config: ScorerConfig) -> None:
        super().__init__()
        self.config = config
        width = config.width
        self.stem = nn.Sequential(
            nn.Conv2d(3, width // 2, 4, 2, 1),
            Residual(width // 2),
            nn.Conv2d(width // 2, width, 2, 2),
            Residual(width),
            nn.Conv2d(width, width, 2, 2),
            Residual(width),
            nn.GroupNorm(8, width),
            nn.GELU(),
            nn.Conv2d(width, width // 4, 1),
        )
        self.read = nn.Sequential(
            nn.Linear(16 * width, 2 * width), nn.GELU(), nn.Linear(2 * width, config.vocab_size + 1)
        )

    def encode_text(self, ids_BL: Tensor) -> Tensor:
        """Token ids -> which words are asked for, and at the end a 1 for "well drawn": (B, V + 1)."""
        words_V = torch.arange(self.config.vocab_size, device=ids_BL.device)
        asked_BV = (ids_BL[:, :, None] == words_V).any(1) & (words_V >= self.no_words)
        return torch.cat([asked_BV.float(), torch.ones_like(asked_BV[:, :1], dtype=torch.float32)], 1)

    def encode_image(self, images_BCHW: Tensor) -> Tensor:
        """Images in [0, 1] -> logits of the words and of "well drawn": (B, V + 1)."""
        logits_BV: Tensor = self.read(self.stem(images_BCHW * 2 - 1).flatten(1))
        return logits_BV

    def compare(self, logits_BV: Tensor, asked_BPV: Tensor) -> Tensor:
        """The logarithm of the score, (B, P), of P prompts for each image."""
        log_BV = nn.functional.logsigmoid(logits_BV)
        return torch.einsum("bv,bpv->bp", log_BV, asked_BPV.to(log_BV.dtype))

    def forward(self, images_BCHW: Tensor, ids_BL: Tensor) -> Tensor:
        """Score of each image for its own prompt: (B, 3, 64, 64) in [0, 1] and (B, L) -> (B,), in (0, 1)."""
        asked_BPV = self.encode_text(ids_BL)[:, None]
        return self.compare(self.encode_image(images_BCHW), asked_BPV)[:, 0].exp()


Scorer = QueryScorer | ClipScorer | TokenReader


def build(config: ScorerConfig) -> Scorer:
    """A scorer with fresh weights.

    Raises:
        ValueError: ``config.kind`` is unknown.
    """
    kinds: Mapping[str, Callable[[ScorerConfig], Scorer]]
    kinds = {"query": QueryScorer, "clip": ClipScorer, "reader": TokenReader}
    if config.kind not in kinds:
        raise ValueError(f"scorer kind {config.kind!r}: accepted are {', '.join(map(repr, kinds))}")
    return kinds[config.kind](config)


def save(model: Scorer, path: Path) -> None:
    """Write config.json and fp16 model.safetensors; ``load`` restores exactly what is written."""
    path.mkdir(parents=True, exist_ok=True)
    tensors = {name: value.half().contiguous() for name, value in model.state_dict().items()}
    save_file(tensors, path / "model.safetensors")
    (path / "config.json").write_text(json.dumps(asdict(model.config), indent=2) + "\n")


def load(path: Path) -> Scorer:
    """The scorer saved at ``path``, in fp32 and evaluation mode."""
    model = build(ScorerConfig(**json.loads((path / "config.json").read_text())))
    state = load_file(path / "model.safetensors")
    model.load_state_dict(
        {name: value.float() if value.is_floating_point() else value for name, value in state.items()}
    )
    return model.eval()

"""Trains the starter world's preference scorers on pairs that need no labels (Bradley-Terry).

Each step draws N scenes; for each there are the right image, an altered one, a degraded one, and
P captions of which the first is right. Suffixes as in rewards/shapes.py, with N scenes.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from rewards import shapes as rewards
from training.optim import trapezoid
from training.shapes import degrade, pairs, vocabulary, world
from training.shapes.loop import fit


@dataclass(frozen=True)
class ScorerTraining:
    """One scorer's run. ``half`` selects the scenes (by a hash of what they show) that it may see."""

    name: str
    kind: str
    half: int
    seed: int
    width: int = 96
    steps: int = 4_500
    batch: int = 32
    lr: float = 1e-3
    wrong_captions: int = 8
    save_every: int = 250


TRAINED = ScorerTraining(name="trained", kind="query", half=0, seed=211)
HELDOUT = ScorerTraining(name="heldout", kind="clip", half=1, seed=223, steps=3_000)


@dataclass(frozen=True)
class PairBatch:
    """Images in [0, 1] and token ids; ``ids_NPL[:, 0]`` is the right caption."""

    right_NCHW: Tensor
    altered_NCHW: Tensor
    degraded_NCHW: Tensor
    ids_NPL: Tensor
    caption_kind_NP: np.ndarray
    altered_kind_N: np.ndarray
    degraded_kind_N: np.ndarray


def in_half(scenes: world.Scenes, half: int) -> np.ndarray:
    """True where a scene's content hashes into ``half`` (0 or 1)."""
    code = scenes.background_N * 7 + scenes.relation_N
    for column in (scenes.size_NK, scenes.color_NK, scenes.shape_NK):
        code = (code * 31 + column[:, 0]) * 37 + column[:, 1]
    mixed = (code.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)) >> np.uint64(40)
    return (mixed & np.uint64(1)).astype(np.int64) == half


def draw_pairs(
    num: int, wrong_captions: int, half: int | None, tokenizer: PreTrainedTokenizerFast, *key: int
) -> PairBatch:
    """A batch of pairs, a function of ``key`` alone; ``half=None`` samples from the whole world."""
    gen = world.rng(*key, 1)
    if half is None:
        scenes = world.sample(num, *key)
    else:
        scenes = world.chosen(num, 4 * num, lambda drawn: np.flatnonzero(in_half(drawn, half)), *key)
    styles = pairs.sample_styles(num, gen)
    altered, altered_kind = pairs.alter(scenes, styles, gen)
    altered = world.place(altered, gen)
    degraded, degraded_kind = degrade.draw(scenes, int(gen.integers(2**31)))
    texts, kinds = [pairs.captions(scenes, styles)], [np.full(num, -1)]
    for _ in range(wrong_captions):
        other, kind = pairs.alter(scenes, styles, gen)
        texts.append(pairs.captions(other, styles))
        kinds.append(kind)
    flat = vocabulary.encode(tokenizer, [text for column in texts for text in column])
    ids = torch.tensor(flat).reshape(1 + wrong_captions, num, -1).transpose(0, 1)
    gen_photo = torch.Generator().manual_seed(int(gen.integers(2**31)))
    images = torch.cat([world.render_NCHW(scenes), world.render_NCHW(altered), degraded])
    right, wrong, bad = degrade.photograph(images, gen_photo).chunk(3)
    return PairBatch(right, wrong, bad, ids, np.stack(kinds, 1), altered_kind, degraded_kind)


def scores(model: rewards.Scorer, batch: PairBatch, shared: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """Scores (N, P) of each scene's captions on its right, its altered and its degraded image.

    With ``shared`` the right captions of all other scenes follow as N - 1 further columns.
    """
    num, prompts, length = batch.ids_NPL.shape
    text = model.encode_text(batch.ids_NPL.reshape(-1, length)).reshape(num, prompts, -1)
    if shared:
        others = (torch.arange(num)[:, None] + torch.arange(1, num)) % num
        text = torch.cat([text, text[:, 0][others]], 1)
    images = torch.cat([batch.right_NCHW, batch.altered_NCHW, batch.degraded_NCHW])
    encoded = model.encode_image(images.to(memory_format=torch.channels_last))
    right, altered, degraded = (model.compare(part, text).float() for part in encoded.chunk(3))
    return right, altered, degraded


def loss(model: rewards.Scorer, batch: PairBatch) -> Tensor:
    """Bradley-Terry on image pairs, and its many-way form (softmax) on each image's captions.

    A degraded image must still prefer its own caption, so that the scorer can guide a generator whose pictures are not
    clean yet. The captions of other scenes are easy to tell apart: without them the loss had hardly moved after 800
    steps (4.66 to 4.1).
    """
    with torch.autocast("cpu", torch.bfloat16):
        right, altered, degraded = scores(model, batch, shared=True)
    first = torch.zeros(len(right), dtype=torch.long)
    captions = F.cross_entropy(right, first) + 0.5 * F.cross_entropy(degraded, first)
    images = F.softplus(altered[:, 0] - right[:, 0]) + F.softplus(degraded[:, 0] - right[:, 0])
    return captions + images.mean()


def train(config: ScorerTraining, run_dir: Path) -> rewards.Scorer:
    """Train one scorer, or resume; it is written to ``run_dir/scorer-NAME``."""
    done = run_dir / f"scorer-{config.name}"
    if done.exists():
        return rewards.load(done)
    tokenizer = vocabulary.tokenizer()
    torch.manual_seed(config.seed)
    model: Any = rewards.build(
        rewards.ScorerConfig(
            config.kind,
            len(tokenizer),
            vocabulary.MAX_TOKENS,
            int(tokenizer.eos_token_id),
            int(tokenizer.pad_token_id),
            width=config.width,
        )
    )
    model.to(memory_format=torch.channels_last)
    vocabulary.compose(model.text.get_input_embeddings().weight)
    optimizer = torch.optim.AdamW(model.parameters(), config.lr, betas=(0.9, 0.98), weight_decay=0.02)

    def value(step: int) -> Tensor:
        batch = draw_pairs(config.batch, config.wrong_captions, config.half, tokenizer, config.seed, step)
        return loss(model, batch)

    fit(
        f"scorer {config.name}",
        run_dir / f"scorer-{config.name}.pt",
        model,
        optimizer,
        value,
        lambda step: trapezoid(step, config.steps, config.lr, decay=0.3),
        config.steps,
        save_every=config.save_every,
        log_every=25,
    )
    rewards.save(model, done)
    return rewards.load(done)


@torch.no_grad()
def accuracy(model: rewards.Scorer, num: int = 1024, seed: int = 997) -> dict[str, float]:
    """Pairwise accuracy on fresh scenes of the whole world, by kind of pair; ``all`` is over all pairs."""
    tokenizer = vocabulary.tokenizer()
    wins: dict[str, list[np.ndarray]] = {}
    for part in range(num // 64):
        batch = draw_pairs(64, 4, None, tokenizer, seed, part)
        right, altered, degraded = (s.numpy() for s in scores(model, batch))
        for kind, name in enumerate(pairs.KINDS):
            hit = batch.caption_kind_NP[:, 1:] == kind
            wins.setdefault(f"caption:{name}", []).append((right[:, :1] > right[:, 1:])[hit])
            chosen = batch.altered_kind_N == kind
            wins.setdefault(f"image:{name}", []).append((right[:, 0] > altered[:, 0])[chosen])
        for kind, name in enumerate(degrade.KINDS):
            chosen = batch.degraded_kind_N == kind
            wins.setdefault(f"degraded:{name}", []).append((right[:, 0] > degraded[:, 0])[chosen])
    flat = {name: np.concatenate(parts) for name, parts in wins.items()}
    table = {name: float(values.mean()) for name, values in flat.items()}
    return {"all": float(np.concatenate(list(flat.values())).mean()), **table}

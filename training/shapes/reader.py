"""Trains the starter world's third scorer, which only reports: a network that reads which words a picture bears out.

The world knows what is true of a rendered scene, so it needs neither captions nor pairs; whether a picture is well
drawn it learns from degraded scenes and from generators' pictures beside the truth for the same caption. All rendered
pictures pass through the autoencoder. Suffixes: N scenes of the world, M of the generators, V words.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rewards import shapes as rewards
from training.optim import one_cycle
from training.shapes import degrade, pairs, vocabulary, world
from training.shapes.failures import Failures
from training.shapes.loop import fit
from training.shapes.refine import SOFTEST, seen_through


@dataclass(frozen=True)
class ReaderConfig:
    """Defaults: about 12 minutes on one core."""

    name: str = "reported"
    steps: int = 1_500
    scenes: int = 48
    pictures: int = 24
    width: int = 96
    lr: float = 1.5e-3
    seed: int = 239
    save_every: int = 250


def words_of(scenes: world.Scenes, vocab_size: int) -> Tensor:
    """The words that are true of each scene, as 0 and 1: (N, V)."""
    texts = pairs.captions(scenes, pairs.full_styles(len(scenes)))
    ids_NL = torch.tensor(vocabulary.encode(vocabulary.tokenizer(), texts))
    return F.one_hot(ids_NL, vocab_size).amax(1).float()


def loss(
    model: rewards.TokenReader, vae: Any, scenes: world.Scenes, seed: int, failures: tuple[world.Scenes, Tensor, Tensor]
) -> Tensor:
    """Binary cross-entropy of the words and of "well drawn", and Bradley-Terry of the truth against generators.

    ``failures`` are M scenes, a generator's pictures for their captions, and these captions' token ids.
    """
    drawn_from, drawn_MCHW, ids_ML = failures
    num, many = len(scenes), len(drawn_MCHW)
    gen = torch.Generator().manual_seed(seed)
    rendered = [world.render_NCHW(scenes), degrade.draw(scenes, seed)[0], world.render_NCHW(drawn_from)]
    ours = seen_through(vae, degrade.photograph(torch.cat(rendered), gen))
    images = torch.cat([ours, drawn_MCHW])
    images = (images + SOFTEST * torch.randn(images.shape, generator=gen)).clamp(0, 1)
    with torch.autocast("cpu", torch.bfloat16):
        logits = model.encode_image(images.to(memory_format=torch.channels_last))
    right_NV, degraded_NV, truth_MV, drawn_MV = logits.float().split([num, num, many, many])
    good_NV = torch.cat([right_NV, truth_MV])
    no, last = model.no_words, model.config.vocab_size
    true_NV = torch.cat([words_of(part, last) for part in (scenes, drawn_from)])
    words = F.binary_cross_entropy_with_logits(good_NV[:, no:last], true_NV[:, no:], reduction="sum") / len(good_NV)
    drawn_well = F.softplus(-good_NV[:, last]).mean() + F.softplus(degraded_NV[:, last]).mean()
    asked_M1V = model.encode_text(ids_ML)[:, None]
    gap_M1 = model.compare(drawn_MV, asked_M1V) - model.compare(truth_MV, asked_M1V)
    return words + drawn_well + 0.5 * F.softplus(gap_M1).mean()


def train(config: ReaderConfig, vae: Any, failures: Failures, run_dir: Path) -> rewards.Scorer:
    """Train it, or resume; it is written to ``run_dir/scorer-NAME``."""
    done = run_dir / f"scorer-{config.name}"
    if done.exists():
        return rewards.load(done)
    tokenizer = vocabulary.tokenizer()
    torch.manual_seed(config.seed)
    end, pad = int(tokenizer.eos_token_id), int(tokenizer.pad_token_id)
    form = rewards.ScorerConfig("reader", len(tokenizer), vocabulary.MAX_TOKENS, end, pad, width=config.width)
    model = rewards.TokenReader(form)
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    vae = vae.to(memory_format=torch.channels_last)
    ids_FL = torch.tensor(vocabulary.encode(tokenizer, failures.texts))
    optimizer = torch.optim.AdamW(model.parameters(), config.lr, betas=(0.9, 0.98), weight_decay=0.02)

    def value(step: int) -> Tensor:
        gen = world.rng(config.seed, step, 1)
        at = gen.integers(0, len(failures.texts), config.pictures)
        some = (failures.scenes.take(at), failures.images(at), ids_FL[torch.from_numpy(at)])
        return loss(model, vae, world.sample(config.scenes, config.seed, step), int(gen.integers(2**31)), some)

    fit(
        f"scorer {config.name}",
        run_dir / f"scorer-{config.name}.pt",
        model,
        optimizer,
        value,
        lambda step: one_cycle(step, config.steps, config.lr, warmup=0.05),
        config.steps,
        save_every=config.save_every,
        log_every=20,
    )
    rewards.save(model, done)
    return rewards.load(done)

"""A bounded scorer with headroom: the probability that a picture is right, highest for the ground truth itself.

It starts from a scorer that knows captions (training/shapes/scorer.py). All pictures pass through the autoencoder, so
that its traces carry no signal; right ones are rendered truth, wrong ones have a wrong attribute, are badly drawn, have
another caption, or are from generators. Suffixes: N scenes of the world, M of the generators.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rewards import shapes as rewards
from training.optim import one_cycle
from training.shapes import scorer, vocabulary, world
from training.shapes.failures import Failures
from training.shapes.loop import fit

SHRINK, OFFSET = 0.12, -2.5  # Bradley-Terry scores of about 30 as logits that can still move
SOFTEST = 0.01  # grain on all pictures, in [0, 1]


@dataclass(frozen=True)
class RefineConfig:
    """Defaults: about 4 minutes on one core for each scorer.

    ``generated`` is the weight of a generator's pictures, for which nobody says whether they are right: with less, a
    scorer has less headroom above good generators, and agrees more with who knows.
    """

    steps: int = 800
    scenes: int = 16
    pictures: int = 32
    generated: float = 1.0
    lr: float = 6e-4
    seed: int = 5
    save_every: int = 100


def bounded(old: rewards.Scorer) -> rewards.Scorer:
    """The same scorer with its score as a probability, its logits small enough to train; a bounded one as it is."""
    if old.config.bounded:
        return old
    model = rewards.build(replace(old.config, bounded=True))
    state = dict(old.state_dict())
    if old.config.kind == "query":
        for name in ("read.4.weight", "read.4.bias"):
            state[name] = SHRINK * state[name]
    else:
        state["log_scale"] = state["log_scale"] + math.log(SHRINK)
    model.load_state_dict({**state, "probability.offset": torch.tensor(OFFSET)})
    return model


@torch.no_grad()
def seen_through(vae: Any, images_BCHW: Tensor) -> Tensor:
    """Images in [0, 1] as the autoencoder reconstructs them."""
    with torch.autocast("cpu", torch.bfloat16):
        x_BCHW = images_BCHW.mul(2).sub(1).to(memory_format=torch.channels_last)
        y_BCHW = vae.decoder(vae.encoder(x_BCHW)).float()
    return y_BCHW.add(1).div(2).clamp(0, 1)


def logits(model: Any, images_BCHW: Tensor, ids_BL: Tensor, wrong_NPL: Tensor) -> tuple[Tensor, Tensor]:
    """Each picture's logit for its own caption, (B,), and those of the first N for P wrong captions, (N, P)."""
    encoded = model.encode_image(images_BCHW.to(memory_format=torch.channels_last))
    num, wrong, length = wrong_NPL.shape
    text = model.encode_text(torch.cat([ids_BL, wrong_NPL.reshape(-1, length)]))
    own, others = text.split([len(ids_BL), num * wrong])
    value = model.compare(encoded, own[:, None])[:, 0].float()
    other = model.compare(encoded[:num], others.reshape(num, wrong, -1)).float()
    return value + model.probability.offset, other + model.probability.offset


def loss(
    model: rewards.Scorer,
    vae: Any,
    batch: scorer.PairBatch,
    failures: tuple[Tensor, Tensor, Tensor],
    grain: Tensor,
    generated: float = 1.0,
) -> Tensor:
    """Binary cross-entropy, and Bradley-Terry between right and wrong pictures of one caption.

    ``failures`` are the truth for M captions, a generator's pictures for them, and their token ids; ``generated`` is
    the weight of these pictures.
    """
    truth_MCHW, drawn_MCHW, ids_ML = failures
    num, many = len(batch.right_NCHW), len(truth_MCHW)
    ours = seen_through(vae, torch.cat([batch.right_NCHW, batch.altered_NCHW, batch.degraded_NCHW, truth_MCHW]))
    images = (torch.cat([ours, drawn_MCHW]) + SOFTEST * grain).clamp(0, 1)
    first_NL, wrong_NPL = batch.ids_NPL[:, 0], batch.ids_NPL[:, 1:]
    with torch.autocast("cpu", torch.bfloat16):
        own, captions_NP = logits(model, images, torch.cat([first_NL] * 3 + [ids_ML] * 2), wrong_NPL)
    right_N, altered_N, degraded_N, truth_M, drawn_M = own.split([num, num, num, many, many])
    positive = F.softplus(-torch.cat([right_N, truth_M])).mean()
    wrong = sum(F.softplus(part).mean() for part in (altered_N, degraded_N, captions_NP))
    negative = (wrong + generated * F.softplus(drawn_M).mean()) / (3 + generated)
    gaps = (altered_N - right_N, degraded_N - right_N, captions_NP - right_N[:, None])
    above = sum(F.softplus(gap).mean() for gap in gaps) + generated * F.softplus(drawn_M - truth_M).mean()
    return positive + negative + 0.5 * above


def train(
    config: RefineConfig, training: scorer.ScorerTraining, start: Path, vae: Any, failures: Failures, run_dir: Path
) -> rewards.Scorer:
    """Train a bounded scorer from the one at ``start``, or resume; it is written to ``run_dir/bounded-NAME``."""
    done = run_dir / f"bounded-{training.name}"
    if done.exists():
        return rewards.load(done)
    tokenizer = vocabulary.tokenizer()
    model = bounded(rewards.load(start)).train()
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    vae = vae.to(memory_format=torch.channels_last)
    ids_FL = torch.tensor(vocabulary.encode(tokenizer, failures.texts))
    optimizer = torch.optim.AdamW(model.parameters(), config.lr, betas=(0.9, 0.98), weight_decay=0.02)

    def value(step: int) -> Tensor:
        batch = scorer.draw_pairs(config.scenes, 2, training.half, tokenizer, training.seed, step, 7)
        at = world.rng(config.seed, training.seed, step).integers(0, len(failures.texts), config.pictures)
        truth = world.render_NCHW(failures.scenes.take(at))
        grain = torch.randn(
            3 * config.scenes + 2 * config.pictures, 3, 64, 64, generator=torch.Generator().manual_seed(step)
        )
        return loss(
            model, vae, batch, (truth, failures.images(at), ids_FL[torch.from_numpy(at)]), grain, config.generated
        )

    fit(
        f"bounded {training.name}",
        run_dir / f"bounded-{training.name}.pt",
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

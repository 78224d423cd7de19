"""The starter world's own roles, tiny and untrained: made in a second, for the plumbing of a run."""

from __future__ import annotations

from pathlib import Path

import torch

from rewards import shapes as rewards
from training.rats.config import RatsConfig
from training.shapes import autoencoder, pretraining, teacher, vocabulary


def write_models(models: Path) -> None:
    """A teacher and two scorers as ``training.pretrain`` would leave them."""
    torch.manual_seed(3)
    vae = autoencoder.build(autoencoder.AutoencoderConfig(width=8, latent_channels=4))
    parts = teacher.build(teacher.TeacherConfig(width=32, single_blocks=1), 4)
    pretraining.write_teacher(parts, vae, models / "shapes-teacher")
    tokenizer = vocabulary.tokenizer()
    for name, kind in (("trained", "query"), ("heldout", "clip")):
        config = rewards.ScorerConfig(kind, len(tokenizer), vocabulary.MAX_TOKENS, 1, 0, width=32)
        rewards.save(rewards.build(config), models / "shapes-scorers" / name)


def settings(models: Path, **others: object) -> list[str]:
    """``--set`` values of a run on those models that takes seconds; keys without their groups."""
    chosen = {
        "model": models / "shapes-teacher",
        "reward": models / "shapes-scorers" / "trained",
        "heldout": models / "shapes-scorers" / "heldout",
        "batch": 4,
        "teacher_nfe": 6,
        "reference_nfe": 8,
        "steps": 4,
        "validate_every": 2,
        **others,
    }
    return [part for key, value in chosen.items() for part in ("--set", f"{RatsConfig.MOVED.get(key, key)}={value}")]

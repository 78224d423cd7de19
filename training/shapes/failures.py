"""What generators draw for training captions, with the scenes that these are of: the scorers' hardest negatives.

Nothing says which of them are right: a scorer learns that the truth is at least as good (training/shapes/refine.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from student.families.find import open_family
from training import checkpoint
from training.progress import steps
from training.sampler import Sampler
from training.shapes import pairs, prompts, vocabulary, world

BATCH = 64
# Step count and guidance, in turn: a student that starts as an unguided teacher fails in all of these ways.
WAYS = ((8, 2.5), (4, 1.0), (2, 1.0), (1, 1.0), (4, 2.5), (8, 1.0), (8, 2.5), (4, 1.0))


@dataclass(frozen=True)
class FailuresConfig:
    """``pictures`` drawn by ``models`` in turn: folders of FLUX pipelines; guided ways are for those not distilled."""

    pictures: int = 3_072
    models: tuple[str, ...] = ("models/shapes-teacher",)
    singles: float = 0.6
    seed: int = 51


@dataclass(frozen=True)
class Failures:
    """N pictures as bytes, their captions, and scenes that the captions are of."""

    images_NCHW: Tensor
    texts: list[str]
    scenes: world.Scenes

    def images(self, index: np.ndarray) -> Tensor:
        """Some of the pictures, in [0, 1]."""
        return self.images_NCHW[torch.from_numpy(index)].float() / 255


def draw(config: FailuresConfig, path: Path) -> None:
    """Draw what ``path`` does not hold yet; it is written after every batch of 64."""
    saved = checkpoint.load(path)
    state = saved or {"images": torch.empty(0, 3, 64, 64, dtype=torch.uint8), "texts": [], "scenes": {}}
    models = [open_family(name, local_files_only=True, max_tokens=vocabulary.MAX_TOKENS) for name in config.models]
    shape = models[0].latent_shape(world.SIDE_PX, world.SIDE_PX)
    for i in steps("pictures", len(state["texts"]) // BATCH, -(-config.pictures // BATCH)):
        scenes = prompts.training_scenes(BATCH, config.seed, i, singles=config.singles)
        texts = pairs.captions(scenes, prompts.training_styles(scenes, world.rng(config.seed, i, 3)))
        nfe, guidance = WAYS[i // len(models) % len(WAYS)]
        model = models[i % len(models)]
        seeds = world.rng(config.seed, i, 4).integers(2**31, size=BATCH).tolist()
        images = Sampler(model, model.sigmas(nfe, shape), guidance).draw(texts, seeds, shape, BATCH)
        state["images"] = torch.cat([state["images"], (images * 255).round().byte()])
        state["texts"] = [*state["texts"], *texts]
        columns = {name: torch.from_numpy(np.ascontiguousarray(value)) for name, value in vars(scenes).items()}
        known = state["scenes"]
        state["scenes"] = {k: torch.cat([known[k], v]) if k in known else v for k, v in columns.items()}
        checkpoint.save(path, state)


def read(paths: Sequence[Path]) -> Failures:
    """The pictures of one or several files."""
    states = [torch.load(path, map_location="cpu", weights_only=True) for path in paths]
    names = states[0]["scenes"]
    columns = {name: torch.cat([state["scenes"][name] for state in states]).numpy() for name in names}
    texts = [text for state in states for text in state["texts"]]
    return Failures(torch.cat([state["images"] for state in states]), texts, world.Scenes(**columns))

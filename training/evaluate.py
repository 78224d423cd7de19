"""What is measured of a model: scorers, exact judge and diversity, on fixed prompts and seeds.

Nothing here chooses anything: selection uses ``scores`` on validation prompts, evidence is the
``Evaluation`` on test prompts.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from training.drawing import Painter
from training.sharding import whole

FloatArray = NDArray[np.float64]
ScoreFn = Callable[[Tensor, Sequence[str]], Tensor]
JudgeFn = Callable[[Tensor, Sequence[str]], dict[str, list[float]]]
DIVERSITY_SEEDS = 8


@dataclass(frozen=True)
class Evaluation:
    """One painter's figures: per-prompt values, so that differences can be paired.

    ``scores[name][i]`` is prompt i's raw score, ``judge[name][i]`` is 1 where that part holds,
    ``diversity[i]`` the Vendi score of 8 seeds of prompt i.
    """

    label: str
    nfe: int
    guidance: float
    scores: Mapping[str, list[float]]
    judge: Mapping[str, list[float]]
    diversity: list[float]


@dataclass(frozen=True)
class Measure:
    """The instruments: scorers by name, the judge, and what turns images into diversity features."""

    scorers: Mapping[str, ScoreFn]
    judge: JudgeFn | None
    features: Callable[[Tensor], Tensor]

    def evaluate(
        self, label: str, painter: Painter, prompts: Sequence[str], diversity_prompts: int, shape: tuple[int, ...]
    ) -> Evaluation:
        """Draw prompt i with seed i, score and judge it; then 8 seeds each of the first prompts for diversity."""
        images = painter.draw(prompts, list(range(len(prompts))), shape)
        varied = [prompt for prompt in prompts[:diversity_prompts] for _ in range(DIVERSITY_SEEDS)]
        others = painter.draw(varied, [100_000 + i for i in range(len(varied))], shape)
        return Evaluation(
            label,
            len(painter.sigmas),
            painter.guidance,
            {name: score(images, prompts).double().tolist() for name, score in self.scorers.items()},
            self.judge(images, prompts) if self.judge else {},
            self.diversity(others),
        )

    def diversity(self, images_BCHW: Tensor) -> list[float]:
        """The Vendi score of each DIVERSITY_SEEDS images in a row."""
        features_ND = self.features(images_BCHW).flatten(1).double().numpy()
        return [vendi(group) for group in np.split(features_ND, len(features_ND) // DIVERSITY_SEEDS)]


def vendi(features_ND: FloatArray) -> float:
    """Vendi score (Friedman and Dieng 2023): exp of the entropy of the cosine similarity's eigenvalues; 1 to N."""
    unit = features_ND / np.linalg.norm(features_ND, axis=1, keepdims=True)
    values = np.linalg.eigvalsh(unit @ unit.T / len(unit))
    values = values[values > 1e-12]
    return float(np.exp(-(values * np.log(values)).sum()))


def mean_error(values: Sequence[float]) -> tuple[float, float]:
    """Mean and standard error of the mean."""
    array = np.asarray(values, dtype=float)
    return float(array.mean()), float(array.std(ddof=1) / math.sqrt(len(array)))


def paired(a: Sequence[float], b: Sequence[float]) -> tuple[float, float]:
    """Mean and standard error of a - b, prompt by prompt."""
    return mean_error(np.asarray(a, dtype=float) - np.asarray(b, dtype=float))


def fingerprint(painter: Painter, prompts: Sequence[str], measure_key: str) -> str:
    """What an evaluation depends on: weights, sigmas, guidance, prompts and instruments."""
    digest = hashlib.sha256(json.dumps([painter.sigmas, painter.guidance, list(prompts), measure_key]).encode())
    add_weights(digest, painter.model.state_dict())
    return digest.hexdigest()[:24]


def add_weights(digest: hashlib._Hash, weights: Mapping[str, Tensor]) -> None:
    """Take named tensors into a hash, whatever device they lie on or processes they are spread over."""
    for name, value in sorted(weights.items()):
        digest.update(name.encode())
        digest.update(whole(value).detach().contiguous().flatten().view(torch.uint8).cpu().numpy().tobytes())


def cached(folder: Path, key: str, make: Callable[[], Evaluation]) -> Evaluation:
    """The evaluation kept under ``key``, or a new one."""
    path = folder / f"{key}.json"
    if path.exists():
        return Evaluation(**json.loads(path.read_text()))
    result = make()
    folder.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(f".{os.getpid()}.part")  # several processes may write the same figures
    part.write_text(json.dumps(asdict(result)))
    part.replace(path)
    return result

"""Several rewards as one scalar: each is standardised on calibration images, then weighted and added.

Trainer and gate see only this scalar, so that one tau and one margin work for every reward.
Shape suffixes: B batch, F frames, C channels, H/W pixels.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from rewards.interface import Reward, RewardError, check_batch, scored


@dataclass(frozen=True)
class Calibration:
    """Mean and standard deviation of a reward's raw scores on calibration images.

    Raises:
        RewardError: a standard deviation that is not above 0, or a value that is not finite.
    """

    mean: float
    std: float

    def __post_init__(self) -> None:
        if not (math.isfinite(self.mean) and math.isfinite(self.std) and self.std > 0):
            raise RewardError(
                f"calibration is mean {self.mean}, std {self.std}: accepted are finite numbers, with std above 0"
            )

    @classmethod
    def of(cls, name: str, raw: Sequence[float]) -> Calibration:
        """The calibration from raw scores of the reward called ``name``.

        Raises:
            RewardError: fewer than two scores, scores that are not finite, or all the same.
        """
        if len(raw) < 2:
            raise RewardError(f"{len(raw)} calibration prompts for reward {name!r}: accepted are 2 or more")
        if not np.isfinite(raw).all():
            raise RewardError(f"reward {name!r} cannot be standardised: not all scores of {len(raw)} images are finite")
        std = float(np.std(raw, ddof=1))
        if not std > 0:
            raise RewardError(f"reward {name!r} cannot be standardised: it gave all {len(raw)} images the same score")
        return cls(float(np.mean(raw)), std)

    def standardise(self, raw: Sequence[float]) -> list[float]:
        """Raw scores in standard deviations above the mean."""
        return [(score - self.mean) / self.std for score in raw]


@dataclass(frozen=True)
class Term:
    """One reward of a weighted sum.

    ``name`` is its column in tables, ``asked`` the user's name for it (empty: the same), ``source`` identifies what its
    scores depend on; ``weight`` is in units of its own standard deviation.
    """

    name: str
    reward: Reward
    weight: float = 1.0
    calibration: Calibration | None = None
    asked: str = ""
    source: str = ""
    device: str | None = None

    def raw(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Scores (B,) of images (B, C, H, W), or of videos (B, F, C, H, W) as the mean over the frames."""
        if images.ndim == 4:
            return self._scored(images, prompts)
        frames = images.shape[1]
        each = [prompt for prompt in prompts for _ in range(frames)]
        return self._scored(images.flatten(0, 1), each).reshape(-1, frames).mean(1)

    def _scored(self, images_BCHW: Tensor, prompts: Sequence[str]) -> Tensor:
        return scored(self.asked or self.name, self.reward, images_BCHW, prompts, device=self.device)


@dataclass(frozen=True)
class Weighted:
    """A reward: the weighted sum of standardised rewards."""

    terms: tuple[Term, ...]

    def __post_init__(self) -> None:
        if not self.terms:
            raise RewardError("a weighted sum has no rewards: accepted are one or more")
        names = [term.name for term in self.terms]
        if len(set(names)) < len(names):
            raise RewardError(f"a weighted sum has the rewards {', '.join(names)}: accepted is each name once")

    @property
    def differentiable(self) -> bool:
        """Whether every term is."""
        return all(term.reward.differentiable for term in self.terms)

    def calibrated(self, raw: Mapping[str, Sequence[float]]) -> Weighted:
        """The same sum, standardised by the raw scores of calibration images, which are by the terms' names."""
        terms = (
            replace(term, calibration=Calibration.of(term.asked or term.name, raw[term.name])) for term in self.terms
        )
        return Weighted(tuple(terms))

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """The weighted sum (B,) for images or videos, with its gradient."""
        if images.ndim != 5:
            check_batch(images, prompts)
        total = torch.zeros(len(images), device=images.device)
        for term in self.terms:
            assert term.calibration is not None
            above = term.raw(images, prompts).float() - term.calibration.mean
            total = total + term.weight * above / term.calibration.std
        return total

    def of_raw(self, raw: Mapping[str, Sequence[float]]) -> list[float]:
        """The weighted sum for each picture, from stored raw scores by the terms' names."""
        parts = [(term, term.calibration.standardise(raw[term.name])) for term in self.terms if term.calibration]
        weights = [term.weight for term, _ in parts]
        rows = zip(*(values for _, values in parts), strict=True)
        return [sum(w * value for w, value in zip(weights, row, strict=True)) for row in rows]


def require_gradient(name: str, reward: Reward) -> None:
    """Refuse a reward that cannot be trained on.

    Raises:
        RewardError: the reward, or a term of a weighted one, has no gradient.
    """
    blind = [name] if not reward.differentiable else []
    if blind and isinstance(reward, Weighted):
        blind = [term.name for term in reward.terms if not term.reward.differentiable]
    if blind:
        raise RewardError(
            f"reward {', '.join(map(repr, blind))} has no gradient down to the pixels, and a student can only learn "
            "from a reward that has one: use it for evaluation or for the gate, or with --tune and tune.branches"
        )

"""Several rewards as one scalar: each is standardised on calibration images, then weighted and added.

Trainer and gate see this scalar only, so that one tau and one margin serve every reward.
Shape suffixes: B batch, N calibration images, C channels, H/W pixels.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rewards.interface import Reward, RewardError, check_batch, scored


@dataclass(frozen=True)
class Calibration:
    """Mean and deviation of a reward's raw scores on calibration images; standardised is ``(raw - mean) / std``.

    Raises:
        RewardError: a deviation that is not above 0, or a value that is not finite.
    """

    mean: float
    std: float

    def __post_init__(self) -> None:
        if not (math.isfinite(self.mean) and math.isfinite(self.std) and self.std > 0):
            raise RewardError(f"calibration is mean {self.mean}, std {self.std}: accepted are finite, std above 0")


@dataclass(frozen=True)
class Term:
    """One reward of a weighted sum; ``weight`` counts in its own calibration deviations."""

    name: str
    reward: Reward
    weight: float
    calibration: Calibration

    def standardised(self, images_BCHW: Tensor, prompts: Sequence[str]) -> Tensor:
        """Scores (B,) in deviations above the calibration mean, not weighted."""
        raw_B = scored(self.name, self.reward, images_BCHW, prompts)
        return (raw_B - self.calibration.mean) / self.calibration.std


@dataclass(frozen=True)
class Weighted:
    """A reward: the weighted sum of standardised rewards."""

    terms: tuple[Term, ...]

    def __post_init__(self) -> None:
        if not self.terms:
            raise RewardError("a weighted sum of no rewards: accepted is one or more")

    @property
    def differentiable(self) -> bool:
        """True where every term is."""
        return all(term.reward.differentiable for term in self.terms)

    def score(self, images_BCHW: Tensor, prompts: Sequence[str]) -> Tensor:
        """The weighted sum (B,)."""
        parts = self.parts(images_BCHW, prompts)
        return torch.stack([term.weight * parts[term.name] for term in self.terms]).sum(0)

    def parts(self, images_BCHW: Tensor, prompts: Sequence[str]) -> Mapping[str, Tensor]:
        """Each reward's standardised scores (B,), not weighted, by name: what a log shows."""
        check_batch(images_BCHW, prompts)
        return {term.name: term.standardised(images_BCHW, prompts) for term in self.terms}


@torch.no_grad()
def calibrate(name: str, reward: Reward, images_NCHW: Tensor, prompts: Sequence[str], batch: int = 16) -> Calibration:
    """Mean and deviation of one reward on calibration images, scored ``batch`` at a time.

    Raises:
        RewardError: fewer than two images, scores that are not finite, or the same score for every image.
    """
    check_batch(images_NCHW, prompts)
    if len(prompts) < 2:
        raise RewardError(f"{len(prompts)} calibration prompts for reward {name!r}: accepted are 2 or more")
    starts = range(0, len(prompts), batch)
    raw_N = torch.cat([scored(name, reward, images_NCHW[i : i + batch], prompts[i : i + batch]) for i in starts])
    mean, std = float(raw_N.double().mean()), float(raw_N.double().std())
    if not math.isfinite(mean) or not std > 0:
        reason = "scores that are not finite" if not math.isfinite(mean) else "the same score for every image"
        raise RewardError(f"reward {name!r} cannot be standardised: it gave {reason} of {len(prompts)}")
    return Calibration(mean, std)


def require_gradient(name: str, reward: Reward) -> None:
    """Refuse a reward that cannot drive a reward term.

    Raises:
        RewardError: the reward, or a term of a weighted one, gives no gradient.
    """
    blind = [name] if not reward.differentiable else []
    if blind and isinstance(reward, Weighted):
        blind = [term.name for term in reward.terms if not term.reward.differentiable]
    if blind:
        raise RewardError(
            f"reward {', '.join(map(repr, blind))} gives no gradient down to the pixels, and a student can only learn "
            "from a reward term that does: use it for evaluation or for the gate"
        )

"""What a run measures with: rewards by role, features for diversity, and the judge where there is one.

Legend: B images, F frames, C channels, H/W pixels.
"""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from rewards.gradient import require_pixel_gradient
from rewards.interface import Reward, RewardError, scored
from rewards.registry import find, parse
from rewards.weighted import Calibration, require_gradient
from student.bundle import hash_weights
from student.families.family import Family
from training.evaluate import Evaluation, JudgeFn, Measure, ScoreFn, add_weights

CACHE = Path.home() / ".cache" / "fewstep" / "evaluation"
TRAINED, HELDOUT = "trained", "heldout"
PIXELS_AT_ONCE = 16 * 512 * 512  # that the autoencoder reads in one call: a video's frames are many and large


def calibration(name: str, scores: Sequence[float]) -> Calibration:
    """The calibration that a reward's raw scores of the teacher on the calibration prompts give.

    Raises:
        RewardError: they are not finite, or all the same.
    """
    try:
        return Calibration(float(np.mean(scores)), float(np.std(scores, ddof=1)))
    except RewardError as error:
        raise RewardError(f"reward {name!r} cannot be standardised on the teacher's pictures: {error}") from None


def standardise(kept: Calibration, scores: Sequence[float]) -> list[float]:
    """Raw scores in the teacher's deviations above the teacher's mean."""
    return [(score - kept.mean) / kept.std for score in scores]


@dataclass(frozen=True)
class Instrument:
    """One reward of a run: ``name`` is its column, ``asked`` what the configuration called it."""

    name: str
    asked: str
    role: str
    weight: float
    score: ScoreFn
    source: str


def open_instruments(
    trained: str, heldout: str, model: Family, learns_from_it: bool, device: str = "cpu"
) -> list[Instrument]:
    """The rewards that a run trains on, and those that it only measures with.

    A role with one reward calls it by the role; the parts of a weighted sum are ``trained-1``, ``trained-2``, ...

    Raises:
        RewardError: no such reward; one in both roles; or one to learn from that gives no gradient.
    """
    wanted = {TRAINED: parse(trained), HELDOUT: parse(heldout)}
    both = {_plain(name) for name in wanted[TRAINED]} & {_plain(name) for name in wanted[HELDOUT]}
    if both:
        raise RewardError(f"reward {min(both)!r} is trained on and held out: a held-out reward is never trained on")
    found = []
    for role, weights in wanted.items():
        for i, (asked, weight) in enumerate(weights.items(), 1):
            reward = find(asked, tokenizer=lambda prompts: model.tokenise(prompts)[0], device=device)
            if role == TRAINED and learns_from_it:
                require_gradient(asked, reward)
            name = role if len(weights) == 1 else f"{role}-{i}"
            score = over_frames(partial(scored, asked, reward, device=device))
            found.append(Instrument(name, asked, role, weight, score, _source(asked, reward)))
    return found


def try_out(
    instruments: Sequence[Instrument], images_BCHW: Tensor, prompts: Sequence[str], learns_from_it: bool
) -> None:
    """Ask every reward for its scores of a few pictures, and those that are learned from for their gradient.

    Raises:
        RewardError: see ``scored`` and ``require_pixel_gradient``.
    """
    for one in instruments:
        if one.role == TRAINED and learns_from_it:
            require_pixel_gradient(one.asked, one.score, images_BCHW, prompts)
        else:
            with torch.no_grad():
                one.score(images_BCHW, prompts)


def _plain(asked: str) -> str:
    """A scorer's folder has several names; any other reward has one."""
    folder = Path(asked.removeprefix("shapes:"))
    return str(folder.resolve()) if folder.is_dir() else asked


def _source(asked: str, reward: Reward) -> str:
    """What the reward's figures depend on: its weights, and the code of a user's own class."""
    folder = Path(asked.removeprefix("shapes:"))
    if folder.is_dir():
        return hash_weights(folder)
    digest = hashlib.sha256(asked.encode())
    module = importlib.util.find_spec(asked.partition(":")[0]) if ":" in asked else None
    if module is not None and module.origin is not None and module.has_location:
        digest.update(Path(module.origin).read_bytes())
    if isinstance(reward, nn.Module):
        add_weights(digest, reward.state_dict())
    return f"{asked} {digest.hexdigest()}"


def over_frames(score: ScoreFn) -> ScoreFn:
    """The same for videos too: a video's score is the mean of its frames'."""

    def mean(images: Tensor, prompts: Sequence[str]) -> Tensor:
        if images.ndim == 4:
            return score(images, prompts)
        frames = images.shape[1]
        each = [prompt for prompt in prompts for _ in range(frames)]
        return score(images.flatten(0, 1), each).reshape(-1, frames).mean(1)

    return mean


@dataclass(frozen=True)
class Scale:
    """The instruments with their calibration: from raw scores to the one scalar of a role."""

    instruments: Sequence[Instrument]
    calibration: Mapping[str, Calibration]

    def standardised(self, row: Evaluation, role: str) -> list[float]:
        """The weighted sum of a role's standardised scores, prompt by prompt."""
        parts = [standardise(self.calibration[i.name], row.scores[i.name]) for i in self._of(role)]
        weights = [i.weight for i in self._of(role)]
        return [sum(w * value for w, value in zip(weights, values, strict=True)) for values in zip(*parts, strict=True)]

    def score(self, role: str, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """The same of images (B,), with their gradient."""
        total = torch.zeros(len(images), device=images.device)
        for one in self._of(role):
            kept = self.calibration[one.name]
            total = total + one.weight * (one.score(images, prompts).float() - kept.mean) / kept.std
        return total

    def _of(self, role: str) -> list[Instrument]:
        return [instrument for instrument in self.instruments if instrument.role == role]


def measure_with(instruments: Sequence[Instrument], model: Family, judge: JudgeFn | None) -> Measure:
    """The instruments as one measure."""
    return Measure({one.name: one.score for one in instruments}, judge, latent_features(model))


def latent_features(model: Family) -> Callable[[Tensor], Tensor]:
    """Autoencoder latents, for diversity: features that no reward has trained."""

    @torch.no_grad()
    def features(images: Tensor) -> Tensor:
        flat = images.flatten(0, 1) if images.ndim == 5 else images
        at_once = min(64, max(1, PIXELS_AT_ONCE // (flat.shape[-2] * flat.shape[-1])))
        latents = torch.cat([_encode(model, part * 2 - 1) for part in flat.split(at_once)])
        return latents.reshape(len(images), -1)

    return features


def _encode(model: Family, x_BCHW: Tensor) -> Tensor:
    x = x_BCHW.to(model.device, model.vae.dtype)
    out = model.vae.encode(x[:, :, None] if model.name == "wan" else x)
    latents: Tensor = out.latents if hasattr(out, "latents") else out.latent_dist.mode()
    return latents.float().cpu()

"""The rewards of a run by role: those it trains on, those that choose its checkpoint, and those that only report.

Legend: B images, C channels, H/W pixels.
"""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from rewards.gradient import require_pixel_gradient
from rewards.interface import Reward, RewardError
from rewards.registry import find, parse
from rewards.weighted import Term, Weighted, require_gradient
from student.families.family import Family
from student.files import hash_weights
from training.evaluate import JudgeFn, Measure, add_weights
from training.features import dinov2_features, latent_features, open_dinov2, source

TRAINED, HELDOUT, REPORTED = "trained", "heldout", "reported"
DIVERSITY_DINOV2 = "diversity_dinov2"
Rewards = Mapping[str, Weighted]


def open_rewards(
    trained: str,
    heldout: str,
    model: Family,
    learns_from_it: bool,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    reported: str = "",
) -> dict[str, Weighted]:
    """The rewards of each role, not calibrated yet; that of ``reported``, where there is one, only measures at the end.

    A role with one reward names it after the role; the parts of a weighted sum are ``trained-1``, ``trained-2``, ...

    Raises:
        RewardError: no such reward; one in two roles; or one to train on that has no gradient.
    """
    asked = {TRAINED: trained, HELDOUT: heldout, **({REPORTED: reported} if reported else {})}
    wanted = {role: parse(names) for role, names in asked.items()}
    resolved = {role: {_resolved(name) for name in names} for role, names in wanted.items()}
    if both := resolved[TRAINED] & resolved[HELDOUT]:
        raise RewardError(
            f"reward {min(both)!r} is both trained on and held out: accepted are different rewards for the two roles"
        )
    if both := resolved.get(REPORTED, set()) & (resolved[TRAINED] | resolved[HELDOUT]):
        raise RewardError(
            f"reward {min(both)!r} is already the trained or the held-out reward: reward.reported must be another"
        )
    found = {}
    for role, weights in wanted.items():
        terms = []
        for i, (named, weight) in enumerate(weights.items(), 1):
            reward = find(named, tokenizer=lambda prompts: model.tokenise(prompts)[0], device=device, dtype=dtype)
            if role == TRAINED and learns_from_it:
                require_gradient(named, reward)
            name = role if len(weights) == 1 else f"{role}-{i}"
            terms.append(Term(name, reward, weight, asked=named, source=_source(named, reward), device=device))
        found[role] = Weighted(tuple(terms))
    return found


def move(rewards: Rewards, device: str) -> None:
    """Move the rewards that are networks to a device, where they are then computed."""
    for term in all_terms(rewards):
        if isinstance(term.reward, nn.Module):
            term.reward.to(device)


def all_terms(rewards: Rewards) -> list[Term]:
    """Every reward of every role."""
    return [term for role in rewards.values() for term in role.terms]


def sources(rewards: Rewards) -> str:
    """A string of everything that the figures of all rewards depend on."""
    return "".join(term.source for term in all_terms(rewards))


def calibrated(rewards: Rewards, raw: Mapping[str, list[float]]) -> dict[str, Weighted]:
    """The same rewards, standardised by the raw scores of the teacher's pictures."""
    return {role: weighted.calibrated(raw) for role, weighted in rewards.items()}


def try_out(rewards: Rewards, images_BCHW: Tensor, prompts: list[str], learns_from_it: bool) -> None:
    """Score a few pictures with every reward, and take the gradient of those that are trained on.

    Raises:
        RewardError: see ``scored`` and ``require_pixel_gradient``.
    """
    for role, weighted in rewards.items():
        for term in weighted.terms:
            if role == TRAINED and learns_from_it:
                require_pixel_gradient(term.asked, term.raw, images_BCHW, prompts)
            else:
                with torch.no_grad():
                    term.raw(images_BCHW, prompts)


def frame_windows(frames: int, latent_frames: int | None, video_frames: int) -> list[tuple[int, int]]:
    """The range (first, end) of video frames that each window of ``frames`` latent frames decodes to.

    Empty where the reward always sees all frames. The first latent frame is one picture; all later ones are equally
    many.
    """
    if latent_frames is None or not 0 < frames < latent_frames:
        return []
    each = (video_frames - 1) // (latent_frames - 1)
    starts = [0, *(1 + i * each for i in range(latent_frames))]
    return [(starts[at], starts[at + frames]) for at in range(latent_frames - frames + 1)]


def with_windows(measure: Measure, trained: Weighted, windows: Sequence[tuple[int, int]]) -> Measure:
    """The same measure, with another column for each term and window of a video."""
    columns = {
        f"{term.name} {first}-{end}": partial(_of_frames, term, first, end)
        for term in trained.terms
        for first, end in windows
    }
    return replace(measure, scorers={**measure.scorers, **columns})


def _of_frames(term: Term, first: int, end: int, videos_BFCHW: Tensor, prompts: Sequence[str]) -> Tensor:
    return term.raw(videos_BFCHW[:, first:end], prompts)


def calibrated_on_windows(
    trained: Weighted, raw: Mapping[str, list[float]], windows: Sequence[tuple[int, int]]
) -> Weighted:
    """The trained reward, standardised on what it sees in a training step: one window of a video, not all of it."""
    if not windows:
        return trained.calibrated(raw)
    pooled = {
        term.name: [score for first, end in windows for score in raw[f"{term.name} {first}-{end}"]]
        for term in trained.terms
    }
    return trained.calibrated(pooled)


def measure_with(rewards: Rewards, model: Family, judge: JudgeFn | None, dinov2: str = "") -> Measure:
    """The raw scores of all rewards, the judge where there is one, and features for diversity, as one measure.

    Raises:
        RewardError: ``dinov2`` names something else, or its files are missing.
    """
    measure = Measure({term.name: term.raw for term in all_terms(rewards)}, judge, latent_features(model))
    if not dinov2:
        return measure
    network = open_dinov2(dinov2)
    features = {DIVERSITY_DINOV2: dinov2_features(network, model)}
    return replace(measure, more_features=features, version=source(network))


def _resolved(asked: str) -> str:
    """The name by which two rewards are compared: a scorer's folder may be written in several ways."""
    folder = Path(asked.removeprefix("shapes:"))
    return str(folder.resolve()) if folder.is_dir() else asked


def _source(asked: str, reward: Reward) -> str:
    """A string of what the reward's figures depend on: its weights, and the code of a user's own class."""
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

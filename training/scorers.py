"""The rewards of a run by role: what it trains on, and what it only measures with.

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
from training.evaluate import JudgeFn, Measure, add_weights, latent_features

TRAINED, HELDOUT = "trained", "heldout"
Rewards = Mapping[str, Weighted]


def open_rewards(
    trained: str,
    heldout: str,
    model: Family,
    learns_from_it: bool,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> dict[str, Weighted]:
    """The rewards of each role, not calibrated yet.

    A role with one reward calls it by the role; the parts of a weighted sum are ``trained-1``, ``trained-2``, ...

    Raises:
        RewardError: no such reward; one in both roles; or one to learn from that gives no gradient.
    """
    wanted = {TRAINED: parse(trained), HELDOUT: parse(heldout)}
    both = {_resolved(name) for name in wanted[TRAINED]} & {_resolved(name) for name in wanted[HELDOUT]}
    if both:
        raise RewardError(f"reward {min(both)!r} is trained on and held out: a held-out reward is never trained on")
    found = {}
    for role, weights in wanted.items():
        terms = []
        for i, (asked, weight) in enumerate(weights.items(), 1):
            reward = find(asked, tokenizer=lambda prompts: model.tokenise(prompts)[0], device=device, dtype=dtype)
            if role == TRAINED and learns_from_it:
                require_gradient(asked, reward)
            name = role if len(weights) == 1 else f"{role}-{i}"
            terms.append(Term(name, reward, weight, asked=asked, source=_source(asked, reward), device=device))
        found[role] = Weighted(tuple(terms))
    return found


def move(rewards: Rewards, device: str) -> None:
    """Put the rewards that are networks on a device; they are asked where they lie."""
    for term in all_terms(rewards):
        if isinstance(term.reward, nn.Module):
            term.reward.to(device)


def all_terms(rewards: Rewards) -> list[Term]:
    """Every reward of every role."""
    return [term for role in rewards.values() for term in role.terms]


def sources(rewards: Rewards) -> str:
    """What the figures of all of them depend on."""
    return "".join(term.source for term in all_terms(rewards))


def calibrated(rewards: Rewards, raw: Mapping[str, list[float]]) -> dict[str, Weighted]:
    """The same, standardised on raw scores of the teacher's pictures by name."""
    return {role: weighted.calibrated(raw) for role, weighted in rewards.items()}


def try_out(rewards: Rewards, images_BCHW: Tensor, prompts: list[str], learns_from_it: bool) -> None:
    """Ask every reward for its scores of a few pictures, and those that are learned from for their gradient.

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
    """Where in a video (first, end) the pictures lie that each window of ``frames`` latent frames is decoded to.

    None where the reward always sees all of them. The first latent frame is one picture, every later one as many as
    every other.
    """
    if latent_frames is None or not 0 < frames < latent_frames:
        return []
    each = (video_frames - 1) // (latent_frames - 1)
    starts = [0, *(1 + i * each for i in range(latent_frames))]
    return [(starts[at], starts[at + frames]) for at in range(latent_frames - frames + 1)]


def with_windows(measure: Measure, trained: Weighted, windows: Sequence[tuple[int, int]]) -> Measure:
    """The same, with a column for each term and window of a video."""
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
    """The trained reward, standardised on what a training step shows it: one window of a video, not all of it."""
    if not windows:
        return trained.calibrated(raw)
    pooled = {
        term.name: [score for first, end in windows for score in raw[f"{term.name} {first}-{end}"]]
        for term in trained.terms
    }
    return trained.calibrated(pooled)


def measure_with(rewards: Rewards, model: Family, judge: JudgeFn | None) -> Measure:
    """The raw scores of all rewards, the judge where there is one, and features for diversity, as one measure."""
    return Measure({term.name: term.raw for term in all_terms(rewards)}, judge, latent_features(model))


def _resolved(asked: str) -> str:
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

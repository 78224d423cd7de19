"""Which pictures are scored, and what an answer says of them; it never fails a picture that was drawn.

Legend: B images or videos, C = 3 colour channels, F frames, H x W pixels.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np

from student.reference import Verdict, verdicts
from student.runtimes.runtime import FloatArray, Runtime

POLICY = re.compile(r"always|after|off|0(\.\d+)?|\.\d+|1(\.0+)?")
GOLDEN = 2654435769  # 2^32 divided by the golden ratio: multiples of it lie evenly among the whole numbers below 2^32
RANGE = 2**32

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ScorePolicy:
    """FEWSTEP_SCORE: the share of the pictures that are scored, and whether their answer waits for it."""

    share: float = 1.0
    after: bool = False

    @staticmethod
    def parse(text: str) -> ScorePolicy:
        """``always``, ``after`` (the answer does not wait), ``off``, or a share such as ``0.1``.

        Raises:
            ValueError: none of them.
        """
        if POLICY.fullmatch(text) is None:
            raise ValueError(f"score is {text!r}: accepted is always, after, off or a share from 0 to 1")
        shares = {"always": 1.0, "after": 1.0, "off": 0.0}
        return ScorePolicy(shares[text] if text in shares else float(text), after=text == "after")

    def scores(self, seed: int) -> bool:
        """Whether the picture of this seed is scored: the same answer for the same seed, whoever asks."""
        return (seed * GOLDEN) % RANGE < self.share * RANGE


@dataclass(frozen=True)
class Judged:
    """The scores of one image or video; ``failed`` names the scorers that failed on it.

    The reward of a video is the mean of its frames', ``reward_worst`` that of ``worst_frame``, counted from 0.
    """

    reward: dict[str, float] = field(default_factory=dict)
    reward_percentile: dict[str, float] = field(default_factory=dict)
    reward_failed: tuple[str, ...] = ()
    reward_worst: dict[str, float] = field(default_factory=dict)
    worst_frame: dict[str, int] = field(default_factory=dict)

    def record(self) -> dict[str, object]:
        """The entries of the job's record; ``reward_failed`` only where a scorer failed."""
        failed: dict[str, object] = {"reward_failed": list(self.reward_failed)} if self.reward_failed else {}
        worst = {"reward_worst": self.reward_worst, "worst_frame": self.worst_frame} if self.worst_frame else {}
        return {"reward": self.reward, "reward_percentile": self.reward_percentile, **worst, **failed}


def judge(
    runtime: Runtime, images_BCHW: FloatArray, prompts: Sequence[str], seeds: Sequence[int], steps: int,
    policy: ScorePolicy | Literal["all"] = "all", always: Collection[int] = (),
) -> tuple[Judged, ...]:  # fmt: skip
    """Score the pictures of one call of the runtime that the policy wants scored; the others have no reward.

    Those in the rows ``always`` are scored whatever the policy says: something is chosen by their scores.
    Where that fails each picture is tried alone: whatever goes wrong here costs a score and no picture.
    """
    try:
        rows = [b for b, seed in enumerate(seeds) if b in always or policy == "all" or policy.scores(seed)]
        return _judge(runtime, images_BCHW, prompts, rows, steps)
    except Exception as error:  # a scorer may fail in any way, a user's own in particular
        log.warning("%d pictures cannot be scored (%s)", len(seeds), type(error).__name__)
    if len(seeds) == 1:
        return (Judged(reward_failed=tuple(runtime.student.scorers)),)
    alone = [
        judge(runtime, images_BCHW[b : b + 1], [prompts[b]], [seeds[b]], steps, "all" if b in always else policy)
        for b in range(len(seeds))
    ]
    return tuple(one for judged in alone for one in judged)


def _judge(
    runtime: Runtime, images_BCHW: FloatArray, prompts: Sequence[str], rows: Sequence[int], steps: int
) -> tuple[Judged, ...]:
    found = [Judged() for _ in prompts]
    if not rows:
        return tuple(found)
    scores_BF = _scores(runtime, images_BCHW, prompts, rows)
    scores = {name: score_BF.mean(axis=1) for name, score_BF in scores_BF.items()}
    height, width = images_BCHW.shape[-2:]
    said: Sequence[Verdict] = verdicts(runtime.student, scores, steps, (height, width), len(rows))
    for row, (b, verdict) in enumerate(zip(rows, said, strict=True)):
        failed = tuple(name for name in scores if name not in verdict.reward)
        found[b] = Judged(dict(verdict.reward), dict(verdict.percentile), failed)
        if images_BCHW.ndim == 5:
            frames = {name: scores_BF[name][row] for name in verdict.reward}
            worst = {name: int(score_F.argmin()) for name, score_F in frames.items()}
            lowest = {name: float(score_F.min()) for name, score_F in frames.items()}
            found[b] = replace(found[b], reward_worst=lowest, worst_frame=worst)
    return tuple(found)


def _scores(runtime: Runtime, images: FloatArray, prompts: Sequence[str], rows: Sequence[int]) -> dict[str, FloatArray]:
    """Standardised scores_BF of these rows, by scorer; a picture is one frame."""
    if images.ndim == 4:
        return {
            name: score_B[:, None] for name, score_B in runtime.score(images[rows], [prompts[b] for b in rows]).items()
        }
    each = [runtime.score(images[b], [prompts[b]] * len(images[b])) for b in rows]  # a video is large enough alone
    return {name: np.stack([scores[name] for scores in each]) for name in each[0]}

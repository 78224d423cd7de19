"""Which pictures are scored, where a score stands, and what a failing scorer costs: its own score."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest

from service.worker.scoring import Judged, ScorePolicy, judge
from student.bundle import RewardReference
from student.reference import distribution, own_reference, percentile, reference_at, verdicts, with_distribution
from student.runtimes.fake import FakeRuntime, fake_student
from student.runtimes.runtime import FloatArray


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("always", ScorePolicy(1.0)),
        ("off", ScorePolicy(0.0)),
        ("after", ScorePolicy(1.0, after=True)),
        ("0.1", ScorePolicy(0.1)),
        (".25", ScorePolicy(0.25)),
        ("1", ScorePolicy(1.0)),
        ("0", ScorePolicy(0.0)),
    ],
)
def test_the_setting_is_read(text: str, expected: ScorePolicy) -> None:
    assert ScorePolicy.parse(text) == expected


@pytest.mark.parametrize("text", ["", "2", "-0.1", "1.5", "sometimes", "0.1.2", "10%", "later", "after0.1"])
def test_another_setting_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="accepted is always, after, off or a share"):
        ScorePolicy.parse(text)


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 1.0])
def test_a_share_of_the_seeds_is_scored_evenly_and_always_the_same(share: float) -> None:
    policy = ScorePolicy(share)
    for first in (0, 10**6, 2**32 - 2000):
        chosen = [policy.scores(seed) for seed in range(first, first + 2000)]
        assert abs(sum(chosen) - 2000 * share) <= 3
        assert chosen == [policy.scores(seed) for seed in range(first, first + 2000)]


class Runtime(FakeRuntime):
    """Notes what it is asked to score; one scorer fails on the seeds' second picture."""

    def __init__(self) -> None:
        known = RewardReference(0.0, 1.0, {"0": -2.0, "50": 0.0, "100": 2.0})
        super().__init__(replace(fake_student(), reward_reference={"trained": known}))
        self.asked: list[tuple[int, list[str]]] = []

    def score(self, images_BCHW: FloatArray, prompts: Sequence[str]) -> dict[str, FloatArray]:
        self.asked.append((len(images_BCHW), list(prompts)))
        trained, heldout = np.ones(len(prompts), np.float32), np.zeros(len(prompts), np.float32)
        trained[1:2] = np.nan
        return {"trained": trained, "heldout": heldout}


def test_a_failed_score_is_missing_and_named_and_the_rest_is_there() -> None:
    runtime = Runtime()
    said = judge(runtime, np.zeros((3, 3, 64, 64), np.float32), ["a", "b", "c"], [0, 1, 2], 4)
    good = Judged({"trained": 1.0, "heldout": 0.0}, {"trained": 75.0})
    assert said == (good, Judged({"heldout": 0.0}, {}, ("trained",)), good)
    assert said[1].record() == {"reward": {"heldout": 0.0}, "reward_percentile": {}, "reward_failed": ["trained"]}
    assert "reward_failed" not in said[0].record()


def test_only_the_chosen_pictures_are_shown_to_the_scorers() -> None:
    runtime, policy = Runtime(), ScorePolicy(0.4)
    seeds = list(range(8))
    said = judge(runtime, np.zeros((8, 3, 64, 64), np.float32), [f"p{s}" for s in seeds], seeds, 4, policy)
    chosen = [seed for seed in seeds if policy.scores(seed)]
    assert 0 < len(chosen) < 8 and runtime.asked == [(len(chosen), [f"p{seed}" for seed in chosen])]
    assert [bool(one.reward) for one in said] == [policy.scores(seed) for seed in seeds]
    judge(runtime, np.zeros((1, 3, 64, 64), np.float32), ["a"], [0], 4, ScorePolicy(0.0))
    assert len(runtime.asked) == 1  # nobody was asked


def test_where_scoring_a_call_fails_each_picture_is_tried_alone_and_scored_for_the_same_reasons_as_before() -> None:
    """Candidates whatever the policy says, the others as it says."""

    class Fails(Runtime):
        def score(self, images_BCHW: FloatArray, prompts: Sequence[str]) -> dict[str, FloatArray]:
            if len(prompts) > 1 or prompts == ["bad"]:
                raise ValueError("too many")
            return super().score(images_BCHW, prompts)

    images_BCHW = np.zeros((4, 3, 64, 64), np.float32)
    policy = ScorePolicy(0.4)
    seeds = [next(s for s in range(99) if policy.scores(s) is wanted) for wanted in (True, False, False, True)]
    runtime = Fails()
    said = judge(runtime, images_BCHW, ["a", "b", "c", "bad"], seeds, 4, policy, always=[2])
    assert [bool(one.reward) for one in said] == [True, False, True, False]
    assert said[3].reward_failed == tuple(runtime.student.scorers) and not said[1].reward_failed
    assert runtime.asked == [(1, ["a"]), (1, ["c"])]


def test_a_rank_is_the_share_of_the_students_own_pictures_that_score_lower() -> None:
    scores = np.random.default_rng(1).normal(size=4000)
    known = distribution(list(scores))
    for value in (-1.5, -0.3, 0.0, 0.8, 2.0):
        assert percentile(known, value) == pytest.approx(100 * (scores < value).mean(), abs=1.5)
    assert percentile(known, scores.min() - 1) == 0 and percentile(known, scores.max() + 1) == 100
    assert percentile(RewardReference(0.0, 1.0, {}), 0.3) is None


def test_the_reference_is_that_of_the_same_steps_and_size() -> None:
    rows = {key: RewardReference(mean, 1.0, {}) for key, mean in (("4", 1.0), ("2", 2.0), ("4 96x64", 3.0))}
    known = None
    for key, row in rows.items():
        known = with_distribution(known, key, row)
    assert known is not None
    student = replace(fake_student(), reward_reference={"trained": known})
    means = {
        (steps, size): found.mean
        for steps, size in ((4, (64, 64)), (2, (64, 64)), (4, (64, 96)), (2, (64, 96)), (1, (64, 64)))
        if (found := reference_at(student, "trained", steps, size))
    }
    assert means == {(4, (64, 64)): 1, (2, (64, 64)): 2, (4, (64, 96)): 3, (2, (64, 96)): 2, (1, (64, 64)): 1}
    assert reference_at(student, "other", 4, (64, 64)) is None


def test_a_percentile_has_one_decimal_and_a_distribution_its_own_steps_and_size() -> None:
    known = RewardReference(0.0, 1.0, {"0": 0.0, "100": 1.0})
    student = replace(fake_student(), reward_reference={"trained": known})
    own = (student.image.height, student.image.width)
    [said] = verdicts(student, {"trained": np.array([0.12345])}, student.steps[0], own, 1)
    assert said.percentile == {"trained": 12.3}
    assert own_reference(student, "trained", student.steps[0], own) is known
    for steps, size in ((student.steps[1], own), (student.steps[0], (own[0] * 2, own[1]))):
        assert own_reference(student, "trained", steps, size) is None

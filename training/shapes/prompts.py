"""Which captions train, and which ones only measure: a hash of a scene's content decides."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from training.prompts import Prompts
from training.shapes import pairs, world
from training.shapes.judging import judge_prompts

HELD_OUT_SHARE = 16  # one content in so many is never shown to teacher or student
CALIBRATION, VALIDATION, TEST = 128, 256, 512


def content_hash(scenes: world.Scenes) -> NDArray[np.uint64]:
    """A number for what each scene's full caption says (not for where things lie)."""
    two = scenes.count_N == 2
    code = scenes.background_N * 3 + scenes.count_N
    code = code * 5 + np.where(two, scenes.relation_N, 4)
    for column in (scenes.size_NK, scenes.color_NK, scenes.shape_NK):
        code = (code * 11 + column[:, 0]) * 11 + np.where(two, column[:, 1], 10)
    return (code.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)) >> np.uint64(32)


def held_out(scenes: world.Scenes) -> NDArray[np.bool_]:
    """True for the scenes that are kept for measuring."""
    return content_hash(scenes) % np.uint64(HELD_OUT_SHARE) == 0


def training_scenes(num: int, *key: int, singles: float | None = None) -> world.Scenes:
    """``num`` scenes that are not held out, a function of ``key``; ``singles`` is the share of single objects.

    None takes the world's own share, one third.
    """
    drawn = world.sample((2 if singles is None else 4) * num, *key)
    free = ~held_out(drawn)
    if singles is None:
        return drawn.take(np.flatnonzero(free)[:num])
    ones = round(singles * num)
    single = np.flatnonzero(free & (drawn.count_N == 1))[:ones]
    pair = np.flatnonzero(free & (drawn.count_N == 2))[: num - len(single)]
    return drawn.take(np.sort(np.concatenate([single, pair])))


def training_prompts(num: int, *key: int, singles: float | None = None) -> list[str]:
    """Captions of training scenes, with parts left out at random; ``singles`` as in ``training_scenes``."""
    scenes = training_scenes(num, *key, singles=singles)
    return pairs.captions(scenes, pairs.sample_styles(num, world.rng(*key, 3)))


def measuring_prompts() -> tuple[list[str], list[str], list[str]]:
    """Calibration, validation and test prompts: full captions, held out, as often single objects as in the world.

    No prompt is in two of them. Only 32 single objects are held out, so those come up more than once, with other seeds;
    without repeats single objects would hardly be measured, and they are the harder ones.
    """
    drawn = world.sample(60 * (CALIBRATION + VALIDATION + TEST), 20261122)
    kept = drawn.take(np.flatnonzero(held_out(drawn)))
    part_N = content_hash(kept) // np.uint64(HELD_OUT_SHARE) % np.uint64(7)  # 1, 2 and 4 sevenths of all contents
    sets: list[list[str]] = []
    for first, last, num in ((0, 0, CALIBRATION), (1, 2, VALIDATION), (3, 6, TEST)):
        chosen = kept.take(np.flatnonzero((part_N >= first) & (part_N <= last)))
        sets.append(_every_third_single(chosen, num))
    return sets[0], sets[1], sets[2]


def _every_third_single(scenes: world.Scenes, num: int) -> list[str]:
    """Single objects in the world's share, repeated or not; every pair once."""
    texts = scenes.captions()
    singles = iter([text for text, count in zip(texts, scenes.count_N, strict=True) if count == 1])
    two = iter(dict.fromkeys(text for text, count in zip(texts, scenes.count_N, strict=True) if count == 2))
    return [next(singles if i % 3 == 0 else two) for i in range(num)]


def source(seed: int) -> Prompts:
    """The starter world's prompts for a run: as many as it wants, and the fixed measuring sets with their judge.

    Half of a run's prompts are single objects, which the teacher draws worst.
    """
    calibration, validation, test = measuring_prompts()

    def train(step: int, num: int) -> list[str]:
        return training_prompts(num, seed, step, singles=0.5)

    return Prompts(train, calibration, validation, test, judge=judge_prompts)

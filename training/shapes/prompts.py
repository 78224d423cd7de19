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


def training_scenes(num: int, *key: int) -> world.Scenes:
    """``num`` scenes that are not held out, a function of ``key``."""
    drawn = world.sample(2 * num, *key)
    return drawn.take(np.flatnonzero(~held_out(drawn))[:num])


def training_prompts(num: int, *key: int) -> list[str]:
    """Captions of training scenes, with parts left out at random."""
    scenes = training_scenes(num, *key)
    return pairs.captions(scenes, pairs.sample_styles(num, world.rng(*key, 3)))


def measuring_prompts() -> tuple[list[str], list[str], list[str]]:
    """Calibration, validation and test prompts: full captions, held out, all different."""
    num = CALIBRATION + VALIDATION + TEST
    drawn = world.sample(40 * num, 20261122)
    kept = drawn.take(np.flatnonzero(held_out(drawn)))
    unique = list(dict.fromkeys(kept.captions()))[:num]
    return unique[:CALIBRATION], unique[CALIBRATION : CALIBRATION + VALIDATION], unique[CALIBRATION + VALIDATION :]


def source(seed: int) -> Prompts:
    """The starter world's prompts for a run: as many as it wants, and the fixed measuring sets with their judge."""
    calibration, validation, test = measuring_prompts()

    def train(step: int, num: int) -> list[str]:
        return training_prompts(num, seed, step)

    return Prompts(train, calibration, validation, test, judge=judge_prompts)

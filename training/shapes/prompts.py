"""Which captions are for training and which for evaluation: a hash of a scene's content decides."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import numpy as np
from numpy.typing import NDArray

from training.prompts import Prompts
from training.shapes import pairs, world
from training.shapes.judging import judge_prompts

CALIBRATION, VALIDATION, TEST = 60, 168, 270
# One form of a caption in so many is never shown to teacher or student. Single objects have few forms, so more of
# them are kept: of full ones 64 of 512, of those that leave something out 112 of 448, the 16 shortest among them.
PAIR_SHARE, SINGLE_SHARE, SHORT_SHARE = 16, 8, 4
_UNNAMED_SIZE, _UNNAMED_BACKGROUND = 2, 4
# The shapes that a generator of 16 image tokens learns last come up more often among single objects.
_WEIGHT = np.array([1.0, 1.5, 1.0, 1.0, 1.4, 2.0, 1.8, 1.2])  # in the order of SHAPES


def form_hash(scenes: world.Scenes, styles: pairs.Styles | None = None) -> NDArray[np.uint64]:
    """A hash of what each scene's caption says (not of exact positions); without ``styles``, of the full caption."""
    two = scenes.count_N == 2
    size_NK, background_N = scenes.size_NK, scenes.background_N
    if styles is not None:
        size_NK = np.where(styles.size_N[:, None], size_NK, _UNNAMED_SIZE)
        background_N = np.where(styles.background_N, background_N, _UNNAMED_BACKGROUND)
    code = background_N * 3 + scenes.count_N
    code = code * 5 + np.where(two, scenes.relation_N, 4)
    for column in (size_NK, scenes.color_NK, scenes.shape_NK):
        code = (code * 11 + column[:, 0]) * 11 + np.where(two, column[:, 1], 10)
    return (code.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)) >> np.uint64(32)


def held_out(scenes: world.Scenes, styles: pairs.Styles | None = None) -> NDArray[np.bool_]:
    """True for the captions that are kept for evaluation."""
    full_N = np.ones(len(scenes), bool) if styles is None else styles.size_N & styles.background_N
    share_N = np.where(full_N, SINGLE_SHARE, SHORT_SHARE)
    share_N = np.where(scenes.count_N == 2, PAIR_SHARE, share_N).astype(np.uint64)
    kept: NDArray[np.bool_] = form_hash(scenes, styles) % share_N == 0
    return kept


def training_scenes(num: int, *key: int, singles: float | None = None, spread: float = 1.0) -> world.Scenes:
    """``num`` scenes that are not held out, a function of ``key``; ``singles`` is the share of single objects.

    None keeps the world's own distribution. With a share, hard shapes are more frequent among the single objects, and
    ``spread`` is how far these are from the centre, as a fraction of what the world allows.
    """
    if singles is None:
        return world.chosen(num, 2 * num, lambda drawn: np.flatnonzero(~held_out(drawn)), *key)
    most = round(singles * num)

    def shared(drawn: world.Scenes) -> world.IntArray:
        free = ~held_out(drawn)
        keep = world.rng(*key, 5).random(len(drawn)) < _WEIGHT[drawn.shape_NK[:, 0]] / _WEIGHT.max()
        single = np.flatnonzero(free & keep & (drawn.count_N == 1))[:most]
        pair = np.flatnonzero(free & (drawn.count_N == 2))[: num - len(single)]
        return np.sort(np.concatenate([single, pair]))

    chosen = world.chosen(num, 8 * num, shared, *key)
    centre = world.SIDE_PX / 2
    one_N1 = (chosen.count_N == 1)[:, None]
    places = {name: getattr(chosen, name) for name in ("x_NK", "y_NK")}
    moved = {name: np.where(one_N1, centre + spread * (at - centre), at) for name, at in places.items()}
    return replace(chosen, **moved)


def training_styles(scenes: world.Scenes, gen: np.random.Generator) -> pairs.Styles:
    """A style for each scene's caption, never a form that is held out.

    What people type first, ``a red heart``, is a third of the captions of single objects: 0.45 for large ones and 0.2
    for small ones, so that an object whose size is not named is large more often than small.
    """
    styles = pairs.sample_styles(len(scenes), gen)
    one_N = scenes.count_N == 1
    short_N = one_N & (gen.random(len(scenes)) < np.where(scenes.size_NK[:, 0] == 1, 0.45, 0.2))
    styles = replace(styles, size_N=styles.size_N & ~short_N, background_N=styles.background_N & ~short_N)
    full_N = held_out(scenes, styles)
    return replace(styles, size_N=styles.size_N | full_N, background_N=styles.background_N | full_N)


def training_prompts(num: int, *key: int, singles: float | None = None) -> list[str]:
    """Captions of training scenes, with parts left out at random; ``singles`` as in ``training_scenes``."""
    scenes = training_scenes(num, *key, singles=singles)
    return pairs.captions(scenes, training_styles(scenes, world.rng(*key, 3)))


def asked_prompts(num: int, *key: int) -> list[str]:
    """What users of a served student may ask, some of it several times: captions that may train, half of them single
    objects, of any completeness but without words around them; none of an evaluation set.
    """
    scenes = training_scenes(3 * num, *key, singles=0.5)
    styles = training_styles(scenes, world.rng(*key, 3))
    texts = pairs.captions(scenes, replace(styles, filler_N=np.zeros(len(scenes), dtype=np.int64)))
    evaluated = {text for part in measuring_prompts() for text in part}
    return [text for text in texts if text not in evaluated][:num]


def fresh_prompts(num: int, *key: int) -> list[str]:
    """Distinct captions that are held out, of any completeness, without those that choose a checkpoint; every third is
    a single object while there are any (there are few).
    """
    drawn = world.sample(40 * num, *key)
    styles = pairs.sample_styles(len(drawn), world.rng(*key, 3))
    styles = replace(styles, article_N=np.ones(len(drawn), dtype=bool), filler_N=np.zeros(len(drawn), dtype=np.int64))
    kept = np.flatnonzero(held_out(drawn, styles))
    calibration, validation, _ = measuring_prompts()
    choosing, texts = {*calibration, *validation}, pairs.captions(drawn, styles)
    single, pair = (
        iter(
            dict.fromkeys(texts[i] for i in kept if bool(drawn.count_N[i] == 1) is wanted and texts[i] not in choosing)
        )
        for wanted in (True, False)
    )
    return [text for i in range(num) if (text := next(single if i % 3 == 0 else pair, None) or next(pair, None))]


@cache
def measuring_prompts() -> tuple[list[str], list[str], list[str]]:
    """Calibration, validation and test prompts, all held out and all distinct; every third is a single object.

    Captions of pairs are complete; some of single objects omit what people omit, and those that omit both size and
    background (``a red heart``) are all in the test set.
    """
    drawn = world.sample(60_000, 20261122)
    gen = world.rng(20261122, 7)
    one_N = drawn.count_N == 1
    named = gen.random((2, len(drawn))) < 0.5
    full = pairs.full_styles(len(drawn))
    styles = replace(full, size_N=named[0] | ~one_N, background_N=named[1] | ~one_N)
    kept = np.flatnonzero(held_out(drawn, styles))
    texts = pairs.captions(drawn, styles)
    part_N = form_hash(drawn, styles) // np.uint64(PAIR_SHARE) % np.uint64(7)  # 1, 3 and 3 sevenths of all forms
    part_N = np.where(styles.size_N | styles.background_N, part_N, 6)
    sets: list[list[str]] = []
    for first, last, num in ((0, 0, CALIBRATION), (1, 3, VALIDATION), (4, 6, TEST)):
        mine = [i for i in kept if first <= part_N[i] <= last]
        single = iter(dict.fromkeys(texts[i] for i in sorted(mine, key=lambda i: named[:, i].any()) if one_N[i]))
        pair = iter(dict.fromkeys(texts[i] for i in mine if not one_N[i]))
        sets.append([next(single if i % 3 == 0 else pair) for i in range(num)])
    return sets[0], sets[1], sets[2]


def reference_prompts(num: int) -> list[str]:
    """Distinct prompts as the world has them, whether they train or not, without the test's; every third is a single
    object. What a served student's scores are held against (export.reference): its users ask for all of them.
    """
    drawn = world.sample(16 * num, 20261130)
    one_N = drawn.count_N == 1
    named = world.rng(20261130, 7).random((3, len(drawn))) < 0.5
    size_N, background_N, article_N = (column_N | ~one_N for column_N in named)
    texts = pairs.captions(drawn, replace(pairs.full_styles(len(drawn)), size_N=size_N, background_N=background_N,
                                          article_N=article_N))  # fmt: skip
    test = set(measuring_prompts()[2])
    single, pair = (
        iter(dict.fromkeys(text for text, one in zip(texts, one_N, strict=True) if one == wanted and text not in test))
        for wanted in (True, False)
    )
    return [next(single if i % 3 == 0 else pair) for i in range(num)]


def source(seed: int) -> Prompts:
    """The starter world's prompts for a run: an endless training set, and the fixed evaluation sets with their judge.

    Half of a run's prompts are single objects, which the teacher draws worst.
    """
    calibration, validation, test = measuring_prompts()

    def train(step: int, num: int) -> list[str]:
        return training_prompts(num, seed, step, singles=0.5)

    return Prompts(train, calibration, validation, test, judge=judge_prompts)

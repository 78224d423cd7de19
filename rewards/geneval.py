"""GenEval's rules (Ghosh et al. 2023, arXiv 2310.11513): does a picture show what one of its prompts asks for?

The prompts are those of its six tasks; what is found in a picture comes from a detector (rewards/detector.py). The
rules are those of github.com/djghosh13/geneval, evaluation/evaluate_images.py, with its default options.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from rewards.interface import RewardError

# COCO's classes in their order, by the names that the prompts have for them.
OBJECTS = tuple(
    """person, bicycle, car, motorcycle, airplane, bus, train, truck, boat, traffic light, fire hydrant, stop sign,
    parking meter, bench, bird, cat, dog, horse, sheep, cow, elephant, bear, zebra, giraffe, backpack, umbrella,
    handbag, tie, suitcase, frisbee, skis, snowboard, sports ball, kite, baseball bat, baseball glove, skateboard,
    surfboard, tennis racket, bottle, wine glass, cup, fork, knife, spoon, bowl, banana, apple, sandwich, orange,
    broccoli, carrot, hot dog, pizza, donut, cake, chair, couch, potted plant, bed, dining table, toilet, tv, laptop,
    computer mouse, tv remote, computer keyboard, cell phone, microwave, oven, toaster, sink, refrigerator, book, clock,
    vase, scissors, teddy bear, hair drier, toothbrush""".replace("\n    ", " ").split(", ")
)
COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
POSITIONS = ("left of", "right of", "above", "below")
NUMBERS = {"two": 2, "three": 3, "four": 4}
SURE, SURE_TO_COUNT = 0.3, 0.9  # what a detection must have more than
MOST = 16  # objects of a class
NEAR = 0.1  # of both objects' sizes together: what centres may differ by and still be level


@dataclass(frozen=True)
class Wanted:
    """So many objects of a class; all of a colour, or at a place relative to the first that is wanted, where said."""

    name: str
    count: int = 1
    colour: str = ""
    position: str = ""


@dataclass(frozen=True)
class Task:
    """What a prompt asks for; ``counts``: no more of it than that."""

    wanted: tuple[Wanted, ...]
    counts: bool = False


@dataclass(frozen=True)
class Found:
    """A detection: class, confidence, box (left, top, right, bottom) in pixels, and mask (H, W) where it is known."""

    name: str
    confidence: float
    box: tuple[float, float, float, float]
    mask: np.ndarray | None = None


def read(prompt: str) -> Task:
    """The task of a prompt.

    Raises:
        RewardError: it is none of GenEval's.
    """
    text = " ".join(prompt.strip().removesuffix(".").split())
    if named := _COUNTING.fullmatch(text):
        return Task((Wanted(_PLURALS[named["objects"]], NUMBERS[named["number"]]),), counts=True)
    if placed := _POSITION.fullmatch(text):
        return Task((Wanted(placed["other"]), Wanted(placed["object"], position=placed["position"])))
    if listed := _LIST.fullmatch(text):
        both = [Wanted(listed[f"object{i}"], colour=listed[f"colour{i}"] or "") for i in "ab" if listed[f"object{i}"]]
        if len({bool(one.colour) for one in both}) == 1:
            return Task(tuple(both))
    raise RewardError(
        f"prompt {prompt!r} is none of GenEval's: accepted are those of its six tasks, such as 'a photo of two clocks' "
        "or 'a photo of a car left of a bench'"
    )


def right(task: Task, found: Sequence[Found], colour_of: Callable[[Found], str]) -> bool:
    """Whether all that the task wants is among the detections; only the surest of a class are asked."""
    at_least = SURE_TO_COUNT if task.counts else SURE
    of_class: dict[str, list[Found]] = {}
    for one in sorted(found, key=lambda one: -one.confidence):
        if one.confidence > at_least and len(of_class.get(one.name, ())) < MOST:
            of_class.setdefault(one.name, []).append(one)
    return all(_has(wanted, task, of_class, colour_of) for wanted in task.wanted)


def _has(wanted: Wanted, task: Task, of_class: Mapping[str, list[Found]], colour_of: Callable[[Found], str]) -> bool:
    there = of_class.get(wanted.name, [])
    surest = there[: wanted.count]
    if len(surest) < wanted.count or (task.counts and len(there) > wanted.count):
        return False
    if wanted.colour and any(colour_of(one) != wanted.colour for one in surest):
        return False
    others = of_class.get(task.wanted[0].name, [])[: task.wanted[0].count]
    return not wanted.position or all(wanted.position in places(one, other) for one in surest for other in others)


def places(one: Found, other: Found) -> set[str]:
    """Where one lies, seen from the other: none, one or two of POSITIONS."""
    boxes = np.array([one.box, other.box], dtype=float).reshape(2, 2, 2)
    (x_a, y_a), (x_b, y_b) = boxes.mean(1)
    offset = np.array([x_a - x_b, y_a - y_b])
    beyond = np.maximum(np.abs(offset) - NEAR * (boxes[:, 1] - boxes[:, 0]).sum(0), 0) * np.sign(offset)
    if (np.abs(beyond) < 1e-3).all():
        return set()
    dx, dy = beyond / np.linalg.norm(offset)
    asked = {"left of": dx < -0.5, "right of": dx > 0.5, "above": dy < -0.5, "below": dy > 0.5}
    return {name for name, holds in asked.items() if holds}


def _any(words: Sequence[str]) -> str:
    return "|".join(sorted(map(re.escape, words), key=len, reverse=True))


_PLURALS = {f"{name}es" if name.endswith("s") else f"{name}s": name for name in OBJECTS}
_COUNTING = re.compile(rf"a photo of (?P<number>{_any(list(NUMBERS))}) (?P<objects>{_any(list(_PLURALS))})")
_POSITION = re.compile(
    rf"a photo of an? (?P<object>{_any(OBJECTS)}) (?P<position>{_any(POSITIONS)}) an? (?P<other>{_any(OBJECTS)})"
)
_ONE = rf"an? (?:(?P<colour%s>{_any(COLOURS)}) )?(?P<object%s>{_any(OBJECTS)})"
_LIST = re.compile(rf"a photo of {_ONE % ('a', 'a')}(?: and {_ONE % ('b', 'b')})?")

"""The prompts of a run: what trains, and three sets that only measure. Nothing is in two of them."""

from __future__ import annotations

import copy
import hashlib
import json
from codecs import BOM_UTF8
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from student.families.family import Family
from training.config import ConfigError
from training.evaluate import JudgeFn

LONGEST = 2_000  # characters; text encoders cut a prompt long before
NAMED = 10  # lines that a message names
MEASURED = {"calibration": 128, "validation": 256, "test": 512}


@dataclass(frozen=True)
class Prompts:
    """``train(step, num)`` are one step's prompts; ``judge`` is an exact program that reads images, if there is one."""

    train: Callable[[int, int], list[str]]
    calibration: list[str]
    validation: list[str]
    test: list[str]
    of_file: bool = False  # then a run encodes its own before it begins, and lets the encoders go
    judge: JudgeFn | None = None

    def first(self, calibration: int, validation: int, test: int) -> Prompts:
        """The same with at most so many prompts to measure on."""
        return replace(
            self,
            calibration=self.calibration[:calibration],
            validation=self.validation[:validation],
            test=self.test[:test],
        )


def from_files(path: Path, measuring: Path | None, seed: int) -> Prompts:
    """Prompts from a text file (one a line) or JSON lines with a ``prompt`` key.

    Without a file to measure on, up to half of the prompts are held out, by a hash of each; with one, it is split.

    Raises:
        ConfigError: lines that are empty, too long, or there twice; too few prompts; a prompt in both files.
    """
    prompts = read(path)
    if measuring is None:
        ranked = sorted(prompts, key=lambda prompt: hashlib.sha256(prompt.encode()).digest())
        held_out = ranked[: min(sum(MEASURED.values()), len(ranked) // 2)]
        kept = set(held_out)
        training = [prompt for prompt in prompts if prompt not in kept]
    else:
        held_out, training = read(measuring), prompts
        both = set(held_out) & set(training)
        if both:
            raise ConfigError(f"{measuring} and {path} share {len(both)} prompts, such as {min(both)!r}: they must not")
    if len(held_out) < 6:
        raise ConfigError(f"{len(held_out)} prompts to measure on: accepted are 6 or more (give 12 or more prompts)")
    sizes = [len(held_out) * part // sum(MEASURED.values()) for part in MEASURED.values()]
    first, second = max(2, sizes[0]), max(2, sizes[0]) + max(2, sizes[1])

    def train(step: int, num: int) -> list[str]:
        """Whole passes over all prompts, each in an order of its own."""
        places = range(step * num, (step + 1) * num)
        turns = {place // len(training) for place in places}
        orders = {turn: np.random.default_rng([seed, turn]).permutation(len(training)) for turn in turns}
        return [training[orders[place // len(training)][place % len(training)]] for place in places]

    return Prompts(train, held_out[:first], held_out[first:second], held_out[second:], of_file=True)


def read(path: Path) -> list[str]:
    """All prompts of a file, in order: line i (from 1) is prompt i - 1.

    Raises:
        ConfigError: no such file, or lines that cannot be used; they are named by their numbers.
    """
    if not path.is_file():
        raise ConfigError(f"prompts is {str(path)!r}: there is no such file")
    # Not splitlines(), which also splits at U+2028 and others that JSON allows inside a text.
    lines = path.read_bytes().removeprefix(BOM_UTF8).split(b"\n")
    if not lines[-1]:
        lines.pop()
    first: dict[str, int] = {}
    prompts: list[str] = []
    wrong: list[str] = []
    for i, line in enumerate(lines, 1):
        try:
            prompts.append(_prompt(line, path.suffix == ".jsonl", first, i))
        except ValueError as error:
            wrong.append(f"line {i} {error}")
    if wrong:
        raise ConfigError(f"{path} {_some(wrong)}: accepted is one prompt a line, each there once")
    return prompts


def _prompt(line: bytes, as_json: bool, first: dict[str, int], number: int) -> str:
    """The prompt of a line; ``first`` remembers where each was seen first. A ValueError says what the line is."""
    try:
        text = line.removesuffix(b"\r").decode("utf-8")
    except UnicodeDecodeError:
        raise ValueError("is not UTF-8") from None
    prompt = (_from_json(text) if as_json else text).strip()
    if not prompt:
        raise ValueError("is empty")
    if len(prompt) > LONGEST:
        raise ValueError(f"has {len(prompt)} characters, and up to {LONGEST} are accepted")
    if first.setdefault(prompt, number) != number:
        raise ValueError(f"is the same as line {first[prompt]}")
    return prompt


def _from_json(line: str) -> str:
    try:
        value = json.loads(line)["prompt"]
    except (json.JSONDecodeError, KeyError, TypeError):
        value = None
    if not isinstance(value, str):
        raise ValueError('is no JSON object with a text under "prompt"')
    return value


def _some(parts: Sequence[str]) -> str:
    """The first NAMED of them, and how many more there are."""
    more = len(parts) - NAMED
    return ", ".join(parts[:NAMED]) + (f" and {more} more" if more > 0 else "")


def cut_lines(model: Family, path: Path) -> str:
    """Which lines of a prompt file are longer than ``model`` reads, in words; empty where none is.

    A prompt is cut where one token more changes what was read: its last token gave way to the end's.
    """
    longer = copy.copy(model)
    longer.max_tokens = model.max_tokens + 1
    prompts, cut = read(path), []
    for at in range(0, len(prompts), 1000):
        part = prompts[at : at + 1000]
        for ids_BL, more_BL in zip(model.tokenise(part), longer.tokenise(part), strict=True):
            differs_B = (ids_BL != more_BL[:, : ids_BL.shape[1]]).any(1)
            cut += [at + i + 1 for i in differs_B.nonzero().flatten().tolist()]
    return f"line{'s' * (len(cut) > 1)} {_some([str(line) for line in cut])}" if cut else ""

"""The prompts of a run: what trains, and three sets that only measure. Nothing is in two of them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from training.config import ConfigError
from training.evaluate import JudgeFn

LONGEST = 2_000  # characters; text encoders cut a prompt long before
MEASURED = {"calibration": 128, "validation": 256, "test": 512}


@dataclass(frozen=True)
class Prompts:
    """``train(step, num)`` are one step's prompts; ``judge`` is an exact program that reads images, if there is one."""

    train: Callable[[int, int], list[str]]
    calibration: list[str]
    validation: list[str]
    test: list[str]
    known: list[str] | None = None  # every prompt that can come up, where they are finitely many
    judge: JudgeFn | None = None

    def first(self, num: int | None) -> Prompts:
        """The same with at most ``num`` validation and test prompts, for a short run."""
        return Prompts(self.train, self.calibration, self.validation[:num], self.test[:num], self.known, self.judge)


def from_files(path: Path, measuring: Path | None, seed: int) -> Prompts:
    """Prompts from a text file (one a line) or JSON lines with a ``prompt`` key.

    Without a file to measure on, up to half of the prompts are held out, by a hash of each; with one, it is split.

    Raises:
        ConfigError: a line that is empty, too long, or there twice; too few prompts; a prompt in both files.
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
        places = np.arange(step * num, (step + 1) * num)
        orders = {
            turn: np.random.default_rng([seed, turn]).permutation(len(training)) for turn in places // len(training)
        }
        return [training[orders[place // len(training)][place % len(training)]] for place in places]

    known = [*training, *held_out]
    return Prompts(train, held_out[:first], held_out[first:second], held_out[second:], known)


def read(path: Path) -> list[str]:
    """All prompts of a file, in order.

    Raises:
        ConfigError: no such file, or a line that cannot be used; its number is named.
    """
    if not path.is_file():
        raise ConfigError(f"prompts is {str(path)!r}: there is no such file")
    lines = path.read_text("utf-8").splitlines()
    prompts = [_prompt(line, f"{path} line {i}", path.suffix == ".jsonl") for i, line in enumerate(lines, 1)]
    _check(prompts, path)
    return prompts


def _prompt(line: str, where: str, as_json: bool) -> str:
    if not as_json:
        return line.strip()
    try:
        value = json.loads(line)["prompt"]
    except (json.JSONDecodeError, KeyError, TypeError):
        value = None
    if not isinstance(value, str):
        raise ConfigError(f'{where}: accepted is a JSON object with a text under "prompt"')
    return value.strip()


def _check(prompts: Sequence[str], path: Path) -> None:
    first: dict[str, int] = {}
    for i, prompt in enumerate(prompts, 1):
        if not prompt:
            raise ConfigError(f"{path} line {i} is empty: every line is a prompt")
        if len(prompt) > LONGEST:
            raise ConfigError(f"{path} line {i} has {len(prompt)} characters: accepted are up to {LONGEST}")
        if prompt in first:
            raise ConfigError(f"{path} line {i} is the same as line {first[prompt]}: every prompt is there once")
        first[prompt] = i

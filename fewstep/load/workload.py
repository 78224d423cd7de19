"""The requests of a load and their arrival times. Pure; one seed gives one load."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from fewstep.errors import WrongUse

Request = Mapping[str, Any]  # the body of POST /generate: a prompt and options
T = TypeVar("T")
AT = "at_s"


@dataclass(frozen=True)
class Arrival:
    """A request and when it is due, in seconds from the start of the load."""

    at_s: float
    request: Request


@dataclass(frozen=True)
class Choice(Generic[T]):
    """Values with the weights with which they are drawn."""

    values: Sequence[T]
    weights: Sequence[float]

    def draw(self, chance: random.Random) -> T:
        return chance.choices(self.values, self.weights)[0]


@dataclass(frozen=True)
class Mix:
    """Each field of a request is drawn independently from its choice; prompts take turns."""

    prompts: Sequence[str]
    fields: Mapping[str, Choice[Any]]

    def requests(self, seed: int) -> Iterator[Request]:
        """An endless sequence of requests."""
        chance = random.Random(seed)
        while True:
            for prompt in self.prompts:
                yield {"prompt": prompt, **{name: choice.draw(chance) for name, choice in self.fields.items()}}


def shares(texts: Sequence[str], read: type[int] | type[str]) -> Choice[Any]:
    """The choice that texts such as ``4`` or ``64x64:3`` describe; the number after the colon is the weight, else 1.

    Raises:
        WrongUse: one of them is not a value with a positive weight.
    """
    values, weights = [], []
    for text in texts:
        value, colon, weight = text.rpartition(":")
        value, weight = (value, weight) if colon else (text, "1")
        try:
            values.append(read(value))
            weights.append(float(weight))
        except ValueError:
            raise WrongUse(f"{text} is not a value, or a value and its weight, as in 4:3.") from None
        if not (value and 0 < weights[-1] < math.inf):
            raise WrongUse(f"{text} is not a value with a positive weight.")
    return Choice(values, weights)


def poisson(requests: Iterator[Request], rate: float, seconds: float, seed: int) -> list[Arrival]:
    """Arrivals of a Poisson process: ``rate`` per second on average, for ``seconds``."""
    chance, arrivals, at_s = random.Random(seed), [], 0.0
    while (at_s := at_s + chance.expovariate(rate)) < seconds:
        arrivals.append(Arrival(at_s, next(requests)))
    return arrivals


def read_trace(text: str, requests: Iterator[Request]) -> list[Arrival]:
    """Arrivals from JSON lines: ``{"at_s": 0.5, "prompt": "...", "n": 2}``. Fields that a line leaves out are drawn.

    Raises:
        WrongUse: a line is not an arrival, or the trace is empty.
    """
    arrivals = [_arrival(line, number, requests) for number, line in enumerate(text.splitlines(), 1) if line.strip()]
    if not arrivals:
        raise WrongUse("The trace has no requests.")
    return sorted(arrivals, key=lambda arrival: arrival.at_s)


def _arrival(line: str, number: int, requests: Iterator[Request]) -> Arrival:
    try:
        found = json.loads(line)
        at_s = float(found.pop(AT))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise WrongUse(f'Line {number} of the trace is not like {{"at_s": 0.5, "prompt": "..."}}.') from None
    if not 0 <= at_s < math.inf:
        raise WrongUse(f"Line {number} of the trace: at_s is {at_s:g}; it must be a number of seconds, 0 or more.")
    return Arrival(at_s, {**next(requests), **found})

"""Prompts that may train later students: which are kept, and what an export says of them.

In the queue's server they lie by key, so that a key's can be erased; an export joins them, and names no key.
"""

from __future__ import annotations

import hashlib
import json
import unicodedata
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol

DAY_MS = 86_400_000
Word = Literal["chosen", "rejected", "rerolled"]
WORDS: tuple[Word, ...] = ("chosen", "rejected", "rerolled")


class Configured(Protocol):
    """The service's settings, as far as they are about feedback."""

    @property
    def feedback_percentile(self) -> float: ...
    @property
    def feedback_max(self) -> int: ...
    @property
    def feedback_days(self) -> float: ...


@dataclass(frozen=True)
class FeedbackPolicy:
    """Which prompts are kept for training: those whose pictures rank below ``percentile`` (0: none), at most so many,
    of one key a tenth of them, for so many days."""

    percentile: float = 0.0
    most: int = 10_000
    days: float = 30.0

    @staticmethod
    def of(settings: Configured) -> FeedbackPolicy:
        """As it is configured."""
        return FeedbackPolicy(settings.feedback_percentile, settings.feedback_max, settings.feedback_days)

    @property
    def most_per_key(self) -> int:
        return max(1, self.most // 10)

    @property
    def kept_ms(self) -> int:
        return round(self.days * DAY_MS)


class Asked(Protocol):
    """What an entry tells of a job."""

    @property
    def prompt(self) -> str: ...
    @property
    def model(self) -> str: ...
    @property
    def version(self) -> str: ...
    @property
    def steps(self) -> int: ...


def entry_of(job: Asked, percentile: float) -> dict[str, Any]:
    """What is kept of a job: its prompt, what drew it, how low its pictures rank; nothing of who asked."""
    return {
        "prompt": job.prompt, "percentile": round(percentile, 1), "count": 1, "model": job.model,
        "version": job.version, "steps": job.steps,
    }  # fmt: skip


def prompt_digest(prompt: str) -> str:
    """The same for prompts that differ in case, accents' form or white space alone."""
    plain = " ".join(unicodedata.normalize("NFKC", prompt).casefold().split())
    return hashlib.sha256(plain.encode()).hexdigest()[:32]


def exported(rows: Mapping[str, str], key: str | None = None) -> list[dict[str, Any]]:
    """The prompts of all keys, or of one, each once, the lowest first; ``rows`` are entries by <key>|<digest>."""
    found: dict[str, dict[str, Any]] = {}
    for name, text in sorted(rows.items()):
        owner, _, digest = name.rpartition("|")
        if key is None or owner == key:
            entry = json.loads(text)
            found[digest] = _joined(found[digest], entry) if digest in found else entry
    return sorted(found.values(), key=lambda entry: (entry["percentile"], entry["prompt"]))


def _joined(one: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    lower = min(one, other, key=lambda entry: float(entry["percentile"]))
    sums = {name: int(one.get(name, 0)) + int(other.get(name, 0)) for name in ("count", *WORDS)}
    return {**lower, **{name: count for name, count in sums.items() if count or name == "count"}}


def lines(entries: Iterable[Mapping[str, Any]]) -> str:
    """JSON lines, as training reads them."""
    return "".join(f"{json.dumps(entry, ensure_ascii=False)}\n" for entry in entries)

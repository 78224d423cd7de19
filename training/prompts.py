"""The prompts of a run: a training set, and three disjoint sets for evaluation."""

from __future__ import annotations

import hashlib
import json
import unicodedata
from codecs import BOM_UTF8, BOM_UTF16_BE, BOM_UTF16_LE
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from training.config import ConfigError
from training.evaluate import JudgeFn

LONGEST = 2_000  # characters; text encoders cut a prompt long before
JSON_ENDINGS, TABLES = (".jsonl", ".ndjson", ".json"), (".csv", ".tsv", ".parquet", ".xlsx")
UNPRINTABLE, KEPT = ("Cc", "Cs", "Zl", "Zp"), "\t\x85\u2028\u2029"  # of control characters those that part words
MOST_COPIES = 10  # of a prompt in one pass, where its pictures rank lowest, by default
NAMED = 10  # lines that a message names
MEASURED = {"calibration": 128, "validation": 256, "test": 512}


@dataclass(frozen=True)
class Prompts:
    """``train(step, num)`` are one step's prompts; ``judge`` is the program that judges images, if there is one."""

    train: Callable[[int, int], list[str]]
    calibration: list[str]
    validation: list[str]
    test: list[str]
    of_file: bool = False  # then a run encodes its prompts before it begins, and drops the encoders
    judge: JudgeFn | None = None

    def first(self, calibration: int, validation: int, test: int) -> Prompts:
        """The same with at most this many prompts for each evaluation."""
        return replace(
            self,
            calibration=self.calibration[:calibration],
            validation=self.validation[:validation],
            test=self.test[:test],
        )


def from_files(path: Path, measuring: Path | None, seed: int, most: int = MOST_COPIES) -> Prompts:
    """Prompts from a text file (one a line), JSON lines with a ``prompt`` key, or a JSON list.

    Without a file to evaluate on, up to half of the prompts are held out, chosen by hash; with one, that file is split.
    Prompts that differ only in case, Unicode form or white space count as one, so that none is used for both training
    and evaluation. Where the prompts come from users (lines with a ``percentile``, see ``copies``), those that are
    evaluated on are left out of training.

    Raises:
        ConfigError: lines that cannot be used; too few prompts; a prompt in both files.
    """
    prompts = read(path)
    wanted_of = dict(zip(prompts, copies(path, most), strict=True))
    if measuring is None:
        ranked = sorted(prompts, key=lambda prompt: hashlib.sha256(same(prompt).encode()).digest())
        held_out = ranked[: min(sum(MEASURED.values()), len(ranked) // 2)]
        kept = set(map(same, held_out))
        training = [prompt for prompt in prompts if same(prompt) not in kept]
        wanted = f"{path} has {len(prompts)} prompts, and half of them are held out: accepted are 12 or more"
    else:
        held_out, training = read(measuring), prompts
        if max(wanted_of.values(), default=1) > 1:
            measured = set(map(same, held_out))
            training = [prompt for prompt in training if same(prompt) not in measured]
        known = set(map(same, training))
        if both := [prompt for prompt in held_out if same(prompt) in known]:
            raise ConfigError(
                f"{measuring} and {path} share {len(both)} prompts, such as {min(both)!r}: accepted are files without "
                "a common prompt"
            )
        wanted = f"{measuring} has {len(held_out)} prompts to evaluate on: accepted are 6 or more"
    held_out = list({same(prompt): prompt for prompt in reversed(held_out)}.values())[::-1]
    if len(held_out) < 6 or not training:
        raise ConfigError(wanted)
    sizes = [len(held_out) * part // sum(MEASURED.values()) for part in MEASURED.values()]
    first, second = max(2, sizes[0]), max(2, sizes[0]) + max(2, sizes[1])

    training = [prompt for prompt in training for _ in range(wanted_of[prompt])]

    def train(step: int, num: int) -> list[str]:
        """Whole passes over all prompts, each in its own order; low-ranking prompts occur several times in each."""
        places = range(step * num, (step + 1) * num)
        turns = {place // len(training) for place in places}
        orders = {turn: np.random.default_rng([seed, turn]).permutation(len(training)) for turn in turns}
        return [training[orders[place // len(training)][place % len(training)]] for place in places]

    return Prompts(train, held_out[:first], held_out[first:second], held_out[second:], of_file=True)


def copies(path: Path, most: int = MOST_COPIES) -> list[int]:
    """How often each prompt of a file that ``read`` accepts occurs in one pass: once, or more if its pictures rank low.

    ``fewstep feedback export`` writes the rank as ``percentile``: 100 means once, 0 means ``most`` times. The
    percentile of a prompt that was rejected or rerolled more often than chosen is halved.

    Raises:
        ConfigError: a percentile that is not a number from 0 to 100.
    """
    if path.suffix.lower() not in JSON_ENDINGS:
        return [1] * len(_lines(path.expanduser()))
    lines = _lines(path.expanduser())
    if b"".join(lines[:1]).lstrip().startswith(b"["):
        lines = _json_list(path, b"\n".join(lines))
    return [_copies(path, number, json.loads(line), most) for number, line in enumerate(lines, 1)]


def _copies(path: Path, number: int, row: dict[str, Any], most: int) -> int:
    percentile = row.get("percentile", 100.0)
    if not isinstance(percentile, int | float) or isinstance(percentile, bool) or not 0 <= percentile <= 100:
        raise ConfigError(f"{path} line {number} has the percentile {percentile!r}: accepted is a number from 0 to 100")
    if row.get("rejected", 0) + row.get("rerolled", 0) > row.get("chosen", 0):
        percentile /= 2
    return 1 + round((most - 1) * (1 - percentile / 100))


def same(prompt: str) -> str:
    """A normal form: prompts that differ only in case, Unicode form or white space share it."""
    return " ".join(unicodedata.normalize("NFKC", prompt).casefold().split())


def read(path: Path) -> list[str]:
    """All prompts of a file, in order: line i (from 1) is prompt i - 1.

    ``.txt`` (and any other ending) is one prompt per line; ``.jsonl``, ``.ndjson`` and ``.json`` are JSON lines with a
    ``prompt`` key, or one JSON list of strings or of such objects. UTF-8, or UTF-16 with a byte order mark.

    Raises:
        ConfigError: no such file, or lines that cannot be used; the message gives their numbers.
    """
    path = path.expanduser()
    if path.is_dir():
        raise ConfigError(f"data.prompts is {str(path)!r}, which is a folder: accepted is a file")
    if not path.is_file():
        raise ConfigError(f"data.prompts is {str(path)!r}: there is no such file")
    ending = path.suffix.lower()
    if ending in TABLES:
        raise ConfigError(f"data.prompts is {str(path)!r}, which is a table: accepted are .txt, .jsonl and .json files")
    lines = _lines(path)
    as_json = ending in JSON_ENDINGS
    if as_json and b"".join(lines[:1]).lstrip().startswith(b"["):
        lines, what = _json_list(path, b"\n".join(lines)), "entry"
    else:
        what = "line"
    first: dict[str, int] = {}
    prompts: list[str] = []
    wrong: list[str] = []
    for i, line in enumerate(lines, 1):
        try:
            prompts.append(_prompt(line, as_json, first, i))
        except ValueError as error:
            wrong.append(f"{what} {i} {error}")
    if wrong:
        raise ConfigError(f"{path} {_some(wrong)}: accepted is one prompt per line, each only once")
    return prompts


def _lines(path: Path) -> list[bytes]:
    """A file's lines as UTF-8, without line ends."""
    content = path.read_bytes()
    if content.startswith((BOM_UTF16_LE, BOM_UTF16_BE)):
        try:
            content = content.decode("utf-16").encode()
        except UnicodeError:
            raise ConfigError(f"{path} begins like UTF-16 but is not valid: accepted is UTF-8 or UTF-16") from None
    if b"\r" in content and b"\n" not in content:
        raise ConfigError(f"{path} ends its lines with carriage returns alone: accepted are line feeds")
    # Not splitlines(), which also splits at U+2028 and others that JSON allows inside a text.
    lines = content.removeprefix(BOM_UTF8).split(b"\n")
    return lines[:-1] if not lines[-1] else lines


def _json_list(path: Path, content: bytes) -> list[bytes]:
    """Each entry of a JSON list as a line."""
    try:
        found = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path} begins like a JSON list but is not valid JSON ({_first_line(error)})") from None
    return [json.dumps({"prompt": one} if isinstance(one, str) else one).encode() for one in found]


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _prompt(line: bytes, as_json: bool, first: dict[str, int], number: int) -> str:
    """The prompt of a line; ``first`` remembers where each was seen first. A ValueError says what the line is."""
    try:
        text = line.removesuffix(b"\r").decode("utf-8")
    except UnicodeDecodeError:
        raise ValueError("is not UTF-8") from None
    prompt = _bare(_from_json(text) if as_json else text)
    if not prompt:
        raise ValueError("is empty")
    if bad := next((one for one in prompt if unicodedata.category(one) in UNPRINTABLE and one not in KEPT), None):
        hint = " (is the file UTF-16 without a byte order mark?)" if bad == "\0" else ""
        raise ValueError(f"contains the character U+{ord(bad):04X}, which is not allowed in a prompt{hint}")
    if len(prompt) > LONGEST:
        raise ValueError(f"has {len(prompt)} characters, where up to {LONGEST} are accepted")
    if first.setdefault(prompt, number) != number:
        raise ValueError(f"is the same as line {first[prompt]}")
    return prompt


def _bare(text: str) -> str:
    """``text`` without byte order marks (of files that were joined) and without invisible characters at its ends."""
    text = text.replace("\ufeff", "")
    seen = [i for i, one in enumerate(text) if not one.isspace() and unicodedata.category(one) != "Cf"]
    return text[seen[0] : seen[-1] + 1] if seen else ""


def _from_json(line: str) -> str:
    try:
        value = json.loads(line)["prompt"]
    except (json.JSONDecodeError, KeyError, TypeError, RecursionError):
        value = None
    if not isinstance(value, str):
        raise ValueError('is not a JSON object with a string under "prompt"')
    return value


def _some(parts: Sequence[str]) -> str:
    """The first NAMED of them, and how many more there are."""
    more = len(parts) - NAMED
    return ", ".join(parts[:NAMED]) + (f" and {more} more" if more > 0 else "")


def cut_lines(cuts: Callable[[Sequence[str]], Sequence[bool]], path: Path) -> str:
    """Which lines of a prompt file ``cuts`` says are not read to their end, in words; empty if there are none."""
    prompts, cut = read(path), []
    for at in range(0, len(prompts), 1000):
        cut += [at + i for i, is_cut in enumerate(cuts(prompts[at : at + 1000]), 1) if is_cut]
    return f"line{'s' * (len(cut) > 1)} {_some([str(line) for line in cut])}" if cut else ""

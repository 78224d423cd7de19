"""A run's directory belongs to one configuration: it is new, or it is gone on with."""

from __future__ import annotations

import json
from pathlib import Path

CONFIG = "config.json"
FINISHED = "finished"


class RunDirError(ValueError):
    """The directory holds something else; the message is one sentence."""


class RunDiverged(RuntimeError):
    """The loss was not finite many steps in a row; the message is one sentence."""


def claim(path: Path, config_json: str, owner: Path | None = None) -> None:
    """Make ``path`` the directory of the run with this configuration, or accept it as that.

    Where the run's files lie inside the directory that it writes to, ``owner`` is the latter.

    Raises:
        RunDirError: it holds files of something else, or of a run with another configuration.
    """
    refuse_others(path, config_json, owner)
    path.mkdir(parents=True, exist_ok=True)
    (path / CONFIG).write_text(config_json + "\n")


def refuse_others(path: Path, config_json: str, owner: Path | None = None) -> None:
    """What ``claim`` refuses, without writing anything."""
    kept = path / CONFIG
    if kept.is_file():
        before = json.loads(kept.read_text())
        now = json.loads(config_json)
        if before != now:
            keys = ", ".join(sorted(_differing(before, now)))
            raise RunDirError(f"{owner or path} holds a run with another configuration ({keys}): choose another --out")
        return
    place = owner or path
    if place.exists() and (not place.is_dir() or any(place.iterdir())):
        raise RunDirError(f"{place} already holds something that is not an unfinished run: choose another --out")


def _differing(before: dict[str, object], now: dict[str, object]) -> set[str]:
    return {key for key in before.keys() | now.keys() if before.get(key) != now.get(key)}

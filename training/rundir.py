"""A run's directory belongs to one configuration: it is new, or its run is resumed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from training.config import to_json

if TYPE_CHECKING:
    from training.processes import Processes

CONFIG = "config.json"
FINISHED = "finished"
# What the student is called, and where its figures go, does not change how it is trained.
BESIDE = ("student.id", "student.version", "tracker")
LENGTH = "steps"  # a run may be made longer until it is finished
AS_LONG = (LENGTH, "teacher.guided_steps")  # the latter where it lasts to the end


class RunDirError(ValueError):
    """The directory belongs to something else; the message is one sentence."""


class RunStopped(RuntimeError):
    """The run was asked to stop and can be resumed; the message is one sentence."""


class RunDiverged(RuntimeError):
    """The loss was not finite for many steps in a row; the message is one sentence."""


def claim(path: Path, config: Any, owner: Path | None = None) -> None:
    """Make ``path`` the directory of the run with this configuration, or accept it if it already is.

    Until a run is finished its student may be given another name, and the run more steps; a setting that an earlier
    release did not have yet counts as its default. Where the run's files lie inside the directory that it writes to,
    ``owner`` is the latter.

    Raises:
        RunDirError: it holds other files, or a run with another configuration.
    """
    refuse_others(path, config, owner)
    path.mkdir(parents=True, exist_ok=True)
    part = path / f"{CONFIG}.part"
    part.write_text(to_json(config) + "\n")
    part.replace(path / CONFIG)


def claim_together(processes: Processes, path: Path, config: Any, owner: Path | None = None) -> None:
    """``claim`` in the first process; the others wait, since a half-made directory looks like another run's.

    Raises:
        RunDirError: see ``claim``.
    """
    if processes.is_first:
        claim(path, config, owner)
    processes.wait()


def refuse_others(path: Path, config: Any, owner: Path | None = None) -> None:
    """Refuse what ``claim`` refuses, without writing anything."""
    kept = path / CONFIG
    if kept.is_file():
        before, now = settings_in(kept.read_text(), config), settings_in(to_json(config), config)
        differing = {key for key in before.keys() | now.keys() if before.get(key) != now.get(key)}
        finished, longer = (path / FINISHED).exists(), _longer(before, now)
        if not finished:
            differing -= {*BESIDE, *longer}
        if finished and differing and differing == longer:
            raise RunDirError(
                f"{owner or path} has a finished run of {before[LENGTH]} steps: to continue from it, use "
                f"--init {owner or path} and another --out"
            )
        if differing:
            keys = ", ".join(sorted(differing))
            raise RunDirError(f"{owner or path} holds a run with another configuration ({keys}): choose another --out")
        return
    place = owner or path
    if place.exists() and (not place.is_dir() or any(place.iterdir())):
        raise RunDirError(f"{place} already holds something that is not an unfinished run: choose another --out")


def settings_in(text: str, config: Any) -> dict[str, Any]:
    """What a run was configured to be, from its JSON, by dotted keys.

    What its release did not know yet has the default of ``config``'s class.
    """
    default = json.loads(to_json(type(config)()))
    return {**dict(_flat(default)), **dict(_flat(json.loads(text)))}


def _longer(before: dict[str, Any], now: dict[str, Any]) -> set[str]:
    """What changes where a run is made longer: its length, and what lasts as long as it does."""
    if now.get(LENGTH, 0) <= before.get(LENGTH, 0):
        return set()
    return {key for key in AS_LONG if before.get(key) == before[LENGTH] and now.get(key) == now[LENGTH]}


def _flat(config: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every value of a nested configuration by its dotted key."""
    for key, value in config.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value

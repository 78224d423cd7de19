"""Frozen configurations, changed from the command line by ``--set key=value``."""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, fields, is_dataclass, replace
from typing import Any, TypeVar

C = TypeVar("C")
NAMES = {bool: "true or false", int: "an integer", float: "a number", tuple: "a list"}  # of types, in messages


class ConfigError(ValueError):
    """A setting that does not exist or has an unusable value; the message is one sentence."""


def with_settings(config: C, settings: Sequence[str]) -> C:
    """``config`` with every ``key=value`` applied at once; ``a.b=value`` reaches into a group.

    A configuration's own checks run once all of them are in place. Its class may list renamed settings in a ``MOVED``
    table (old key to new key).

    Raises:
        ConfigError: an unknown key (the message names the nearest known one), a value of the wrong type, or a value
            that the configuration itself refuses.
    """
    values: dict[str, Any] = {}
    for setting in settings:
        key, equals, text = (part.strip() for part in setting.partition("="))
        if not equals:
            raise ConfigError(f"--set {setting}: accepted is key=value")
        values[key] = _read(text, _current(config, key), key)
    return changed(config, values)


def changed(config: C, values: Mapping[str, Any]) -> C:
    """``config`` with typed values by dotted key: ``changed(config, {"optim.lr": 1e-4, "steps": 200})``.

    Raises:
        ConfigError: an unknown key, or a value that the configuration itself refuses.
    """
    top: dict[str, Any] = {}
    groups: dict[str, dict[str, Any]] = {}
    for key, value in values.items():
        _current(config, key)
        head, _, rest = key.partition(".")
        if rest:
            groups.setdefault(head, {})[rest] = value
        else:
            top[head] = value
    inner = {head: changed(getattr(config, head), part) for head, part in groups.items()}
    return replace(config, **top, **inner)  # type: ignore[type-var]


def leaves(config: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every setting as a pair of dotted key and value."""
    for field in fields(config):
        value = getattr(config, field.name)
        if is_dataclass(value):
            yield from leaves(value, f"{prefix}{field.name}.")
        else:
            yield f"{prefix}{field.name}", value


def to_json(config: Any) -> str:
    """The resolved configuration, readable and comparable."""
    return json.dumps(asdict(config), indent=2)


def _current(config: Any, key: str) -> Any:
    """The value under a dotted key."""
    known = dict(leaves(config))
    if key in known:
        return known[key]
    if new := getattr(config, "MOVED", {}).get(key):
        raise ConfigError(f"setting {key!r} is now called {new!r}")
    if inner := [name for name in known if name.startswith(f"{key}.")]:
        raise ConfigError(f"setting {key!r} is a group: set one of {', '.join(inner)}")
    if key.partition(".")[0] in known:
        raise ConfigError(f"unknown setting {key!r}: {key.partition('.')[0]!r} is a single setting, not a group")
    raise ConfigError(f"unknown setting {key!r}{_hint(key, list(known))}")


def _hint(key: str, known: Sequence[str]) -> str:
    last = {name.rpartition(".")[2]: name for name in reversed(known)}
    near = difflib.get_close_matches(key, [*known, *last], 1, 0.6)
    return f": did you mean {last.get(near[0], near[0])!r}?" if near else f": accepted are {', '.join(sorted(known))}"


def _read(text: str, old: Any, key: str) -> Any:
    """``text`` as a value of the type of ``old``."""
    if isinstance(old, str):
        return text
    try:
        value = json.loads(text)
    except json.JSONDecodeError:
        value = text
    if isinstance(old, tuple) and not isinstance(value, list):
        value = [value]
    if isinstance(old, bool) is isinstance(value, bool):
        if isinstance(old, float) and isinstance(value, int | float):
            return float(value)
        if isinstance(value, type(old)) and not isinstance(old, tuple):
            return value
        if isinstance(old, tuple) and all(type(part) is type(old[0]) for part in value):
            return tuple(value)
    raise ConfigError(f"setting {key!r} is {text!r}: accepted is {NAMES[type(old)]}, for example {json.dumps(old)}")


def check(holds: bool, sentence: str) -> None:
    """Raise ConfigError with ``sentence`` unless it ``holds``; the checks below name the settings of a group."""
    if not holds:
        raise ConfigError(sentence)


def _each(group: str, config: Any, names: tuple[str, ...]) -> list[tuple[str, Any]]:
    return [(f"{group}.{name}" if group else name, getattr(config, name)) for name in names]


def finite(group: str, config: Any, *names: str) -> None:
    """Finite numbers."""
    for name, value in _each(group, config, names):
        check(math.isfinite(value), f"{name} is {value}: accepted is a finite number")


def at_least(least: int, group: str, config: Any, *names: str) -> None:
    """Values of ``least`` or more."""
    for name, value in _each(group, config, names):
        check(value >= least, f"{name} is {value}: accepted is {least} or more")


def above_0(group: str, config: Any, *names: str) -> None:
    """Values of more than 0."""
    for name, value in _each(group, config, names):
        check(value > 0, f"{name} is {value}: accepted is more than 0")


def share(group: str, config: Any, *names: str) -> None:
    """Values of 0 to 1."""
    for name, value in _each(group, config, names):
        check(0 <= value <= 1, f"{name} is {value}: accepted is 0 to 1")


def one_of(known: tuple[str, ...], group: str, config: Any, *names: str) -> None:
    """Words of ``known``."""
    for name, value in _each(group, config, names):
        check(value in known, f"{name} is {value!r}: accepted are {', '.join(known)}")

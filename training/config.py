"""Frozen configurations, changed from the command line by ``--set key=value``."""

from __future__ import annotations

import difflib
import json
from collections.abc import Sequence
from dataclasses import asdict, fields, is_dataclass, replace
from typing import Any, TypeVar

C = TypeVar("C")


class ConfigError(ValueError):
    """A setting that does not exist or cannot be read; the message is one sentence."""


def with_settings(config: C, settings: Sequence[str]) -> C:
    """``config`` with each ``key=value`` applied; ``a.b=value`` reaches into a nested configuration.

    Raises:
        ConfigError: an unknown key (the nearest known one is named) or a value of another type.
    """
    for setting in settings:
        key, equals, text = setting.partition("=")
        if not equals:
            raise ConfigError(f"--set {setting}: accepted is key=value")
        config = _assign(config, key.strip(), text.strip(), key.strip())
    return config


def _assign(config: C, key: str, text: str, full: str) -> C:
    head, _, rest = key.partition(".")
    known = [f.name for f in fields(config)]  # type: ignore[arg-type]
    if head not in known:
        near = difflib.get_close_matches(head, known, 1, 0.5)
        hint = f": did you mean {near[0]!r}?" if near else f": known are {', '.join(sorted(known))}"
        raise ConfigError(f"unknown setting {full!r}{hint}")
    old = getattr(config, head)
    if is_dataclass(old):
        if not rest:
            inner = ", ".join(f"{head}.{f.name}" for f in fields(old))
            raise ConfigError(f"setting {full!r} is a group: set one of {inner}")
        return replace(config, **{head: _assign(old, rest, text, full)})  # type: ignore[type-var]
    if rest:
        raise ConfigError(f"setting {full!r}: {head!r} has no parts")
    return replace(config, **{head: _read(text, old, full)})  # type: ignore[type-var]


def _read(text: str, old: Any, key: str) -> Any:
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
    raise ConfigError(f"setting {key!r} is {text!r}: accepted is a {type(old).__name__} such as {json.dumps(old)}")


def to_json(config: Any) -> str:
    """The resolved configuration, readable and comparable."""
    return json.dumps(asdict(config), indent=2)

"""The result that a worker reports for a job, as it is stored in the queue.

It is read tolerantly, since the worker may be of another release: missing fields have defaults, unknown ones are left
out, and one of a wrong type counts as missing. So readers of a result see this form only.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

RESULT_VERSION = 1  # for people and later releases; nothing depends on it so far

UNREADABLE = {"code": "generation_failed", "message": "The worker's answer cannot be read."}


def write_result(result: Mapping[str, Any]) -> str:
    """A result as it is stored."""
    return json.dumps({"version": RESULT_VERSION, **result})


def read_result(text: str | None, done: bool = False) -> Mapping[str, Any]:
    """A result in this release's form; empty if there is none, unless the job is ``done``: then it cannot be read.

    ``error`` is there only if the job has failed; ``images``, ``timings``, ``calls``, ``runtime`` and ``batch_size``
    always are.
    """
    if not text and not done:
        return {}
    try:
        said = json.loads(text or "")
    except ValueError:
        said = None
    if not isinstance(said, dict):
        return {**_drawn({}), "error": UNREADABLE}
    if "error" not in said:
        return _drawn(said)
    error = _mapping(said["error"])
    known = {name: _typed(error, name, str, UNREADABLE[name]) for name in UNREADABLE}
    return {**_drawn(said), "error": {**error, **known}}


def with_scores(result: Mapping[str, Any], text: str | None) -> Mapping[str, Any]:
    """A result and the scores that have come later, if they have."""
    if not text or not result:
        return result
    try:
        said = _mapping(json.loads(text))
    except ValueError:
        return result
    scores = _list(said.get("images"))
    images = [{**image, **_scores(scores[k] if k < len(scores) else {})} for k, image in enumerate(result["images"])]
    score_s = _numbers(said).get("score_s", 0.0)
    return {**result, "images": images, "timings": {**result["timings"], "score_s": score_s}}


def _scores(said: Mapping[str, Any]) -> dict[str, Any]:
    return _judged({"reward_percentile": {}, **said})


def _drawn(said: Mapping[str, Any]) -> dict[str, Any]:
    timings = {"queue_s": 0.0, "inference_s": 0.0, "score_s": 0.0, "encode_s": 0.0}
    return {
        "version": _typed(said, "version", int, 0),
        "runtime": _typed(said, "runtime", str, ""),
        "batch_size": _typed(said, "batch_size", int, 1),
        "images": [_image(entry) for entry in _list(said.get("images"))],
        "timings": {**timings, **_numbers(said.get("timings"))},
        "calls": [_call(entry) for entry in _list(said.get("calls"))],
        "scoring": _typed(said, "scoring", str, ""),
        **({"floor": said["floor"]} if isinstance(said.get("floor"), dict) else {}),
    }


def _image(entry: Mapping[str, Any]) -> dict[str, Any]:
    """An image without a ``file`` is one whose bytes are missing."""
    about: dict[str, Any] = {
        name: _typed(entry, name, kind, default)
        for name, kind, default in (
            ("file", str, ""), ("seed", int, 0), ("width", int, 0), ("height", int, 0), ("sha256", str, ""),
        )
    }  # fmt: skip
    return {**_judged(entry), **about}


def _judged(entry: Mapping[str, Any]) -> dict[str, Any]:
    """What is said of a picture, or of a candidate for one, with scores that are numbers."""
    said = {**entry, "reward": _numbers(entry.get("reward"))}
    if "reward_percentile" in entry:
        said["reward_percentile"] = _numbers(entry["reward_percentile"])
    if "reward_failed" in entry:
        failed = entry["reward_failed"]
        said["reward_failed"] = [name for name in failed if isinstance(name, str)] if isinstance(failed, list) else []
    if "candidates" in entry:
        said["candidates"] = [_judged(one) for one in _list(entry["candidates"])]
    return said


def _call(entry: Mapping[str, Any]) -> dict[str, Any]:
    numbers = _numbers(entry)
    return {
        "images": int(numbers.get("images", 1)),
        "inference_s": float(numbers.get("inference_s", 0.0)),
        "splits": int(numbers.get("splits", 0)),
    }


def _typed(said: Mapping[str, Any], name: str, kind: type, default: Any) -> Any:
    value = said.get(name)
    return value if isinstance(value, kind) and not isinstance(value, bool) else default


def _mapping(value: object) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _list(value: object) -> list[dict[str, Any]]:
    return [_mapping(entry) for entry in value] if isinstance(value, list) else []


def _numbers(value: object) -> dict[str, float]:
    return {
        name: number
        for name, number in _mapping(value).items()
        if isinstance(number, int | float) and not isinstance(number, bool) and math.isfinite(number)
    }

"""What documents take from the code, between two comments of theirs: ``python -m tests.documents.generated`` writes it.

A test holds the documents to it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

from benchmarks import run_calls, step_counts
from benchmarks.memory_figures import read, table
from service.errors import CODES
from service.queue.states import diagram
from service.settings import PREFIX, Settings
from tests.documents.blocks import ROOT


def settings() -> str:
    """The table of the service's settings."""
    rows = [
        f"| `{PREFIX}{name.upper()}` | {_default(name)} | {field.description} |"
        for name, field in Settings.model_fields.items()
    ]
    return "\n".join(["| variable | default | meaning |", "| --- | --- | --- |", *rows])


def _default(name: str) -> str:
    field = Settings.model_fields[name]
    if field.default_factory is not None:
        return "the user's data directory"
    if isinstance(field.default, Path):
        return f"`{field.default.relative_to(ROOT)}`"
    if field.default in (None, ()):
        return ""
    shown = json.dumps(field.default).strip('"').removesuffix(".0")
    return f"`{shown}`"


def errors() -> str:
    """The table of the API's error codes."""
    rows = [f"| {status} | `{code}` | {meaning} |" for code, (status, meaning) in CODES.items()]
    return "\n".join(["| status | code | what it means or what to do |", "| --- | --- | --- |", *rows])


def memory() -> str:
    """The table of what a training step holds (benchmarks/train_memory.py)."""
    return table(read())


def calls() -> str:
    """The table of how often a run calls its transformer (benchmarks/run_calls.py)."""
    return run_calls.table()


def step() -> str:
    """The table of what one optimizer step calls (benchmarks/step_counts.py)."""
    return step_counts.table()


def states() -> str:
    """The diagram of a job's states."""
    return f"```mermaid\n{diagram()}\n```"


PARTS: dict[tuple[str, str], Callable[[], str]] = {
    ("docs/operate.md", "settings"): settings,
    ("docs/api.md", "errors"): errors,
    ("docs/cost.md", "memory"): memory,
    ("docs/cost.md", "calls"): calls,
    ("docs/cost.md", "step"): step,
    ("docs/reliability.md", "states"): states,
}


def written(text: str, name: str, part: str) -> str:
    """A document's text with ``part`` between the comments ``name: begin`` and ``name: end``."""
    pattern = rf"(<!-- {name}: begin -->\n).*?(<!-- {name}: end -->)"
    found, count = re.subn(pattern, lambda match: f"{match[1]}{part}\n{match[2]}", text, flags=re.DOTALL)
    assert count == 1, f"<!-- {name}: begin --> stands {count} times"
    return found


if __name__ == "__main__":
    for (file, name), part in PARTS.items():
        path = ROOT / file
        path.write_text(written(path.read_text("utf-8"), name, part()), "utf-8")

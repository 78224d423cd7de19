"""The queue's transitions: one short Lua script each, run by its hash, so that old and new versions can coexist."""

from __future__ import annotations

from functools import cache
from pathlib import Path

FOLDER = Path(__file__).parent / "lua"
# A script without the flag is refused by a server that is out of memory. Only taking on new work may be:
# finishing must work, or the workers would draw pictures that they cannot hand in.
REFUSED_WITHOUT_MEMORY = {"enqueue"}


@cache
def source(name: str) -> str:
    """The complete text of a script: flags, common functions, body."""
    header = "#!lua" if name in REFUSED_WITHOUT_MEMORY else "#!lua flags=allow-oom"
    return "\n".join([header, (FOLDER / "_common.lua").read_text("utf-8"), (FOLDER / f"{name}.lua").read_text("utf-8")])


def prefix(queue: str) -> str:
    """What all keys of a queue begin with; the braces keep them in one slot of a cluster."""
    return f"fewstep:{{{queue}}}:"

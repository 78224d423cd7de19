"""The queue's transitions: one short Lua script each, run by its hash, so that old and new versions can coexist."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import redis
import redis.asyncio

FOLDER = Path(__file__).parent / "lua"
# A server that is out of memory refuses scripts without the flag. Only accepting new work may be refused:
# finishing must work, or workers would generate images that they cannot deliver.
REFUSED_WITHOUT_MEMORY = {"enqueue"}


@cache
def source(name: str) -> str:
    """The complete text of a script: flags, common functions, body."""
    header = "#!lua" if name in REFUSED_WITHOUT_MEMORY else "#!lua flags=allow-oom"
    return "\n".join([header, (FOLDER / "_common.lua").read_text("utf-8"), (FOLDER / f"{name}.lua").read_text("utf-8")])


def prefix(queue: str) -> str:
    """The prefix of all Redis keys of a queue; the braces keep them in one slot of a cluster."""
    return f"fewstep:{{{queue}}}:"


class Scripts:
    """The scripts of one queue, each loaded when it is first run.

    With a synchronous client ``run`` returns the script's answer, with an asyncio client an awaitable of it.
    """

    def __init__(self, client: redis.Redis | redis.asyncio.Redis, queue: str) -> None:
        self.prefix = prefix(queue)
        self._client = client
        self._loaded: dict[str, Any] = {}

    def run(self, name: str, *args: str | int, pipeline: redis.asyncio.client.Pipeline | None = None) -> Any:
        """Run the script ``name``; in a ``pipeline``, its answer is among that of the pipeline."""
        if name not in self._loaded:
            self._loaded[name] = self._client.register_script(source(name))
        return self._loaded[name](keys=[self.prefix], args=list(args), client=pipeline)

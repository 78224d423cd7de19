"""The clients' pauses, noted and not slept. The rest of the process sleeps as ever: threads of earlier tests, too."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import pytest


def instead_of_sleep(monkeypatch: pytest.MonkeyPatch, noted: Callable[[float], None]) -> None:
    async def sleep(seconds: float) -> None:
        noted(seconds)

    monkeypatch.setattr("fewstep.client.time", SimpleNamespace(sleep=noted))
    monkeypatch.setattr("fewstep.async_client.asyncio", SimpleNamespace(sleep=sleep))

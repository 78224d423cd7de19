"""Tasks end, whatever they do with their cancellation."""

from __future__ import annotations

import asyncio

import pytest

from service.http import tasks as module


@pytest.mark.parametrize("swallows", [0, 1, 3])
def test_a_task_that_swallows_its_end_is_asked_until_it_ends(swallows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CANCEL_AGAIN_S", 0.001)
    asked = 0

    async def stubborn() -> None:
        nonlocal asked
        while True:
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                asked += 1
                if asked > swallows:
                    raise

    async def broken() -> None:
        raise ZeroDivisionError

    async def run() -> bool:
        running = [
            asyncio.create_task(stubborn()),
            asyncio.create_task(broken()),
            asyncio.create_task(asyncio.sleep(0)),
        ]
        await asyncio.sleep(0.01)
        async with asyncio.timeout(20):
            await module.end(running)
            await module.end([])
        assert isinstance(running[1].exception(), ZeroDivisionError), "it has ended before, and is not raised here"
        return running[0].cancelled() and not running[2].cancelled()

    assert asyncio.run(run()) and asked == swallows + 1

"""What an API process does beside answering: that it is done at all, and that news wake whoever waits."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any, cast

from service.http.services import Services, background
from service.observe.background import Background
from service.queue.replies import Replies
from tests.service.support import Queue


def test_lost_jobs_are_looked_for_old_images_swept_and_models_followed(runner: asyncio.Runner) -> None:
    done: dict[str, asyncio.Event] = {
        name: asyncio.Event() for name in ("reap", "sweep", "models", "replies", "streams")
    }

    async def note(name: str) -> int:
        done[name].set()
        await asyncio.sleep(0)
        return 0

    async def forever(name: str) -> None:
        await note(name)
        await asyncio.Event().wait()

    async def take_turn(name: str, lasting_s: float) -> bool:
        return True

    async def all_of_it() -> tuple[float, int]:
        swept: list[tuple[float, int]] = []
        loop = asyncio.get_running_loop()

        def sweep(ttl_s: float, quota_bytes: int) -> None:
            swept.append((ttl_s, quota_bytes))
            loop.call_soon_threadsafe(done["sweep"].set)

        services = SimpleNamespace(
            replies=SimpleNamespace(read=lambda: forever("replies")),
            models=SimpleNamespace(poll=lambda: forever("models")),
            streams=SimpleNamespace(renew=lambda: forever("streams")),
            producer=SimpleNamespace(reap=lambda: note("reap"), take_turn=take_turn),
            results=SimpleNamespace(sweep=sweep),
            background=Background(),
            settings=SimpleNamespace(result_ttl_s=77.0, results_quota_mb=3, sweep_s=60.0),
        )
        async with background(cast(Services, services)), asyncio.timeout(30):
            await asyncio.gather(*(event.wait() for event in done.values()))
        return swept[0]

    assert runner.run(all_of_it()) == (77.0, 3 * 2**20)


def test_whoever_waits_for_a_job_is_woken_by_its_end(queue: Queue) -> None:
    """By the notice, not by looking now and then: nothing else puts anything into ``news``."""
    seen: list[Any] = []

    async def woken() -> Any:
        replies = Replies(queue.async_client, queue.producer, queue.model, "api", seen.append)
        reader = asyncio.create_task(Background().forever("replies", replies.read))
        try:
            with replies.news(id) as news:
                await asyncio.to_thread(queue_draw)
                async with asyncio.timeout(30):
                    return await news.get()
        finally:
            reader.cancel()

    def queue_draw() -> None:
        worker = queue.consumer("w")
        for claimed in worker.claim({queue.lane: 1}):
            worker.finish(claimed.id, claimed.token, "done", {"images": [], "runtime": "fake"})

    id = queue.add()
    record = queue.runner.run(woken())
    assert record.id == id and record.terminal and [each.id for each in seen] == [id]

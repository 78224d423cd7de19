"""A TCP proxy before the queue's server that can lose answers, delay, go silent, or lead to another server."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine
from pathlib import Path
from typing import Any


class Proxy:
    """Runs in a thread of its own. ``delay_s``, ``silent`` and ``target`` may be changed at any time."""

    def __init__(self, target: Path) -> None:
        self.target = target
        self.delay_s = 0.0
        self.silent = False
        self.lost = 0
        self._armed: dict[bytes, int] = {}
        self._writers: set[asyncio.StreamWriter] = set()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self._server: asyncio.Server = self._run(asyncio.start_server(self._serve, "127.0.0.1", 0))
        self.url = f"redis://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    def lose_answers(self, word: bytes, count: int) -> None:
        """The next ``count`` calls that contain ``word`` are carried out, but their answers are lost."""
        self._armed[word] = count

    def cut(self) -> None:
        """Break every connection."""
        self._run(self._cut())

    def close(self) -> None:
        self._server.close()
        self.cut()
        self._run(self._finish())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _run(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(30)

    async def _cut(self) -> None:
        for writer in list(self._writers):
            writer.transport.abort()

    async def _finish(self) -> None:
        tasks = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            there, out = await asyncio.open_unix_connection(self.target)
        except OSError:
            writer.transport.abort()
            return
        self._writers |= {writer, out}
        doomed = asyncio.Event()
        try:
            await asyncio.gather(self._requests(reader, out, doomed), self._answers(there, writer, doomed))
        except OSError:
            pass
        finally:
            for end in (writer, out):
                end.transport.abort()
                self._writers.discard(end)

    async def _requests(self, reader: asyncio.StreamReader, out: asyncio.StreamWriter, doomed: asyncio.Event) -> None:
        while data := await reader.read(65536):
            await self._hold()
            for word, count in self._armed.items():
                if count > 0 and word in data:
                    self._armed[word] = count - 1
                    self.lost += 1
                    doomed.set()
            out.write(data)
            await out.drain()
        out.transport.abort()

    async def _answers(self, there: asyncio.StreamReader, writer: asyncio.StreamWriter, doomed: asyncio.Event) -> None:
        while data := await there.read(65536):
            if doomed.is_set():
                break
            await self._hold()
            writer.write(data)
            await writer.drain()
        writer.transport.abort()

    async def _hold(self) -> None:
        await asyncio.sleep(self.delay_s)
        while self.silent:
            await asyncio.sleep(0.02)

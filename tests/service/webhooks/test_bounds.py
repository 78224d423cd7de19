"""A receiver cannot hold a sender up, nor make it read or send more than once."""

from __future__ import annotations

import asyncio
import ssl
from urllib.parse import urlsplit

from service.webhooks import deliver
from service.webhooks.target import RESOLVE_S, Target


def test_a_delivery_is_nobody_elses_for_longer_than_one_try_takes() -> None:
    """Finding the address and sending are bounded; the answer's body is not read."""
    assert deliver.LEASE_S > RESOLVE_S + deliver.SEND_S


def test_an_answer_without_end_is_not_read() -> None:
    async def endless(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\n\r\n")
        try:
            while True:
                writer.write(b"x" * 65536)
                await writer.drain()
        except ConnectionError:
            pass
        finally:
            writer.close()

    async def status() -> int:
        async with await asyncio.start_server(endless, "127.0.0.1", 0) as server:
            port = server.sockets[0].getsockname()[1]
            target = Target(urlsplit(f"http://127.0.0.1:{port}/hook"), "127.0.0.1", port, "127.0.0.1")
            context = ssl.create_default_context()
            async with asyncio.timeout(10):  # never reached, unless the body is read
                return (await deliver.send(target, {}, b"{}", context)).status_code

    assert asyncio.run(status()) == 200

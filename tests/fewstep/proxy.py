"""A connection that breaks: a TCP proxy that cuts each connection after so many bytes of answer."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from urllib.parse import urlsplit


class Proxy:
    """``cuts[k]`` is how many bytes of answer connection k lets through; later connections are whole.

    The service is told of the end only after its first answer bytes have come, so that it has taken the request.
    """

    def __init__(self, url: str, cuts: Sequence[int]) -> None:
        parts = urlsplit(url)
        self._target = (str(parts.hostname), int(parts.port or 80))
        self._cuts = list(cuts)
        self.connections = 0
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self._threads = [threading.Thread(target=self._accept)]
        self._threads[0].start()

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:  # the first one, which adds to them, ends first
            thread.join()
        self._listener.close()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                near, _ = self._listener.accept()
                left = self._cuts.pop(0) if self._cuts else None
                self.connections += 1
                self._threads.append(threading.Thread(target=self._serve, args=(near, left)))
                self._threads[-1].start()

    def _serve(self, near: socket.socket, left: int | None) -> None:
        with near, socket.create_connection(self._target) as far:
            there = threading.Thread(target=_pump, args=(near, far, None))
            there.start()
            _pump(far, near, left)
            there.join()


def _pump(source: socket.socket, sink: socket.socket, left: int | None) -> None:
    """Copy until the end, or until ``left`` bytes were copied and one more has come; then close both."""
    with suppress(OSError):
        while data := source.recv(4096):
            sink.sendall(data if left is None else data[:left])
            if left is not None and (left := left - len(data)) < 0:
                break
    for end in (source, sink):
        with suppress(OSError):
            end.shutdown(socket.SHUT_RDWR)


@contextmanager
def breaking(url: str, *cuts: int) -> Iterator[Proxy]:
    proxy = Proxy(url, cuts)
    try:
        yield proxy
    finally:
        proxy.close()

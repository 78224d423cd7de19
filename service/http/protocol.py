"""HTTP/1.1 as this service reads it."""

from __future__ import annotations

import asyncio
import json
import re
import uuid
from typing import Any

from httptools import HttpParserError, HttpParserUpgrade, HttpRequestParser
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from service.errors import ServiceError, error_body

MAX_HEAD_BYTES = 32768
# A name or an address, and perhaps a port (RFC 9110, 7.2): it goes into the links of answers.
HOST = re.compile(rb"(\[[\w:.%~-]+\]|[\w.~!$&'()*+,;=%-]*)(:\d{0,5})?", re.ASCII)
LARGE_HEAD = f"The head of a request has at most {MAX_HEAD_BYTES} bytes."
WRONG_HOST = "A request has one Host header: a name or an address, and perhaps a port."


class BoundedHttp(HttpToolsProtocol):
    """uvicorn's HTTP/1.1, with bounds on the time that a client takes to send the head of a request, and on its size.

    httptools has neither: it keeps a header for as long, and as much of it, as a client sends.
    """

    head_timeout_s = 30.0
    _in_head = True
    _head_bytes = 0
    _head_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._await_head()

    def data_received(self, data: bytes) -> None:
        if self._in_head:
            self._head_bytes += len(data)
            self._await_head()  # also for bytes between requests, which begin no message
        self._unset_keepalive_if_required()
        try:
            self._read(data)
        except HttpParserError:
            self.send_400_response("This is not a request of HTTP/1.1.")
        if self._in_head and self._head_bytes > MAX_HEAD_BYTES:
            self._refuse_head(LARGE_HEAD)

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._await_head()

    def on_headers_complete(self) -> None:
        size = len(self.url) + sum(len(name) + len(value) for name, value in self.headers)
        if size > MAX_HEAD_BYTES:
            return self._refuse_head(LARGE_HEAD)
        if not self._names_one_host():
            return self._refuse_head(WRONG_HOST)
        self._head_arrived()
        if not self.parser.should_upgrade():
            super().on_headers_complete()

    def on_message_complete(self) -> None:
        if not self.parser.should_upgrade():
            super().on_message_complete()
            self._in_head, self._head_bytes = True, 0

    def _read(self, data: bytes) -> None:
        """A client that offers another protocol is answered in this one.

        The parser stops behind the head of such a request, and its body is never read: so the head is read again
        without the offer.
        """
        try:
            self.parser.feed_data(data)
        except HttpParserUpgrade as offer:
            if self.parser.get_method() == b"CONNECT":
                raise HttpParserError from offer
            kept = [(name, value) for name, value in self.headers if name not in (b"connection", b"upgrade")]
            lines = (b"%s: %s\r\n" % header for header in (*kept, (b"connection", b"close")))
            head = b"%s %s HTTP/1.1\r\n%s\r\n" % (self.parser.get_method(), self.url, b"".join(lines))
            self.parser = HttpRequestParser(self)
            self.parser.feed_data(head + data[offer.args[0] :])

    def connection_lost(self, exc: Exception | None) -> None:
        self._head_arrived()
        super().connection_lost(exc)

    def _await_head(self) -> None:
        if self._head_timer is None:
            self._head_timer = self.loop.call_later(self.head_timeout_s, self._head_is_late)

    def _head_is_late(self) -> None:
        self._head_timer = None
        if self.cycle is None or self.cycle.response_complete:
            return self.transport.close()
        self._await_head()  # the next request has begun to arrive before this one is answered

    def _head_arrived(self) -> None:
        self._in_head = False
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _names_one_host(self) -> bool:
        """As RFC 9112 (3.2) asks for; only HTTP/1.0 has requests without a Host header."""
        hosts = [value for name, value in self.headers if name == b"host"]
        if not hosts:
            return bool(self.parser.get_http_version() == "1.0")
        return len(hosts) == 1 and HOST.fullmatch(hosts[0].strip()) is not None

    def _refuse_head(self, message: str) -> None:
        if not self.transport.is_closing():
            self.send_400_response(message)

    def send_400_response(self, msg: str) -> None:
        """The refusal of what cannot be read as HTTP, in the form of every other error."""
        body = json.dumps(error_body(ServiceError(msg, code="bad_request"), uuid.uuid4().hex)).encode()
        head = "HTTP/1.1 400 Bad Request\r\nContent-Type: application/json\r\nConnection: close\r\n"
        self.transport.write(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        self.transport.close()


def bounded_protocol(timeout_s: float) -> type[BoundedHttp]:
    """The protocol in which a client has ``timeout_s`` for the head of a request."""

    class Bounded(BoundedHttp):
        head_timeout_s = timeout_s

    return Bounded

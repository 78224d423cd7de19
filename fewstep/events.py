"""A job's server-sent events across broken connections: no network here, only a clock."""

from __future__ import annotations

import time
from collections.abc import Callable

import httpx

from fewstep.answers import Event
from fewstep.errors import FewstepError, JobFailed, TooLate, Unreachable
from fewstep.protocol import Call, error_of, job_path, loads
from fewstep.retries import Retries

SILENCE_S = 60.0  # a stream says every 15 s that it is alive; one that says nothing for so long is broken
RENEWED_S = 1.0
ENDS = frozenset({"done", "error", "scored"})  # scored comes after done, for whoever asks for more
NO_CONTENT = 204


class Parser:
    """Parses a stream's lines into events (WHATWG HTML, 9.2.6): a blank line ends one; a cut-off one is dropped."""

    def __init__(self) -> None:
        self._name, self._number = "", ""
        self._data: list[str] = []

    def line(self, line: str) -> Event | None:
        """The event that this line (without its end) completes, if it does."""
        if line:
            self._field(line)
            return None
        event = None
        if self._data:
            number = int(self._number) if self._number.isdecimal() else None
            event = Event(name=self._name or "message", number=number, data=loads("\n".join(self._data)))
        self._name, self._number, self._data = "", "", []
        return event

    def _field(self, line: str) -> None:
        name, _, value = line.partition(":")
        value = value.removeprefix(" ")
        if name == "data":
            self._data.append(value)
        elif name == "event":
            self._name = value
        elif name == "id":
            self._number = value


class Following:
    """How far a job's events have been read, and what to do when the connection breaks.

    With ``within_s`` it raises ``TooLate`` that long after its start.
    """

    def __init__(
        self, id: str, retries: Retries, after: int | None = None, *, within_s: float | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:  # fmt: skip
        self._id = id
        self._path = job_path(id, "/events")
        self._clock = clock
        self._within_s = within_s
        self._end = None if within_s is None else clock() + within_s
        self._silence_s = SILENCE_S
        self._retries = retries
        self._last = after
        self._tried = 0
        self._parser = Parser()
        self.ended = False

    @property
    def call(self) -> Call:
        """The request that continues where the last one broke off.

        Raises:
            TooLate: there is no time left.
        """
        seen = {} if self._last is None else {"Last-Event-ID": str(self._last)}
        self._silence_s = min(SILENCE_S, self._left_s())
        return Call("GET", self._path, headers={"Accept": "text/event-stream", **seen}, patience_s=self._silence_s)

    @property
    def renew(self) -> bool:
        """Whether this connection could stay silent beyond the deadline, so that one with a shorter timeout is due."""
        return not self.ended and self._left_s() < self._silence_s - RENEWED_S

    def opened(self, response: httpx.Response) -> None:
        """Take note of a new response; the body of an error response has been read.

        Raises:
            FewstepError: it is an error.
        """
        self._parser = Parser()
        if (error := error_of(response)) is not None:
            raise error
        self.ended = response.status_code == NO_CONTENT

    def line(self, line: str) -> Event | None:
        """The event that a line of the stream completes, if it does.

        Raises:
            JobFailed: the job has ended without a picture.
        """
        event = self._parser.line(line)
        if event is None:
            return None
        self._tried = 0
        self._last = event.number if event.number is not None else self._last
        self.ended = event.name in ENDS
        if event.name == "error":
            error = event.data.get("error", {})
            raise JobFailed(str(error.get("message", "The job failed.")), error.get("code"))
        return event

    def closed(self) -> None:
        """Take note of the end of the stream.

        Raises:
            Unreachable: it ended before the job.
        """
        if not self.ended and not self.renew:
            raise Unreachable("The event stream ended before the job did.")

    def broken(self, error: FewstepError) -> float:
        """How long to wait before connecting again, in seconds.

        Raises:
            FewstepError: the error itself, if retrying is not worthwhile.
        """
        left_s = self._left_s()
        self._tried += 1
        pause_s = self._retries.pause_s(self._tried, error)
        if pause_s is None:
            raise error
        return min(pause_s, left_s)

    def _left_s(self) -> float:
        if self._end is None:
            return float("inf")
        if (left_s := self._end - self._clock()) <= 0:
            raise TooLate(f"Job {self._id} had not ended after {self._within_s:g} s.")
        return left_s

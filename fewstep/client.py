"""The synchronous client."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from types import TracebackType
from typing import Any, Self, Unpack

import httpx

from fewstep import protocol
from fewstep.answers import Answer, Event, Feedback, Job, Model, Status, Word
from fewstep.connection import connection
from fewstep.errors import FewstepError, JobFailed, Unreachable
from fewstep.events import Following
from fewstep.protocol import Call, Outcome, Pause, Steps, T
from fewstep.request import Options
from fewstep.retries import Retries

TIMEOUT_S = 120.0


class Client:
    """A service's client; it may be shared by threads.

    ``url`` and ``api_key`` default to FEWSTEP_URL and FEWSTEP_API_KEY. ``timeout_s`` is how long an answer may take
    (longer if a request's own ``timeout_s`` says so). Every method raises ``FewstepError``.
    """

    def __init__(
        self, url: str | None = None, api_key: str | None = None, *, timeout_s: float = TIMEOUT_S,
        retries: Retries | None = None, transport: httpx.BaseTransport | None = None,
    ) -> None:  # fmt: skip
        found = connection(url, api_key, timeout_s)
        self._retries = retries or Retries()
        self._http = found.open(httpx.Client, transport=transport)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def generate(self, prompt: str, *, idempotency_key: str | None = None, **options: Unpack[Options]) -> Answer:
        """Generate images and wait for them. A retried call never generates twice."""
        return self._run(protocol.generate(prompt, options, idempotency_key, self._retries))

    def submit(self, prompt: str, *, idempotency_key: str | None = None, **options: Unpack[Options]) -> Job:
        """Request images without waiting for them; see ``wait``, ``events`` and ``image``."""
        return self._run(protocol.submit(prompt, options, idempotency_key, self._retries))

    def stream(self, prompt: str, *, idempotency_key: str | None = None, **options: Unpack[Options]) -> Iterator[Event]:
        """Request images and watch: the events of the job, with previews of unfinished images if ``partial_images``
        is set."""
        yield from self.events(self.submit(prompt, idempotency_key=idempotency_key, **options).id)

    def job(self, id: str) -> Job:
        """A job as it is now."""
        return self._run(protocol.job(id, self._retries))

    def jobs(self, limit: int = 20, *, status: Sequence[Status] = (), everybody: bool = False) -> list[Job]:
        """Your own jobs that are still kept, newest first; with ``status``, only those in one of these states.

        With ``everybody``, those of all keys, which needs a key with the scope admin.
        """
        return self._run(protocol.jobs(limit, status, everybody, self._retries))

    def cancel(self, id: str) -> Job:
        """Cancel a job; repeating it does no harm, and a job that has ended stays as it is."""
        return self._run(protocol.cancel(id, self._retries))

    def feedback(self, id: str, word: Word, index: int = 0) -> Feedback:
        """Report what became of an image of a finished job: chosen, rejected or rerolled. The last report counts."""
        return self._run(protocol.feedback(id, word, index, self._retries))

    def wait(self, id: str, timeout_s: float | None = None) -> Job:
        """Wait for the job to end, with images or without, and return it.

        Raises:
            TooLate: it has not ended after ``timeout_s``.
        """
        following = Following(id, self._retries, within_s=timeout_s)
        job = self.job(id)
        if not job.final:
            with suppress(JobFailed):
                for _ in self._follow(following):
                    pass
            job = self.job(id)
        return job

    def image(self, id: str, index: int = 0) -> bytes:
        """The file of one image of a finished job."""
        return self._run(protocol.image(id, index, self._retries))

    def models(self) -> list[Model]:
        """The models that are served."""
        return self._run(protocol.models(self._retries))

    def events(self, id: str, after: int | None = None) -> Iterator[Event]:
        """A job's events after number ``after`` until its end, each once, however often the connection breaks."""
        return self._follow(Following(id, self._retries, after))

    def operate(self, method: str, path: str, *, wait_s: float | None = None, **query: Any) -> dict[str, Any]:
        """Call an operator's route under ``admin/`` (see ``/docs``); returns the JSON object of its response.

        ``wait_s`` is how long the service waits for its workers.
        """
        return self._run(protocol.operate(method, path, query, wait_s, self._retries))

    def _follow(self, following: Following) -> Iterator[Event]:
        while not following.ended:
            try:
                yield from self._events(following)
            except httpx.TransportError as error:
                time.sleep(following.broken(Unreachable(f"The event stream broke off: {error}.")))
            except FewstepError as error:
                time.sleep(following.broken(error))

    def _events(self, following: Following) -> Iterator[Event]:
        with self._http.stream(**following.call.arguments()) as response:
            if not response.is_success:
                response.read()
            following.opened(response)
            for line in response.iter_lines():
                if (event := following.line(line)) is not None:
                    yield event
                if following.renew:
                    break
        following.closed()

    def _run(self, steps: Steps[T]) -> T:
        outcome: Outcome = None
        while True:
            try:
                step = steps.send(outcome)
            except StopIteration as end:
                result: T = end.value
                return result
            outcome = self._do(step)

    def _do(self, step: Call | Pause) -> Outcome:
        if isinstance(step, Pause):
            time.sleep(step.seconds)
            return None
        try:
            return self._http.request(**step.arguments())
        except httpx.TransportError as error:
            return error

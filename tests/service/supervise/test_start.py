"""How long the start is waited for: as long as a worker says that it loads, and no longer."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from service.errors import StartupError
from service.queue.status import WorkerState
from service.settings import Settings
from service.supervise import supervisor
from service.supervise.supervisor import READY_TIMEOUT_S, Child, Supervisor

READY = {"status": "ready"}


class Scene:
    """A supervisor whose processes live, a clock that moves when it is slept on, and what is said at each time."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, ready_at_s: float, states: dict[float, list[str]]) -> None:
        self.now_s = 0.0
        self._ready_at_s = ready_at_s
        self._states = states
        clock = SimpleNamespace(monotonic=lambda: self.now_s, sleep=self._sleep)
        monkeypatch.setattr(supervisor, "time", clock)
        monkeypatch.setattr(supervisor, "_ask", self._ask)
        monkeypatch.setattr(supervisor, "live_workers", lambda _: self._workers())
        self.supervisor: Any = Supervisor.__new__(Supervisor)
        self.supervisor._stopping = False
        self.supervisor._settings = Settings(runtime="fake")
        self.supervisor._redis_url = "redis://127.0.0.1:1"
        self.supervisor._listener = SimpleNamespace(getsockname=lambda: ("127.0.0.1", 1))
        alive = SimpleNamespace(poll=lambda: None)
        self.supervisor._children = [Child("api", process=alive), Child("worker", process=alive)]  # type: ignore[arg-type]

    def _sleep(self, _: float) -> None:
        self.now_s += 10.0
        assert self.now_s < 100 * READY_TIMEOUT_S, "it waits for ever"

    def _ask(self, url: str) -> dict[str, Any]:
        return READY if url.endswith("/healthz") or self.now_s >= self._ready_at_s else {}

    def _workers(self) -> list[Any]:
        said = [states for since_s, states in self._states.items() if since_s <= self.now_s][-1]
        return [SimpleNamespace(state=WorkerState(state)) for state in said]


def test_a_worker_that_loads_is_waited_for_however_long(monkeypatch: pytest.MonkeyPatch) -> None:
    scene = Scene(monkeypatch, 20 * READY_TIMEOUT_S, {0.0: ["loading", "ready"]})
    assert scene.supervisor._wait_until_ready() == READY
    assert scene.now_s >= 20 * READY_TIMEOUT_S


@pytest.mark.parametrize(
    ("states", "said"),
    [([], "no worker has given a sign of life"), (["ready", "paused"], "the workers say ready, paused")],
)
def test_nothing_that_loads_is_waited_for_no_longer(
    monkeypatch: pytest.MonkeyPatch, states: list[str], said: str
) -> None:
    scene = Scene(monkeypatch, float("inf"), {0.0: ["loading"], 2 * READY_TIMEOUT_S: states})
    with pytest.raises(StartupError, match=f"The service is not ready after 120 s, and nothing loads: {said}."):
        scene.supervisor._wait_until_ready()
    assert scene.now_s < 4 * READY_TIMEOUT_S


def test_an_http_process_that_does_not_answer_is_waited_for_no_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    scene = Scene(monkeypatch, float("inf"), {0.0: ["loading"]})
    monkeypatch.setattr(supervisor, "_ask", lambda _: {})
    with pytest.raises(StartupError, match="The HTTP process does not answer after 120 s."):
        scene.supervisor._wait_until_ready()
    assert scene.now_s < 2 * READY_TIMEOUT_S


def test_any_process_that_ends_ends_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    scene = Scene(monkeypatch, float("inf"), {0.0: ["loading"]})
    scene.supervisor._children.append(Child("worker", process=SimpleNamespace(poll=lambda: 3)))  # type: ignore[arg-type]
    with pytest.raises(StartupError, match="The worker process ended with code 3 instead of becoming ready."):
        scene.supervisor._wait_until_ready()
    assert scene.now_s == 0.0

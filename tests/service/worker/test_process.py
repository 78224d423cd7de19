"""The ways of a worker's process to end: with which code, in which order, and whatever goes wrong on the way."""

from __future__ import annotations

import logging
import signal
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from redis.exceptions import ConnectionError as RedisConnectionError

from service.errors import StartupError
from service.observe.tracer import Tracing
from service.queue.status import DRAINED
from service.settings import Settings
from service.worker import process
from service.worker.execution import DeviceLost


class Gone(BaseException):
    """The process has ended, with this code."""


@pytest.fixture
def done(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What is done, in order; ``os._exit`` is told and raises."""
    done: list[Any] = []

    def end(code: int) -> None:
        done.append(("exit", code))
        raise Gone

    monkeypatch.setattr(process.os, "_exit", end)
    monkeypatch.setattr(process, "flush_logs", lambda: done.append("flush"))
    return done


def noting(done: list[Any], word: str, answer: Any = None) -> Any:
    def note(*arguments: Any) -> Any:
        done.append((word, *arguments))
        if isinstance(answer, Exception):
            raise answer
        return answer

    return note


@pytest.mark.parametrize(
    ("failure", "drains", "code"),
    [(None, False, 0), (None, True, DRAINED), (DeviceLost("gone"), False, 4), (DeviceLost("gone"), True, 4)],
)
def test_the_code_says_how_it_ended(
    failure: Exception | None, drains: bool, code: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    worker, ran = SimpleNamespace(run=noting([], "run", failure), counts=lambda: {"a": 1}), list[Any]()
    monkeypatch.setattr(process, "Worker", lambda *arguments, **_: ran.append(arguments) or worker)
    monkeypatch.setattr(process, "open_store", lambda settings: "store")
    heartbeat: Any = SimpleNamespace(drains=drains)
    parts: tuple[Any, ...] = ("loaded", "consumer", heartbeat, "leaver", threading.Event(), Tracing(), None)
    assert process._work(Settings(runtime="fake", data_dir=tmp_path), *parts) == code
    assert ran == [("loaded", "consumer", heartbeat, "store", parts[4])] and heartbeat.counts is worker.counts


def hung(done: list[Any], drained: Any = None) -> None:
    claims = SimpleNamespace(stop=noting(done, "no more claims"), hand_back=noting(done, "hand back"))
    worker: Any = SimpleNamespace(claims=claims, drain=noting(done, "drain", drained))
    heartbeat: Any = SimpleNamespace(stop=noting(done, "no more heartbeats"))
    leaver: Any = SimpleNamespace(worker="w", lost=noting(done, "lost", 3))
    with pytest.raises(Gone):
        process._end_hung(worker, heartbeat, leaver)


def test_a_worker_whose_call_hangs_settles_what_is_done_and_gives_up_the_rest(
    done: list[Any], caplog: pytest.LogCaptureFixture
) -> None:
    hung(done)
    assert done == [
        ("no more heartbeats",), ("no more claims",), ("hand back",), ("drain", 2.0), ("lost", "w"), "flush",
        ("exit", 5),
    ]  # fmt: skip
    [line] = caplog.records
    assert (line.levelname, line.getMessage(), line.__dict__["given_up"]) == ("CRITICAL", "the worker ends", 3)


def test_it_ends_even_where_the_queue_is_away(done: list[Any]) -> None:
    hung(done, RedisConnectionError("away"))
    assert done[-3:] == [("drain", 2.0), "flush", ("exit", 5)]


class Timer:
    """A timer that was started, and never runs by itself."""

    started: list[Timer] = []

    def __init__(self, seconds: float, action: Any) -> None:
        self.seconds, self.action, self.daemon = seconds, action, False

    def start(self) -> None:
        Timer.started.append(self)


@pytest.mark.parametrize("released", [2, RedisConnectionError("away")])
def test_a_signal_ends_the_batch_and_one_that_takes_too_long_is_handed_back(
    released: Any, done: list[Any], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    handlers: dict[int, Any] = {}
    monkeypatch.setattr(process.signal, "signal", handlers.__setitem__)
    monkeypatch.setattr(process.threading, "Timer", Timer)
    Timer.started.clear()
    stopping = threading.Event()
    heartbeat: Any = SimpleNamespace(held=lambda: [("job", "1")])
    leaver: Any = SimpleNamespace(release=noting(done, "release", released))
    process._stop_on_signal(stopping, heartbeat, leaver, 7.5)
    assert set(handlers) == {signal.SIGTERM, signal.SIGINT} and not stopping.is_set()
    stopping.set()  # an operator drains it already: the time to end still begins with the signal
    handlers[signal.SIGINT](signal.SIGINT, None)
    handlers[signal.SIGTERM](signal.SIGTERM, None)
    [timer] = Timer.started
    assert timer.seconds == 7.5 and timer.daemon and stopping.is_set() and done == []
    with caplog.at_level(logging.INFO), pytest.raises(Gone):
        timer.action()
    assert done == [("release", [("job", "1")]), "flush", ("exit", 0)]
    told = [record.__dict__["handed_back"] for record in caplog.records if record.getMessage() == "stopped"]
    assert told == ([2] if released == 2 else [])


def test_a_worker_leaves_whether_or_not_the_queue_hears_of_it(caplog: pytest.LogCaptureFixture) -> None:
    done: list[Any] = []
    process._leave(SimpleNamespace(release=noting(done, "release")))  # type: ignore[arg-type]
    process._leave(SimpleNamespace(release=noting(done, "release", RedisConnectionError("away"))))  # type: ignore[arg-type]
    assert done == [("release", [])] * 2
    assert [record.levelname for record in caplog.records] == ["WARNING"]


@pytest.mark.parametrize("fails", ["", "load", "work"])
def test_a_worker_is_alive_while_it_loads_says_at_once_that_it_is_ready_and_takes_its_leave(
    fails: str, done: list[Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def part(word: str, answer: Any = None) -> Any:
        return noting(done, word, StartupError("no") if word == fails else answer)

    class Beats:
        def __init__(self, *arguments: Any, **options: Any) -> None:
            self.options = options

        def __enter__(self) -> Beats:
            done.append("alive")
            return self

        def __exit__(self, *_: object) -> None:
            done.append("silent")

        def ask(self) -> None:
            done.append("ask")

    monkeypatch.setattr(process, "Heartbeat", Beats)
    monkeypatch.setattr(
        process, "open_tracing", lambda *_: SimpleNamespace(close=lambda: done.append("spans are sent"))
    )
    monkeypatch.setattr(process, "open_models", lambda *_: part("load")())
    monkeypatch.setattr(process, "_work", lambda *_: part("work", 6)())
    monkeypatch.setattr(process, "_stop_on_signal", lambda *_: None)
    monkeypatch.setattr(process, "_consumer", lambda *_: SimpleNamespace(release=lambda jobs: done.append("leave")))
    settings = Settings(runtime="fake", redis_url="redis://127.0.0.1:1", data_dir=tmp_path)
    if fails:
        with pytest.raises(StartupError):
            process.run_worker(settings, "w")
    else:
        assert process.run_worker(settings, "w") == 6
    loaded, worked = ["alive", ("load",)], ["ask", ("work",)]
    begun = loaded if fails == "load" else [*loaded, *worked]
    assert done == [*begun, "silent", "leave", *([] if fails else ["spans are sent"])]

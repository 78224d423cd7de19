"""A container's health check: alive and loaded, on this host."""

from __future__ import annotations

import pytest

from service.errors import StartupError
from service.queue.status import Worker, WorkerState
from service.settings import Settings
from service.supervise import probe
from service.supervise.probe import find_worker, live_workers
from tests.service.support import Queue


def worker(host: str, state: WorkerState) -> Worker:
    return Worker("w", "fake", host, 8, True, state=state)


@pytest.mark.parametrize(
    ("workers", "sentence"),
    [
        ([worker("here", WorkerState.READY)], ""),
        ([worker("here", WorkerState.LOADING), worker("here", WorkerState.READY)], ""),
        ([worker("here", WorkerState.PAUSED)], ""),
        ([worker("here", WorkerState.DRAINING)], ""),
        ([worker("here", WorkerState.LOADING)], "The workers on here are still loading."),
        (
            [worker("here", WorkerState.LOADING), worker("there", WorkerState.READY)],
            "The workers on here are still loading.",
        ),
        ([worker("there", WorkerState.READY)], "No worker on here is alive."),
        ([], "No worker on here is alive."),
    ],
)
def test_a_worker_of_this_host_must_have_loaded(
    workers: list[Worker], sentence: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(probe, "live_workers", lambda _: workers)
    if not sentence:
        return find_worker(Settings(runtime="fake"), "here")
    with pytest.raises(StartupError) as refused:
        find_worker(Settings(runtime="fake"), "here")
    assert str(refused.value) == sentence


def test_a_queue_out_of_reach_is_one_sentence() -> None:
    with pytest.raises(StartupError, match=r"^The queue cannot be reached: .*\.$"):
        find_worker(Settings(runtime="fake", redis_url="unix:///nowhere.sock"), "here")


def test_the_workers_of_a_queue_are_those_that_have_given_a_sign_of_life(
    queue: Queue, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(probe, "queue_name", lambda _: queue.model)
    settings = Settings(runtime="fake", redis_url=queue.url)
    assert live_workers(settings) == []
    queue.consumer("w", lease_s=30).beat({"runtime": "fake", "host": "here", "max_batch": 8, "state": "paused"}, [])
    [found] = live_workers(settings)
    assert (found.id, found.host, found.state) == ("w", "here", WorkerState.PAUSED)

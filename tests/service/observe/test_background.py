"""No failure ends a background duty, or takes another with it; and each is counted."""

from __future__ import annotations

import asyncio
import threading
from contextlib import suppress

import pytest

from service.observe.background import BROKEN_AFTER, Background
from service.observe.metrics import Metrics
from service.queue.status import Depth


def test_a_duty_that_fails_is_done_again_and_counted() -> None:
    background, calls = Background(), 0

    async def duty() -> None:
        nonlocal calls
        calls += 1
        if calls in (1, 3):
            raise KeyError("a bug")

    async def run() -> None:
        task = asyncio.create_task(background.forever("duty", duty, vital=True))
        while calls < 5:
            await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(run())
    assert background.failures == {"duty": 2} and background.broken is None


def test_a_duty_ends_though_its_action_swallows_the_cancellation() -> None:
    background, calls = Background(), 0

    async def deaf() -> None:
        nonlocal calls
        calls += 1
        with suppress(asyncio.CancelledError if calls == 1 else ZeroDivisionError):  # only the first, so that all ends
            await asyncio.sleep(0.05)

    async def run() -> None:
        task = asyncio.create_task(background.forever("duty", deaf))
        while not calls:
            await asyncio.sleep(0)
        task.cancel()
        done, _ = await asyncio.wait({task}, timeout=5)
        assert done

    asyncio.run(run())
    assert calls == 1


@pytest.mark.parametrize("vital", [True, False])
def test_a_vital_duty_that_fails_again_and_again_is_told(vital: bool) -> None:
    background, stopping, calls = Background(), threading.Event(), 0

    def duty() -> None:
        nonlocal calls
        calls += 1
        if calls > BROKEN_AFTER:
            stopping.set()
        else:
            raise ZeroDivisionError

    duties = background.duty("duty", vital)
    for _ in range(BROKEN_AFTER):
        assert background.broken is None
        duties.failed(ZeroDivisionError())
    assert background.broken == ("duty fails (ZeroDivisionError)" if vital else None)
    background.forever_in_thread("duty", duty, 0.001, stopping)
    assert background.failures == {"duty": 2 * BROKEN_AFTER} and background.broken is None, "it works again"


def test_of_several_duties_the_vital_one_that_fails_is_told_wherever_it_stands() -> None:
    background = Background()
    duties = [background.duty(name, vital) for name, vital in (("a", True), ("b", False), ("c", True), ("d", True))]
    for duty in duties[1:3]:
        for _ in range(BROKEN_AFTER):
            duty.failed(OSError())
    assert background.broken == "c fails (OSError)" and background.duty("c") is duties[2]
    assert background.failures == background.unreported == {"b": BROKEN_AFTER, "c": BROKEN_AFTER}
    duties[2].succeeded()
    assert background.broken is None
    duties[2].failed(OSError())
    assert background.broken is None, "it counts anew"
    background.reported({"b": 1})
    background.reported({"b": 1, "c": BROKEN_AFTER + 1})
    assert background.unreported == {"b": BROKEN_AFTER - 2}


def test_the_failures_of_this_process_and_of_the_workers_are_one_metric() -> None:
    metrics = Metrics("m", "1", {})
    metrics.background.duty("replies").failed(KeyError("x"))
    metrics.queue(Depth(0, 0, 0.0, 1, {"finished": 3, "failed:heartbeat": 2, "failed:replies": 1}))
    text = metrics.text().decode()
    assert 'fewstep_background_failures_total{task="heartbeat"} 2.0' in text
    assert 'fewstep_background_failures_total{task="replies"} 2.0' in text
    assert "fewstep_jobs_finished_total 3.0" in text


def test_a_failure_that_was_reported_elsewhere_is_counted_once() -> None:
    metrics = Metrics("m", "1", {})
    for _ in range(3):
        metrics.background.duty("replies").failed(KeyError("x"))
    assert (fresh := metrics.background.unreported) == {"replies": 3}
    metrics.background.reported(fresh)
    metrics.queue(Depth(0, 0, 0.0, 1, {"failed:replies": 3}))
    assert 'fewstep_background_failures_total{task="replies"} 3.0' in metrics.text().decode()
    metrics.background.duty("replies").failed(KeyError("x"))
    assert metrics.background.unreported == {"replies": 1}
    assert 'fewstep_background_failures_total{task="replies"} 4.0' in metrics.text().decode()

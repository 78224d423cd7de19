"""Times and bounds that nobody sets: those that the documents name, and those that are chosen against each other.

A number that is changed here changes what an operator meets: how soon something is tried again, how much is kept.
"""

from __future__ import annotations

import asyncio
import select
import sys
from typing import Any

import pytest

from service import listener, run
from service.http import events, overload, protocol, streams
from service.observe import accelerators, background, log_writer
from service.quality import drift
from service.queue import replies, status
from service.supervise import redis_server, supervisor
from service.webhooks import deliver, target
from service.worker import backlog, finishing, heartbeat, late_scores, probing, process, settling
from tests.service.supervise.test_gpus import UUIDS, stand_in


@pytest.mark.parametrize(
    ("module", "numbers"),
    [
        (overload, {"IN_A_ROW": 8, "HOLD_S": 0.05}),
        (streams, {"RENEW_S": 10.0, "KEPT_S": 30.0}),
        (events, {"END_MARGIN_S": 2.0, "PREVIEW": 10, "COMPLETED": 100, "END": 1000, "SCORED": 2000}),
        (protocol, {"MAX_HEAD_BYTES": 32768}),
        (replies, {"POLL_S": 2.0, "FOLLOW_S": 1.0, "BLOCK_S": 2.0}),
        (supervisor, {"FIRST_PAUSE_S": 0.1, "LONGEST_PAUSE_S": 1.0, "STEADY_AFTER_S": 5.0, "READY_TIMEOUT_S": 120.0}),
        (redis_server, {"START_TIMEOUT_S": 20.0, "STOP_TIMEOUT_S": 2.0, "LOCK_TIMEOUT_S": 5.0}),
        (deliver, {"AT_ONCE": 64, "AT_ONE_HOST": 8, "POSTPONE_S": 1.0, "LEASE_S": 30.0, "SEND_S": 5.0, "MAX_TRIES": 8}),
        (target, {"RESOLVE_S": 3.0}),
        (settling, {"SETTLE_FOR_S": 60.0}),
        (backlog, {"MOST_BYTES": 512 * 2**20, "MOST_BATCHES": 8}),
        (late_scores, {"MOST_WAITING": 64}),
        (finishing, {"MOST_ENCODERS": 4}),
        (heartbeat, {"SOONEST_S": 0.1}),
        (probing, {"PATIENCE_S": 60.0, "AGAIN_S": 60.0}),
        (process, {"STOP_MARGIN_S": 0.2, "SETTLE_BEFORE_LEAVING_S": 2.0}),
        (background, {"BROKEN_AFTER": 3}),
        (log_writer, {"MOST_LINES": 10_000, "FLUSH_S": 0.5}),
        (drift, {"RECENT": 1000, "CAP": 10.0, "UNKNOWN_COUNT": 100}),
        (listener, {"BACKLOG": 2048}),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_the_numbers_that_are_agreed(module: Any, numbers: dict[str, float]) -> None:
    assert {name: getattr(module, name) for name in numbers} == numbers


def test_each_end_of_a_process_has_a_code_of_its_own() -> None:
    codes = {
        "stopped": process.STOPPED, "refused": run.REFUSED, "device lost": process.DEVICE_LOST, "hung": process.HUNG,
        "drained": status.DRAINED,
    }  # fmt: skip
    assert codes == {"stopped": 0, "refused": 1, "device lost": 4, "hung": 5, "drained": 6}


def test_a_piece_of_the_log_is_what_a_pipe_takes_at_once() -> None:
    assert log_writer.ATOMIC_BYTES <= select.PIPE_BUF


@pytest.mark.parametrize(
    ("every_s", "outcomes", "pauses"),
    [
        (0.0, "fffffffffffff.f", [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.0, 1.0, 1.0, 0.0, 0.1]),
        (0.5, "fff.ffffff", [0.5, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5, 0.6]),
        (9.0, "f.f", [9.0, 9.0, 9.0]),
    ],
)
def test_a_duty_that_fails_is_tried_again_after_longer_and_longer_up_to_a_second(
    every_s: float, outcomes: str, pauses: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    slept: list[float] = []

    async def sleep(seconds: float) -> None:
        slept.append(seconds)
        if len(slept) == len(outcomes):
            raise asyncio.CancelledError

    async def action() -> None:
        if outcomes[len(slept)] == "f":
            raise ConnectionError

    monkeypatch.setattr(background.asyncio, "sleep", sleep)
    with pytest.raises(asyncio.CancelledError):
        asyncio.run(background.Background().forever("duty", action, every_s))
    assert slept == pytest.approx(pauses)


def test_a_gpu_is_measured_in_shares_bytes_watts_and_degrees(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", stand_in())
    monkeypatch.delenv(accelerators.VISIBLE, raising=False)
    measured = accelerators.Accelerators().measure()
    state = {"busy": 0.5, "used_bytes": 1, "total_bytes": 2, "power_w": 300.0, "temperature_c": 60}
    assert measured == dict.fromkeys(UUIDS, state)

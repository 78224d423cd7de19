"""The queue does what its model does, whatever the order; and the model notices when it does not."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, seed, settings
from hypothesis.stateful import run_state_machine_as_test
from redis.exceptions import RedisError

from service.queue import scripts
from tests.service.queue.queue_model import QueueMachine

USUAL: dict[str, Any] = {
    "deadline": None, "database": None, "stateful_step_count": 30, "suppress_health_check": list(HealthCheck),
    "print_blob": False,
}  # fmt: skip
# What is changed, where, and into what. A model that misses one of these would miss the mistake of a person, too.
MUTANTS = {
    "a zombie may end a job": ("job[1] == 'running' and job[2] == token,", "job[1] == 'running',"),
    "one attempt too many": ("tonumber(job[2]) < max_attempts", "tonumber(job[2]) <= max_attempts"),
    "one attempt too few": ("tonumber(job[2]) < max_attempts", "tonumber(job[2]) < max_attempts - 1"),
    "work is never taken off": ("redis.call('DECRBY', P .. 'work'", "redis.call('GET', P .. 'work'"),
    "a repeated claim claims more": ("last.claim_id == claim_id", "last.claim_id == ''"),
    "a lost job is not queued again": ("  push(id, bucket, tonumber(job[2]))\n", ""),
    "a lost job shares a batch": ("bucket = bucket .. '|solo'", "bucket = bucket .. ''"),
    "a solo job takes mates": ("and not (solo and #ids > 0)", ""),
    "enqueueing twice makes two": ("redis.call('EXISTS', key) == 1 then return {'known'", "false then return {'known'"),
    "leaving counts as an attempt": ("'attempts')) - 1, false)", "'attempts')), false)"),
    "a cancelled job is given out again": ("if job[4] then return close(id, job[4], '') end", ""),
    "a cancelled job is done all the same": ("if given_up then state, result = given_up, '' end", ""),
    "a cancel ends nothing": ("close(id, why, '')", ""),
    "an ended job keeps its lease": ("ipairs({'l', 'd', 'ab'})", "ipairs({'d', 'ab'})"),
    "finishing twice is fenced": ("and holder == token then return found", "and holder == '' then return found"),
    "every claim has the same token": ("int(math.max(now, tonumber(redis.call('GET', P .. 'token') or 0) + 1))", "'7'"),
    "a dead letter is not kept": ("redis.call('ZADD', P .. 'dead', int(now_us()), id)", ""),
    "an end is told twice": ("  notify(job[1], id, 'end')\n", "  for _ = 1, 2 do notify(job[1], id, 'end') end\n"),
    "a batch is too large": ("images + tonumber(job[2]) > max_images", "images > max_images"),
    "a robbed worker keeps its jobs": ("'worker') == worker then", "'worker') == '' then"),
}  # fmt: skip


def run(url: str, runner: asyncio.Runner, examples: int, phases: tuple[Phase, ...], number: int = 1) -> None:
    machine = seed(number)(type("Machine", (QueueMachine,), {"url": url, "runner": runner}))
    run_state_machine_as_test(machine, settings=settings(max_examples=examples, phases=phases, **USUAL))  # type: ignore[no-untyped-call]


def test_the_queue_does_what_its_model_does(redis_url: str, runner: asyncio.Runner) -> None:
    run(redis_url, runner, 40, (Phase.generate, Phase.shrink))


@pytest.mark.parametrize("name", MUTANTS)
def test_the_model_notices(
    name: str, redis_url: str, runner: asyncio.Runner, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    good, bad = MUTANTS[name]
    changed: set[str] = set()
    original = scripts.source

    def source(script: str) -> str:
        text = original(script)
        if good in text:
            changed.add(script)
        return text.replace(good, bad)

    monkeypatch.setattr(scripts, "source", source)
    with pytest.raises((AssertionError, ExceptionGroup, RedisError)):
        for number in (1, 2, 3):  # leases run out by the clock, so a busy machine may take one seed elsewhere
            run(redis_url, runner, 200, (Phase.generate,), number)
    assert changed, "the line that was to be changed is not there any more"

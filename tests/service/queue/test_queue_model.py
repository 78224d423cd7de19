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
    "a zombie may end a job": ("job.state == 'running' and job.token == token", "job.state == 'running'"),
    "one attempt too many": ("tonumber(job.attempts) < max_attempts", "tonumber(job.attempts) <= max_attempts"),
    "one attempt too few": ("tonumber(job.attempts) < max_attempts", "tonumber(job.attempts) < max_attempts - 1"),
    "work is never taken off": ("redis.call('HINCRBY', P .. 'wl', lane, int(-cost))", "local _ = lane"),
    "a key's jobs are never taken off": ("redis.call('HINCRBY', P .. 'kc', key, -count)", "local _ = key"),
    "a repeated claim claims more": ("last.claim_id == claim_id", "last.claim_id == ''"),
    "a lost job is not queued again": ("  push(job, bucket)\n  wake(job.lane)\n", ""),
    "a lost job shares a batch": ("bucket = bucket .. '|solo'", "bucket = bucket .. ''"),
    "a solo job takes mates": ("or (solo and #jobs > 0)", ""),
    "enqueueing twice makes two": ("redis.call('EXISTS', P .. 'j:' .. a.id) == 1 then", "false then"),
    "leaving counts as an attempt": ("int(job.attempts - 1), false)\n    rel", "job.attempts, false)\n    rel"),
    "a cancelled job is given out again": ("  if job.cancel then\n    set(", "  if false then\n    set("),
    "a cancelled job is done all the same": ("if job.cancel then state, result = job.cancel, '' end", ""),
    "a cancel ends nothing": ("return close(job, why, '')", "return why"),
    "an ended job keeps its lease": (
        "{'l', 'd', 'ab'}) do redis.call('ZREM', P .. name, job.id)",
        "{'d', 'ab'}) do redis.call('ZREM', P .. name, job.id)",
    ),
    "finishing twice is fenced": (
        "and job.token == token then return job.state",
        "and job.token == '' then return job.state",
    ),
    "every claim has the same token": ("int(math.max(now, tonumber(said[1] or 0) + 1))", "'7'"),
    "a dead letter is not kept": ("redis.call('ZADD', P .. 'dead', int(now_us()), job.id)", ""),
    "an end is told twice": (
        "  notify(job.reply, job.id, 'end')\n",
        "  notify(job.reply, job.id, 'end')\n  notify(job.reply, job.id, 'end')\n",
    ),
    "a batch is too large": ("images + tonumber(job.images or 0) <= most", "images < most"),
    "a robbed worker keeps its jobs": ("if job.worker == worker then", "if job.worker == '' then"),
    "what nobody holds runs for ever": ("return close(job, job.cancel or why, '')", "return 'running'"),
    "what was drawn is lost with the worker": ("if state ~= 'done' and job.best then", "if false then"),
    "what has pictures waits for its worker": ("if job.best or not redis.call", "if not redis.call"),
    "what has pictures becomes a dead letter": ("== 'done' then return 'done' end", "== '' then return 'done' end"),
    "advancing twice advances twice": ("job.advanced == token and job.state", "false"),
    "an emptied bucket stays in the index": (
        "redis.call('ZREM', P .. 'b', bucket)\n  else\n    index",
        "local _ = 1\n  else\n    index",
    ),
}


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

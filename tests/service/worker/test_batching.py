"""Which images share a call: pure rules."""

from __future__ import annotations

import pytest

from service.worker.batching import largest_call, plan
from tests.service.support import a_job


def sizes(seeds_per_job: list[int], max_batch: int) -> list[int]:
    jobs = [a_job(seeds=tuple(range(count))) for count in seeds_per_job]
    return [len(call) for call in plan(jobs, max_batch)]


@pytest.mark.parametrize(
    ("seeds_per_job", "max_batch", "expected"),
    [
        ([], 8, []),
        ([1], 8, [1]),
        ([3, 4, 1], 8, [8]),
        ([10], 8, [5, 5]),
        ([10], 4, [3, 3, 4]),
        ([2, 2], 1, [1, 1, 1, 1]),
    ],
)
def test_calls_are_few_even_and_never_too_large(seeds_per_job: list[int], max_batch: int, expected: list[int]) -> None:
    assert sizes(seeds_per_job, max_batch) == expected


def test_every_image_is_drawn_once_with_its_own_prompt_and_seed() -> None:
    jobs = [a_job(prompt=f"p{j}", seeds=tuple(range(10 * j, 10 * j + count))) for j, count in enumerate([3, 1, 5])]
    slots = [slot for call in plan(jobs, 4) for slot in call]
    assert [(slot.job, slot.index) for slot in slots] == [
        (j, k) for j, job in enumerate(jobs) for k in range(len(job.seeds))
    ]
    assert all(slot.prompt == jobs[slot.job].prompt for slot in slots)
    assert all(slot.seed == jobs[slot.job].seeds[slot.index] for slot in slots)


def test_the_batch_size_that_a_job_is_told_is_that_of_its_own_calls() -> None:
    calls = plan([a_job(seeds=(1, 2, 3)), a_job(seeds=(4, 5))], 3)
    assert [len(call) for call in calls] == [2, 3]
    assert [largest_call(calls, 0), largest_call(calls, 1)] == [3, 3]
    assert largest_call([calls[0]], 0) == 2

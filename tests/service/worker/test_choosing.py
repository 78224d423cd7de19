"""Best of several, and round by round to a floor: on a real queue, with the worker's own code."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from service.queue.job import Job
from service.worker.scoring import ScorePolicy
from service.worker.worker import Worker
from student.bundle import RewardReference
from student.runtimes.fake import FakeRuntime, fake_preview
from student.runtimes.runtime import FloatArray
from tests.service.support import Queue, expected_pixels, pixels
from tests.service.worker.test_worker import Bench

PROMPT = "a red heart"
KNOWN = RewardReference(0.0, 0.15, {"0": -0.6, "50": 0.0, "100": 0.6})


@pytest.fixture
def bench(queue: Queue, tmp_path: Path) -> Iterator[Bench]:
    bench = Bench(queue, tmp_path / "results")
    bench.runtime.student = replace(bench.runtime.student, reward_reference={"trained": KNOWN})
    with bench.heartbeat:
        yield bench


def score(seed: int, steps: int = 4, scorer: str = "trained") -> float:
    """The answer key: what the fake runtime's own scorer says of one picture."""
    image = FakeRuntime().draw([PROMPT], [seed], steps)
    return float(FakeRuntime().score(image, [PROMPT])[scorer][0])


def asked(bench: Bench, seeds: Sequence[int], candidates: int = 1, **fields: Any) -> Job:
    """A job whose candidates have the seeds ``seed + 100 * candidate``."""
    tried = candidates * len(fields.get("cascade", (1,)))
    return bench.queue.job(
        prompt=PROMPT, seeds=tuple(seeds), candidates=candidates, rank_by="trained",
        candidate_seeds=tuple(tuple(seed + 100 * c for c in range(tried)) for seed in seeds), **fields,
    )  # fmt: skip


def put(bench: Bench, job: Job, **options: Any) -> Job:
    assert bench.queue.enqueue(job, **options) == "ok"
    return job


def images(bench: Bench, job: Job) -> list[dict[str, Any]]:
    """The pictures of a job that is done, each with its own bytes."""
    assert bench.queue.state(job.id) == "done"
    found: list[dict[str, Any]] = bench.queue.result(job.id)["images"]
    for image in found:
        expected = expected_pixels(PROMPT, image["seed"], image.get("steps", 4))
        assert np.array_equal(pixels(bench.store.get(image["file"])), expected)
    return found


def test_the_best_of_each_images_candidates_is_kept_and_nothing_else_is_stored(bench: Bench) -> None:
    job = put(bench, asked(bench, (7, 8), 4))
    bench.worker.step()
    assert bench.runtime.calls == [8]
    for image, seed in zip(images(bench, job), job.seeds, strict=True):
        tried = [seed + 100 * c for c in range(4)]
        assert image["seed"] == max(tried, key=score) and image["reward"]["trained"] == pytest.approx(
            score(image["seed"])
        )
        assert image["reported"] == {"heldout": pytest.approx(score(image["seed"], scorer="heldout"))}
        assert [one["seed"] for one in image["candidates"]] == tried
        assert [one["reward"]["trained"] for one in image["candidates"]] == pytest.approx([score(s) for s in tried])
        ranks = {one["seed"]: one["rank"] for one in image["candidates"]}
        assert sorted(tried, key=score, reverse=True) == sorted(tried, key=lambda seed: ranks[seed])
    assert len(bench.files()) == 2


def test_more_candidates_than_a_batch_holds_are_drawn_in_several_calls(bench: Bench) -> None:
    job = put(bench, asked(bench, (7, 8), 10))
    bench.worker.step()
    assert sum(bench.runtime.calls) == 20 and max(bench.runtime.calls) <= 8
    assert [len(image["candidates"]) for image in images(bench, job)] == [10, 10]


def test_candidates_share_a_batch_with_other_jobs(bench: Bench) -> None:
    jobs = [put(bench, asked(bench, (k,), 4)) for k in (1, 2)]
    bench.worker.step()
    assert bench.runtime.calls == [8]
    assert [images(bench, job)[0]["seed"] % 100 for job in jobs] == [1, 2]


@pytest.mark.parametrize("policy", ["0", "after"])
def test_candidates_are_scored_at_once_whatever_is_done_with_other_pictures(bench: Bench, policy: str) -> None:
    bench.worker = Worker(
        bench.runtime, bench.consumer, bench.heartbeat, bench.store, bench.stopping, policy=ScorePolicy.parse(policy)
    )
    job, plain = put(bench, asked(bench, (7,), 4)), put(bench, bench.queue.job(prompt=PROMPT, seeds=(7,)))
    for _ in range(2):
        bench.worker.step()
    assert images(bench, job)[0]["seed"] == max((7, 107, 207, 307), key=score)
    assert images(bench, plain)[0]["reward"] == {}, "it has none, or they come later"


def test_a_candidate_that_is_broken_or_unscored_costs_no_other(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """The best candidate is not finite, the next one has no score: the third is kept, and the answer says why."""
    job = asked(bench, (7,), 4)
    order = sorted(job.candidate_seeds[0], key=score, reverse=True)
    draw, judge = bench.runtime.draw_watched, bench.runtime.score

    def draw_one_broken(prompts: Sequence[str], seeds: Sequence[int], *rest: Any) -> FloatArray:
        images_BCHW = draw(prompts, seeds, *rest)
        images_BCHW[seeds.index(order[0])] = np.nan
        return images_BCHW

    def score_one_not(images_BCHW: FloatArray, prompts: Sequence[str]) -> dict[str, FloatArray]:
        scores = judge(images_BCHW, prompts)
        scores["trained"][job.candidate_seeds[0].index(order[1])] = np.nan
        return scores

    monkeypatch.setattr(bench.runtime, "draw_watched", draw_one_broken)
    monkeypatch.setattr(bench.runtime, "score", score_one_not)
    put(bench, job)
    bench.worker.step()
    (image,) = images(bench, job)
    assert image["seed"] == order[2]
    report = {one["seed"]: one for one in image["candidates"]}
    assert report[order[0]]["broken"] and report[order[0]]["rank"] == 4
    assert report[order[1]]["reward_failed"] == ["trained"] and report[order[1]]["rank"] == 3


def test_a_cancel_between_the_calls_chooses_among_no_fewer(bench: Bench) -> None:
    job = put(bench, asked(bench, (7,), 16))
    bench.runtime.during = lambda: (
        len(bench.runtime.calls) == 1
        and (
            bench.queue.cancel(job.id),
            bench.heartbeat.beat(),
        )
    )
    bench.worker.step()
    assert bench.queue.state(job.id) == "cancelled" and not bench.files()


def test_candidates_are_drawn_in_rounds_until_the_floor_is_reached_and_only_of_what_is_below(bench: Bench) -> None:
    seeds = tuple(range(1, 9))
    floor = float(np.quantile([score(seed) for seed in seeds], 0.8))
    job = put(bench, asked(bench, seeds, 4, min_reward=floor))
    for _ in range(5):
        bench.worker.step()
    for image, seed in zip(images(bench, job), seeds, strict=True):
        tried = [seed + 100 * c for c in range(4)]
        first = next((c for c, one in enumerate(tried) if score(one) >= floor), 3)
        drawn = 1 if first == 0 else 2 if first == 1 else 4
        assert [one["seed"] for one in image["candidates"]] == tried[:drawn]
        assert image["seed"] == max(tried[:drawn], key=score)
        assert image["below_floor"] == (max(map(score, tried[:drawn])) < floor)
    first, second, *third = bench.runtime.calls
    assert (first, second) == (8, sum(score(seed) < floor for seed in seeds))
    assert sum(third) == 2 * sum(max(score(seed), score(seed + 100)) < floor for seed in seeds) > 0
    result = bench.queue.result(job.id)
    assert result["floor"]["asked_score"] == result["floor"]["score"] == pytest.approx(floor)
    assert len(result["calls"]) == len(bench.runtime.calls) and result["timings"]["inference_s"] > 0


def test_a_cascade_draws_what_is_below_with_more_steps_and_another_seed(bench: Bench) -> None:
    seeds = tuple(range(1, 9))
    job = put(bench, asked(bench, seeds, steps=1, cascade=(1, 2, 4), min_reward="p50"))
    for _ in range(4):
        bench.worker.step()
    for image, seed in zip(images(bench, job), seeds, strict=True):
        tried = [(seed, 1), (seed + 100, 2), (seed + 200, 4)]
        drawn = next((c for c, one in enumerate(tried) if score(*one) >= 0.0), 2) + 1
        assert [(one["seed"], one["steps"]) for one in image["candidates"]] == tried[:drawn]
        assert (image["seed"], image["steps"]) == max(tried[:drawn], key=lambda one: score(*one))
    assert {image["steps"] for image in images(bench, job)} > {1}
    assert len(bench.runtime.calls) == 3 and bench.queue.client.hget(f"{bench.queue.prefix}wl", job.lane) == "0"


def test_what_travels_on_shares_a_batch_with_others_of_its_step_count(bench: Bench) -> None:
    jobs = [put(bench, asked(bench, (k,), steps=1, cascade=(1, 2), min_reward=9.0)) for k in range(5)]
    bench.worker.step()
    bench.worker.step()
    assert bench.runtime.calls == [5, 5] and all(images(bench, job)[0]["below_floor"] for job in jobs)


@pytest.mark.parametrize("how", ["cancelled", "expired", "failed", "lost"])
def test_whatever_ends_a_later_round_the_best_so_far_is_the_answer(bench: Bench, how: str) -> None:
    job = put(bench, asked(bench, (7,), steps=1, cascade=(1, 2, 4), min_reward=9.0))
    bench.worker.step()
    assert bench.queue.state(job.id) == "queued" and bench.queue.field(job.id, "attempts") == "0"

    def trouble() -> None:
        if how in ("cancelled", "expired"):
            bench.queue.cancel(job.id, how)  # type: ignore[arg-type]
            bench.heartbeat.beat()
        else:
            raise RuntimeError("CUDA error") if len(bench.runtime.calls) == 2 else None

    if how == "lost":
        for name in ("w1", "w2", "w3"):
            assert bench.queue.consumer(name).claim({bench.queue.lane: 8})
            assert bench.queue.consumer("w").lost(name) == 1
    else:
        bench.runtime.during = trouble if how != "failed" else lambda: _raise_once(bench)
        bench.worker.step()
    (image,) = images(bench, job)
    assert (image["seed"], image["steps"], image["below_floor"]) == (7, 1, True)
    assert bench.queue.field(job.id, "short") == ("failed" if how == "lost" else how)
    assert not bench.queue.leftovers() and not bench.queue.client.exists(f"{bench.queue.prefix}dead")


def _raise_once(bench: Bench) -> None:
    if len(bench.runtime.calls) == 2:
        raise RuntimeError("a kernel failed")


def test_a_round_that_would_end_too_late_is_not_begun(bench: Bench) -> None:
    job = put(bench, asked(bench, (7,), steps=1, cascade=(1, 2), min_reward=9.0), timeout_s=30.0)
    lane = f'{{"jobs":9,"work":1,"busy":1,"means":[{60e6}]}}'
    bench.queue.client.hset(f"{bench.queue.prefix}rt", job.lane, lane)  # a unit of work takes a minute
    bench.worker.step()
    (image,) = images(bench, job)
    assert image["below_floor"] and bench.runtime.calls == [1] and bench.queue.field(job.id, "short") is None


def test_what_waits_counts_beside_what_arrives(bench: Bench) -> None:
    """Six jobs have arrived, of which five wait, each a twentieth of the time for which arrivals are remembered."""
    job = put(bench, asked(bench, (7,), steps=1, cascade=(1, 2), min_reward="p99"))
    assert bench.consumer.claim({bench.queue.lane: 1})
    for seed in range(5):
        put(bench, bench.queue.job(prompt=PROMPT, seeds=(seed,), steps=1))
    pace = f'{{"jobs":9,"work":1,"busy":1,"means":[{30e6 / 20 / job.cost}]}}'
    bench.queue.client.hset(f"{bench.queue.prefix}rt", job.lane, pace)
    bench.queue.client.hset(f"{bench.queue.prefix}rt", bench.queue.lane, pace)
    share, _ = bench.consumer.load(job.id, job.cost)
    assert share == pytest.approx((6 + 5) / 20, rel=0.1)


def test_under_load_the_floor_falls_and_the_answer_says_so(bench: Bench) -> None:
    """As much work is accepted as the workers can do: nothing is left for second rounds."""
    lane = '{"jobs":9,"work":1,"busy":1,"means":[%d]}'
    job = asked(bench, (7,), steps=1, cascade=(1, 2), min_reward="p99")
    put(bench, job)
    bench.queue.client.hset(f"{bench.queue.prefix}rt", job.lane, lane % (2 * 30e6 / job.cost))
    bench.worker.step()
    (image,) = images(bench, job)
    floor = bench.queue.result(job.id)["floor"]
    assert floor["lowered"] and floor["percentile"] == 0 and floor["utilization"] == pytest.approx(2.0, rel=0.2)
    assert floor["asked_score"] > floor["score"] and image["below_floor"], "below the floor that was asked for"
    bench.queue.client.hset(f"{bench.queue.prefix}rt", job.lane, lane % (0.1 * 30e6 / job.cost))
    other = put(bench, asked(bench, (8,), steps=1, cascade=(1, 2), min_reward="p99"))
    bench.worker.step()
    assert bench.queue.state(other.id) == "queued"


def test_previews_are_of_the_first_candidate_in_the_first_round(bench: Bench) -> None:
    job = put(bench, asked(bench, (7, 8), 2, steps=2, cascade=(2, 4), min_reward=9.0, previews=1))
    plain = put(bench, asked(bench, (7, 8), 3, steps=4, previews=2))
    for _ in range(6):
        bench.worker.step()
    assert set(bench.queue.record(job.id).previews) == {"0:0", "0:1"}
    shown = bench.queue.record(plain.id).previews
    assert set(shown) == {"0:0", "0:1", "1:0", "1:1"}
    for name, file in shown.items():
        look, image = map(int, name.split(":"))
        preview_CHW = fake_preview(PROMPT, plain.seeds[image], 4, (0, 2)[look])
        expected = np.rint(preview_CHW * 255).astype(np.uint8).transpose(1, 2, 0)
        assert np.array_equal(pixels(bench.store.get(file)), expected)


def test_further_rounds_are_charged_and_what_is_not_drawn_is_given_back(bench: Bench) -> None:
    job = asked(bench, (7,), steps=1, cascade=(1, 2, 4), min_reward=9.0)
    put(bench, job, quota=1000)

    def left() -> int:
        return int(str(bench.queue.client.hget(f"{bench.queue.prefix}q:anonymous", "left")))

    unit = job.cost
    assert left() == 1000 - unit
    bench.worker.step()
    assert left() == 1000 - 3 * unit
    bench.queue.cancel(job.id)
    assert bench.queue.state(job.id) == "done" and left() == 1000 - unit
    (used,) = bench.queue.runner.run(bench.queue.producer.usage(1))
    assert (used.jobs, used.images, used.work) == (1, 1, unit)


def test_a_job_of_several_rounds_is_used_once_and_all_its_pictures_count(bench: Bench) -> None:
    job = put(bench, asked(bench, (7, 8), steps=1, cascade=(1, 2), min_reward=9.0))
    bench.worker.step()
    bench.worker.step()
    assert bench.queue.state(job.id) == "done"
    (used,) = bench.queue.runner.run(bench.queue.producer.usage(1))
    assert (used.jobs, used.images, used.work) == (1, 4, job.cost + 2 * job.cost)

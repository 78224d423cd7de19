"""best_of, min_reward and cascade, as a client sees them."""

from __future__ import annotations

import base64
import itertools
import json
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from service.errors import InvalidRequest, ServiceError, TooLarge
from service.http.admission import check, new_job
from service.http.models import gains
from service.http.schema import GenerateRequest
from service.queue.connection import connect
from service.queue.consumer import Consumer
from service.queue.job import Job
from student.bundle import RewardReference, Student, WithinPrompt
from student.runtimes.fake import DEVIATION, FakeRuntime, fake_student
from tests.service.support import (
    Api,
    Service,
    call,
    eventually,
    expected_pixels,
    pixels,
    post,
    running_service,
)

PROMPT = "a red heart"


def score(seed: int, steps: int = 4, scorer: str = "trained", prompt: str = PROMPT) -> float:
    image = FakeRuntime().draw([prompt], [seed], steps)
    return float(FakeRuntime().score(image, [prompt])[scorer][0])


def job_of(**fields: Any) -> Job:
    return new_job(fake_student(), GenerateRequest(prompt=PROMPT, **fields), "k", "r")


def refusal(student: Student | None = None, scored: bool = True, **fields: Any) -> ServiceError:
    with pytest.raises((InvalidRequest, TooLarge)) as caught:
        check(
            student or fake_student(), GenerateRequest(prompt=PROMPT, **fields), lambda prompt: 1, 2**24, scored=scored
        )
    return caught.value


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"best_of": 2, "rank_by": "taste"}, "rank_by", "'taste': fake is scored by heldout, trained"),
        ({"rank_by": "trained"}, "rank_by", "no effect without best_of or min_reward"),
        ({"cascade": [1, 2]}, "cascade", "no effect without min_reward"),
        ({"best_of": 2, "cascade": [1, 2]}, "cascade", "no effect without min_reward"),
        ({"min_reward": 0.5}, "min_reward", "needs best_of or cascade"),
        ({"min_reward": 0.5, "cascade": [2, 8]}, "cascade", "trained for 1, 2, 4"),
        ({"min_reward": 0.5, "cascade": [2, 1]}, "cascade", "must grow"),
        ({"min_reward": 0.5, "cascade": [2, 2]}, "cascade", "must grow"),
        ({"min_reward": 0.5, "cascade": [1, 2], "num_inference_steps": 1}, "num_inference_steps", "leave out"),
        ({"best_of": 16, "n": 5}, "best_of", "are 80; one request may have 64"),
    ],
)
def test_what_cannot_be_chosen_is_refused_in_one_sentence(fields: dict[str, Any], param: str, words: str) -> None:
    error = refusal(**fields)
    assert error.param == param and words in str(error) and str(error).endswith(".")


def test_without_scores_nothing_can_be_chosen() -> None:
    for field in ({"best_of": 2}, {"min_reward": 0.5, "cascade": [1, 2]}):
        (name,) = [name for name in field if name != "cascade"]
        assert "fake has no scorer" in str(refusal(replace(fake_student(), scorers={}), **field))
        off = refusal(scored=False, **field)
        assert off.param == name and "FEWSTEP_SCORE=off" in str(off)


def test_a_percentile_needs_a_student_that_knows_its_own_scores() -> None:
    student = replace(fake_student(), reward_reference={})
    assert "send a number" in str(refusal(student, min_reward="p20", best_of=2))
    check(student, GenerateRequest(prompt="p", min_reward=0.2, best_of=2), lambda prompt: 1, 2**24)


def test_pixels_and_cost_count_the_candidates_of_the_first_round() -> None:
    plain = job_of(seed=7, n=2)
    assert job_of(seed=7, n=2, best_of=4).cost == 4 * plain.cost and job_of(seed=7, n=2, best_of=4).images == 8
    assert job_of(seed=7, n=2, best_of=4, min_reward="p20").cost == plain.cost
    with pytest.raises(TooLarge, match="4 x 64x64 are 16384 pixels"):
        check(fake_student(), GenerateRequest(prompt="p", best_of=4), lambda prompt: 1, 10_000)


def test_candidates_are_written_down_once_and_more_of_them_change_none_that_were_there() -> None:
    four, eight = job_of(seed=[7, 2**32 - 1], best_of=4), job_of(seed=[7, 2**32 - 1], best_of=8)
    assert [seeds[0] for seeds in four.candidate_seeds] == [7, 2**32 - 1] == list(four.seeds)
    assert four.candidate_seeds[0][1:3] == ((7 + 2654435769) % 2**32, (7 + 2 * 2654435769) % 2**32)
    assert all(len(set(seeds)) == 8 for seeds in eight.candidate_seeds)
    assert tuple(seeds[:4] for seeds in eight.candidate_seeds) == four.candidate_seeds
    assert all(0 <= seed < 2**32 for seeds in eight.candidate_seeds for seed in seeds)
    assert Job.from_payload(four.to_payload()) == four
    cascade = job_of(seed=7, best_of=2, min_reward="p20", cascade=[1, 2, 4])
    assert len(cascade.candidate_seeds[0]) == 6 and cascade.steps == 1
    assert job_of(best_of=2).rank_by == "trained" and job_of(best_of=2, rank_by="heldout").rank_by == "heldout"


def test_the_best_is_answered_with_all_that_was_tried_and_its_seed_alone_gives_the_same_bytes(live: Service) -> None:
    answer = post(live.url, prompt=PROMPT, seed=7, n=2, best_of=4).json()
    assert answer["rank_by"] == "trained" and "floor" not in answer and "ended_by" not in answer
    for image in answer["data"]:
        tried = {one["seed"]: one for one in image["candidates"]}
        assert len(tried) == 4 and image["seed"] == max(tried, key=score) and tried[image["seed"]]["rank"] == 1
        assert image["reported"] == {"heldout": pytest.approx(score(image["seed"], scorer="heldout"))}
        assert image["steps"] == 4
        (again,) = post(live.url, prompt=PROMPT, seed=image["seed"]).json()["data"]
        assert again["b64_json"] == image["b64_json"] and again["sha256"] == image["sha256"]
        assert set(again) == {"b64_json", "seed", "width", "height", "sha256", "reward", "reward_percentile"}
    assert [image["candidates"][0]["seed"] for image in answer["data"]] == [7, 8]


def test_the_held_out_scorer_may_choose_and_then_the_other_is_reported(live: Service) -> None:
    (image,) = post(live.url, prompt=PROMPT, seed=7, best_of=4, rank_by="heldout").json()["data"]
    assert image["seed"] == max((one["seed"] for one in image["candidates"]), key=lambda s: score(s, scorer="heldout"))
    assert set(image["reported"]) == {"trained"}


def test_a_cascade_answers_with_the_steps_of_each_picture_and_the_floor(live: Service) -> None:
    answer = post(live.url, prompt=PROMPT, seed=list(range(8)), min_reward="p50", cascade=[1, 2, 4]).json()
    floor = answer["floor"]
    assert (floor["min_reward"], floor["percentile"], floor["lowered"]) == ("p50", 50.0, False)
    assert floor["score"] == pytest.approx(0.0, abs=1e-9) and floor["scorer"] == "trained"
    assert {image["steps"] for image in answer["data"]} > {1}
    for image in answer["data"]:
        steps = [one["steps"] for one in image["candidates"]]
        assert steps == [1, 2, 4][: len(steps)]
        assert [score(one["seed"], one["steps"]) < 0 for one in image["candidates"][:-1]] == [True] * (len(steps) - 1)
        expected = expected_pixels(PROMPT, image["seed"], image["steps"])
        assert np.array_equal(pixels(base64.b64decode(image["b64_json"])), expected)
        assert image["below_floor"] == all(score(one["seed"], one["steps"]) < 0 for one in image["candidates"])


def test_a_file_says_in_a_header_that_it_is_below_the_floor(live: Service) -> None:
    fields: dict[str, Any] = {"prompt": PROMPT, "seed": 7, "best_of": 2, "response_format": "file"}
    assert post(live.url, **fields, min_reward=9.0).headers["X-Below-Floor"] == "true"
    assert "X-Below-Floor" not in post(live.url, **fields, min_reward=-9.0).headers


def test_a_stream_and_a_job_tell_the_same(live: Service) -> None:
    response = post(live.url, prompt=PROMPT, seed=7, min_reward=9.0, cascade=[1, 2], stream=True)
    events = [json.loads(line[6:]) for line in response.text.splitlines() if line.startswith("data: ")]
    (completed,) = [event for event in events if event["type"] == "image_generation.completed"]
    assert completed["below_floor"] and [one["steps"] for one in completed["candidates"]] == [1, 2]
    job = call("GET", f"{live.url}/jobs/{completed['id']}").json()
    assert job["floor"]["min_reward"] == 9.0 and job["data"][0]["candidates"][0]["round"] == 1
    assert job["seeds"] == [7] and job["rank_by"] == "trained"


def test_a_repeated_request_finds_the_one_job(live: Service) -> None:
    def ask() -> dict[str, Any]:
        body = {"prompt": PROMPT, "best_of": 4}
        answer = call("POST", f"{live.url}/generate", json=body, headers={"Idempotency-Key": "best-of-four"})
        return answer.json()  # type: ignore[no-any-return]

    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda _: ask(), range(4)))
    assert len({answer["id"] for answer in answers}) == 1
    assert all(answer["data"] == answers[0]["data"] for answer in answers)


@pytest.mark.parametrize(
    ("field", "value"),
    [("best_of", 0), ("best_of", 17), ("best_of", 2.0), ("min_reward", "20"), ("min_reward", "p0"),
     ("min_reward", "p100"), ("min_reward", True), ("cascade", [2]), ("cascade", [0, 2]), ("cascade", "2,4")],
)  # fmt: skip
def test_a_wrong_value_is_refused_by_its_name(live: Service, field: str, value: object) -> None:
    error = post(live.url, prompt=PROMPT, **{field: value}).json()["error"]
    assert (error["code"], error["param"]) == ("invalid_request", field) and error["message"].startswith(field)


def test_a_deadline_in_a_later_round_is_answered_with_the_best_so_far(make_api: Callable[..., Api]) -> None:
    """Nobody draws the second round: a worker of the test's own has drawn the first."""
    api = make_api()
    consumer = Consumer(connect(api.redis_url), "fake", "w", lease_s=60, max_attempts=3)
    with ThreadPoolExecutor(1) as pool:
        asking = pool.submit(
            post, api.url, prompt=PROMPT, seed=7, min_reward=9.0, cascade=[1, 2], timeout_s=2.0, response_format="url"
        )
        (claimed,) = eventually(lambda: consumer.claim({"3|fake|1": 8}), "it waits")
        about = {"seed": 7, "steps": 1, "reward": {"trained": 0.1}, "below_floor": True, "candidates": []}
        image = {"file": "f", "width": 64, "height": 64, "sha256": "0", **about}
        result = {"images": [image], "runtime": "fake", "timings": {}, "next": {"stage": 1, "images": [0]}}
        going = consumer.advance(claimed.id, claimed.token, result, shape="64x64|2", images=1, cost=8)
        assert going == "queued"
        response = asking.result()
    answer = response.json()
    assert response.status_code == 200 and answer["ended_by"] == "expired"
    assert answer["data"][0]["below_floor"] and answer["data"][0]["steps"] == 1


def test_a_worker_that_is_killed_in_the_middle_of_a_cascade_costs_nothing(tmp_path: Path) -> None:
    prompt = "fake:step=0.2 heart"
    with running_service(tmp_path / "data") as service, ThreadPoolExecutor(1) as pool:
        asking = pool.submit(post, service.url, prompt=prompt, seed=[7, 8], min_reward=9.0, cascade=[1, 2, 4])

        def in_the_second_round() -> bool:
            for key in service.redis.scan_iter("fewstep:{fake}:j:*"):
                state, best = service.redis.hmget(key, "state", "best")  # type: ignore[misc]
                if state == "running" and best:
                    return True
            return False

        eventually(in_the_second_round, "the first round is drawn, and the second one begun")
        worker = next(role for role in service.pids() if "worker" in role)
        service.kill(worker)
        answer = asking.result().json()
    for image, seed in zip(answer["data"], (7, 8), strict=True):
        assert [one["steps"] for one in image["candidates"]] == [1, 2, 4] and image["candidates"][0]["seed"] == seed
        best = max(image["candidates"], key=lambda one: score(one["seed"], one["steps"], prompt=prompt))
        assert (image["seed"], image["steps"]) == (best["seed"], best["steps"])
        expected = expected_pixels(prompt, image["seed"], image["steps"])
        assert np.array_equal(pixels(base64.b64decode(image["b64_json"])), expected) and image["below_floor"]


def test_the_floor_falls_while_more_arrives_than_is_drawn_and_comes_back(tmp_path: Path) -> None:
    """Eight images a call of 0.2 s, and 8 s of calls that arrive at once: over a quarter of the 30 s looked back on."""
    prompt = "heart fake:sleep=0.025"
    low = itertools.cycle([seed for seed in range(100) if score(seed, 1, prompt=prompt) < -DEVIATION])

    def floored() -> dict[str, Any]:
        fields = {"prompt": prompt, "seed": next(low), "min_reward": "p99", "cascade": [1, 2, 4], "priority": 5}
        return post(live.url, **fields).json()  # type: ignore[no-any-return]

    def arrive(k: int) -> int:
        body = {"prompt": f"fake:sleep=0.2 {k}", "n": 8, "num_inference_steps": 1}
        return call("POST", f"{live.url}/generate", json=body, headers={"Prefer": "respond-async"}).status_code

    with running_service(tmp_path / "data") as live:
        before = floored()["floor"]
        assert (before["percentile"], before["lowered"]) == (99.0, False)
        with ThreadPoolExecutor(8) as pool:
            assert set(pool.map(arrive, range(40))) == {202}
        during = eventually(lambda: (answer := floored())["floor"]["lowered"] and answer, "it falls")
        floor, (image,) = during["floor"], during["data"]
        further = 2 + 0.5 * 4  # a second round always, a third one half the time
        assert floor["percentile"] == pytest.approx(100 * (1 / floor["utilization"] - 1) / further)
        assert floor["percentile"] < 99
        assert floor["score"] < floor["asked_score"] and (floor["min_reward"], floor["scorer"]) == ("p99", "trained")
        best = max(score(one["seed"], one["steps"], prompt=prompt) for one in image["candidates"])
        assert image["below_floor"] == (best < floor["asked_score"]), "below the floor that was asked for"
        eventually(lambda: time.sleep(0.5) or not floored()["floor"]["lowered"], "it comes back", patience_s=90)


def test_a_models_gains_are_those_of_its_bundle() -> None:
    known = WithinPrompt(
        50, 4, {"trained": 0.5, "heldout": 0.8}, {"heldout trained": 0.3},
        {"trained": [0.0, 0.2, 0.3, 0.4], "heldout": [0.0, 0.3, 0.5, 0.6]},
    )  # fmt: skip
    student = replace(fake_student(), within_prompt={"2": known})
    found = {row.best_of: row for row in gains(student)}
    assert {row.steps for row in found.values()} == {2} and {row.rank_by for row in found.values()} == {"trained"}
    assert found[2].gain == {"trained": 0.2, "heldout": pytest.approx(0.3 * 0.8 * 0.2 / 0.5)}
    assert found[16].gain["trained"] == pytest.approx(0.5 * 1.766, abs=1e-3), "beyond what was measured"
    assert gains(fake_student()) == []


def test_sixty_four_pictures_may_be_drawn_at_a_time() -> None:
    body = GenerateRequest(prompt="p", best_of=16, n=4)
    check(fake_student(), body, lambda prompt: 1, 2**24)
    assert refusal(best_of=13, n=5).param == "best_of", "65"


def test_a_percentile_is_of_the_scorer_that_chooses() -> None:
    student = fake_student()
    known = replace(student, reward_reference={"trained": student.reward_reference["trained"]})
    fields: dict[str, Any] = {"min_reward": "p20", "best_of": 2}
    check(known, GenerateRequest(prompt="p", **fields), lambda prompt: 1, 2**24)
    assert "send a number" in str(refusal(known, **fields, rank_by="heldout"))


@pytest.mark.parametrize("size", [{"size": "64x96"}, {"width": 64, "height": 96}])
def test_a_percentile_is_of_the_size_and_the_steps_that_are_asked_for(size: dict[str, Any]) -> None:
    """At that size and two steps the student's own scores are not known as percentiles, elsewhere they are."""
    student = fake_student()
    known, bare = student.reward_reference["trained"], RewardReference(0.0, 1.0, {})
    at = {"1": known, "2": known, "4": known, "2 64x96": bare}
    student = replace(student, reward_reference={"trained": replace(known, at=at)})

    def checked(**fields: Any) -> None:
        body = GenerateRequest(prompt="p", min_reward="p20", best_of=2, **fields)
        check(student, body, lambda prompt: 1, 2**24, sizes=((96, 64),))

    for fields in ({"num_inference_steps": 2}, size, {**size, "num_inference_steps": 4}):
        checked(**fields)
    with pytest.raises(InvalidRequest, match="send a number"):
        checked(**size, num_inference_steps=2)


def test_a_floor_of_zero_is_a_floor() -> None:
    """The teacher's mean: the score that is asked for most naturally."""
    fields: dict[str, Any] = {"seed": 7, "min_reward": 0.0}
    job = job_of(**fields, best_of=4)
    assert (job.min_reward, job.rank_by, job.candidates, job.images) == (0.0, "trained", 4, 1)
    assert job.cost == job_of(seed=7).cost and len(job.candidate_seeds[0]) == 4
    assert job_of(**fields, cascade=[1, 2]).cascade == (1, 2)
    check(fake_student(), GenerateRequest(prompt="p", **fields, best_of=4), lambda prompt: 1, 64 * 64)
    assert refusal(**fields).param == "min_reward" and "needs best_of or cascade" in str(refusal(**fields))
    assert refusal(**fields, cascade=[2, 1]).param == "cascade"
    assert refusal(replace(fake_student(), scorers={}), **fields, cascade=[1, 2]).param == "min_reward"


def test_a_student_whose_median_is_zero_knows_its_own_scores() -> None:
    known = RewardReference(0.0, 1.0, {"0": -1.0, "50": 0.0, "100": 1.0})
    student = replace(fake_student(), reward_reference={"trained": known})
    check(student, GenerateRequest(prompt="p", min_reward="p20", best_of=2), lambda prompt: 1, 2**24)

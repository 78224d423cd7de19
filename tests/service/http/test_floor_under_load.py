"""The floor under a load that lasts, over HTTP: what the rule allows is drawn again, answer by answer."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.service.support import call, eventually, post, running_service

IMAGES, STEP_S, EVERY_S, JOBS = 8, 0.04, 0.4, 15  # first rounds take 0.8 of the worker's time, for six seconds
CASCADE, FURTHER = [1, 2, 4], 2 + 0.5 * 4  # a second round always, a third one half the time


def prompt_of(number: int) -> str:
    return f"fake:image={STEP_S} {number}"


def test_while_a_load_lasts_only_what_the_lowered_floor_allows_is_drawn_again(tmp_path: Path) -> None:
    """Arrivals of the last 30 s count: so much was asked for before, and cancelled, that the load is there at once."""

    def plain(number: int) -> str:
        body = {"prompt": prompt_of(number), "n": IMAGES, "num_inference_steps": 4}
        answer = call("POST", f"{live.url}/generate", json=body, headers={"Prefer": "respond-async"})
        assert answer.status_code == 202
        return str(answer.json()["id"])

    def floored(number: int, due_s: float) -> dict[str, Any]:
        time.sleep(max(0.0, due_s - time.monotonic()))
        fields = {"seed": [number * IMAGES + k for k in range(IMAGES)], "min_reward": "p50", "cascade": CASCADE}
        answer = post(live.url, prompt=prompt_of(number), **fields)
        assert answer.status_code == 200
        return answer.json()  # type: ignore[no-any-return]

    with running_service(tmp_path / "data") as live, ThreadPoolExecutor(JOBS) as pool:
        first = plain(0)
        eventually(lambda: call("GET", f"{live.url}/jobs/{first}").json()["status"] == "done", "a time is known")
        before = list(pool.map(plain, range(1, round(30 / EVERY_S / 4))))
        for id in before:
            assert call("POST", f"{live.url}/jobs/{id}/cancel").is_success
        start_s = time.monotonic()
        due_s = [start_s + EVERY_S * k for k in range(JOBS)]
        answers = list(pool.map(floored, range(1000, 1000 + JOBS), due_s))

    for answer in answers:
        floor, images = answer["floor"], answer["data"]
        if "utilization" not in floor:  # the workers were not asked: every image reached the floor at once
            assert not any(image["below_floor"] for image in images)
            continue
        assert floor["percentile"] == pytest.approx(min(50.0, max(0.0, 100 * (1 / floor["utilization"] - 1) / FURTHER)))
        assert floor["lowered"] == (floor["percentile"] < 50) == (floor["score"] < floor["asked_score"])
        for image in images:
            best = max(one["reward"]["trained"] for one in image["candidates"])
            assert image["below_floor"] == (best < floor["asked_score"])
        if all(len(image["candidates"]) == 1 for image in images):  # this floor decided on every image
            first_scores = [image["candidates"][0]["reward"]["trained"] for image in images]
            assert floor["percentile"] == 0 or min(first_scores) >= floor["score"]
    lowered = [answer for answer in answers if answer["floor"]["lowered"]]
    assert len(lowered) > JOBS / 2, [answer["floor"].get("utilization") for answer in answers]
    drawn = [image for answer in lowered for image in answer["data"]]
    assert any(image["below_floor"] and len(image["candidates"]) == 1 for image in drawn), "some are left as they are"

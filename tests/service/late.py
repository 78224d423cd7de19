"""FEWSTEP_SCORE=after under load: each picture arrives, and each score once, in the record, the events and metrics."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from typing import Any

from tests.service.http.test_events import listen
from tests.service.observe.test_metrics import read
from tests.service.support import PATIENCE_S, Service, call, eventually, post

THREADS = 4
ENDS = ("done", "lost", "skipped")
Answer = dict[str, Any]


@contextmanager
def load(url: str, bodies: Sequence[dict[str, Any]]) -> Iterator[list[Future[Answer]]]:
    """The requests, sent by some threads at once; a service without a worker is asked again."""
    with ThreadPoolExecutor(THREADS) as pool:
        asked = [pool.submit(_ask, url, body) for body in bodies]
        yield asked
        wait(asked)


def _ask(url: str, body: dict[str, Any]) -> Answer:
    deadline = time.monotonic() + PATIENCE_S
    while (answer := post(url, **body)).status_code == 503 and time.monotonic() < deadline:
        time.sleep(0.1)
    assert answer.status_code == 200, answer.text
    found: Answer = answer.json()
    return found


def answered(asked: Sequence[Future[Answer]], count: int) -> bool:
    """Whether so many answers have come."""
    return sum(one.done() for one in asked) >= count


def settled(live: Service, answers: Sequence[Answer]) -> list[Answer]:
    """The records of these jobs once nothing more will be said of their scores."""

    def ended(id: str) -> Any:
        job = call("GET", f"{live.url}/jobs/{id}").json()
        return job["scoring"] in ENDS and job

    return [eventually(lambda id=answer["id"]: ended(id), "the scores have come or are lost") for answer in answers]  # type: ignore[misc]


def check_each_once(live: Service, jobs: Sequence[Answer], scorers: Sequence[str]) -> dict[str, int]:
    """The events say once what the record says, and the metrics count each once; returns the jobs by their end.

    ``jobs`` are all that the service has had; each of ``scorers`` has scored every picture that has scores.
    """
    for job in jobs:
        events = listen("GET", f"{live.url}/jobs/{job['id']}/events")
        assert [event.name for event in events].count("scored") == 1 and events[-1].name == "scored"
        assert events[-1].data["scoring"] == job["scoring"]
        said = [image["reward"] for image in events[-1].data["data"]]
        assert said == [image["reward"] for image in job["data"]]
        assert all(set(scorers) <= reward.keys() if job["scoring"] == "done" else reward == {} for reward in said)
    ends = {end: sum(job["scoring"] == end for job in jobs) for end in ENDS}
    pictures = sum(len(job["data"]) for job in jobs if job["scoring"] == "done")
    eventually(lambda: _counted(live, "late_scores_total", "end", ends), f"each is counted once: {ends}")
    wanted = dict.fromkeys(scorers, pictures)
    eventually(lambda: _counted(live, "reward_score_count", "scorer", wanted), f"each score is counted once: {wanted}")
    return ends


def _counted(live: Service, name: str, label: str, wanted: dict[str, int]) -> bool:
    samples, found = read(call("GET", f"{live.url}/metrics").text), dict.fromkeys(wanted, 0.0)
    for (sample, labels), count in samples.items():
        if sample == f"fewstep_{name}" and (word := dict(labels)[label]) in found:
            found[word] += count
    return found == wanted

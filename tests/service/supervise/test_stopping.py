"""The end of a process on SIGTERM: nothing accepted is lost, nothing is drawn twice, no attempt is counted."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import httpx

from tests.service.support import (
    PATIENCE_S,
    Api,
    call,
    check_answer,
    eventually,
    open_post,
    post,
    running_service,
    start_worker,
)

STOP_LIMIT_S = 30


@contextmanager
def worker(api: Api, folder: Path, **settings: str) -> Iterator[object]:
    process = start_worker(api.redis_url, folder / "data", **settings)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def later(api: Api, prompt: str) -> str:
    body = {"prompt": prompt, "seed": 1}
    accepted = call("POST", f"{api.url}/generate", headers={"Prefer": "respond-async"}, json=body)
    return str(accepted.json()["id"])


def running(api: Api) -> bool:
    return bool(api.redis.zcard(f"{api.prefix}l"))


def test_a_worker_ends_what_it_draws_and_takes_nothing_more(make_api: Callable[..., Api], tmp_path: Path) -> None:
    api = make_api()
    process = start_worker(api.redis_url, tmp_path / "data", GRACE_S="60")
    try:
        held = later(api, "fake:sleep=2 held")
        eventually(lambda: running(api), "it draws")
        waiting = later(api, "waiting")
        process.send_signal(signal.SIGTERM)
        assert process.wait(STOP_LIMIT_S) == 0
    finally:
        process.kill()
        process.wait()
    first, second = api.hash_of(held), api.hash_of(waiting)
    assert (first["state"], first["attempts"]) == ("done", "1")
    assert (second["state"], second["attempts"]) == ("queued", "0")
    assert not api.redis.exists(f"{api.prefix}wk"), "whoever has left counts as a worker no more"


def test_a_worker_hands_back_what_takes_too_long_and_the_attempt_is_not_counted(
    make_api: Callable[..., Api], tmp_path: Path
) -> None:
    """With one attempt allowed, a job whose attempt was counted could not be drawn any more."""
    api = make_api(MAX_ATTEMPTS="1")
    id = later(api, "fake:sleep=12 long")
    for _ in range(3):
        process = start_worker(api.redis_url, tmp_path / "data", GRACE_S="0", MAX_ATTEMPTS="1")
        try:
            eventually(lambda: running(api), "it draws")
            process.send_signal(signal.SIGTERM)
            assert process.wait(STOP_LIMIT_S) == 0
        finally:
            process.kill()
            process.wait()
        report = api.hash_of(id)
        assert (report["state"], report["attempts"]) == ("queued", "0") and not running(api)
    with worker(api, tmp_path, MAX_ATTEMPTS="1"):
        eventually(lambda: api.hash_of(id)["state"] == "done", "the job is done")
    assert api.hash_of(id)["attempts"] == "1"
    assert b"".join(part for part in [call("GET", f"{api.url}/jobs/{id}/images/0").content]).startswith(b"\x89PNG")


def test_a_stopping_api_says_so_first_and_still_takes_requests_until_it_is_believed(
    make_api: Callable[..., Api], tmp_path: Path
) -> None:
    api = make_api(DRAIN_S="600", GRACE_S="60")
    with worker(api, tmp_path):
        eventually(lambda: call("GET", f"{api.url}/readyz").status_code == 200, "ready")
        api.process.send_signal(signal.SIGTERM)
        ready = eventually(lambda: (r := call("GET", f"{api.url}/readyz")).status_code == 503 and r)
        assert ready.json()["error"]["message"] == "The service is stopping." and "Retry-After" in ready.headers
        assert call("GET", f"{api.url}/healthz").status_code == 200
        check_answer(post(api.url, prompt="p", seed=1).json(), "p", [1])
        api.process.send_signal(signal.SIGTERM)  # the second time at once
        assert api.process.wait(STOP_LIMIT_S) == 0


def test_whoever_waits_is_answered_if_the_picture_comes_in_time(make_api: Callable[..., Api], tmp_path: Path) -> None:
    api = make_api(GRACE_S="60")
    with worker(api, tmp_path), ThreadPoolExecutor() as pool:
        asked = pool.submit(post, api.url, prompt="fake:sleep=2 p", seed=1)
        eventually(lambda: running(api), "it is drawn")
        api.process.send_signal(signal.SIGTERM)
        check_answer(asked.result().json(), "fake:sleep=2 p", [1])
        assert api.process.wait(STOP_LIMIT_S) == 0


def test_whoever_waits_in_vain_is_told_where_the_job_is_and_another_process_has_it(
    make_api: Callable[..., Api], tmp_path: Path
) -> None:
    first, second = make_api(GRACE_S="0.2"), make_api()
    with ThreadPoolExecutor() as pool:
        asked = pool.submit(post, first.url, prompt="p", seed=1)
        eventually(lambda: first.waiting() == 1)
        first.process.send_signal(signal.SIGTERM)
        answer = asked.result()
    assert answer.status_code == 503 and answer.json()["error"]["code"] == "unavailable"
    where = answer.headers["Location"]
    assert where in answer.json()["error"]["message"] and first.process.wait(STOP_LIMIT_S) == 0
    with worker(second, tmp_path):
        eventually(lambda: call("GET", second.url + where).json()["status"] == "done", "the job is done")


def test_a_stream_that_ends_with_its_process_goes_on_at_another(make_api: Callable[..., Api], tmp_path: Path) -> None:
    first, second = make_api(GRACE_S="0.2"), make_api()
    with open_post(first.url, prompt="p", seed=1, stream=True) as stream:
        eventually(lambda: first.waiting() == 1)
        first.process.send_signal(signal.SIGTERM)
        stream.settimeout(PATIENCE_S)
        while stream.recv(65536):
            pass
    assert first.process.wait(STOP_LIMIT_S) == 0
    [id] = second.ids()
    with worker(second, tmp_path):
        events = call("GET", f"{second.url}/jobs/{id}/events", headers={"Last-Event-ID": "0"}).text
    assert "event: started" in events and "event: done" in events


def test_a_service_that_is_stopped_under_load_loses_no_job(tmp_path: Path) -> None:
    """Every job that was accepted is done after the next start, and in one counted attempt."""
    with running_service(tmp_path / "data") as service, ThreadPoolExecutor(4) as pool:
        accepted: list[str] = []
        enough = threading.Event()

        def ask(k: int) -> None:
            body = {"prompt": f"fake:sleep=0.1 client {k}", "seed": k}
            try:
                answer = call("POST", f"{service.url}/generate", headers={"Prefer": "respond-async"}, json=body)
            except (httpx.HTTPError, FileNotFoundError):  # it has stopped meanwhile
                return
            if answer.status_code == 202:
                accepted.append(answer.json()["id"])
            if len(accepted) >= 20:
                enough.set()

        asked = [pool.submit(ask, k) for k in range(60)]
        assert enough.wait(PATIENCE_S)
        assert service.stop() == 0
        for future in asked:
            future.result()
    with running_service(tmp_path / "data") as service:
        states = [f"fewstep:{{fake}}:j:{id}" for id in accepted]
        eventually(lambda: {service.redis.hget(key, "state") for key in states} == {"done"}, "all are done")
        assert {service.redis.hget(key, "attempts") for key in states} == {"1"}

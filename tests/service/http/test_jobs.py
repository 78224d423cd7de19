"""Jobs over HTTP: later instead of now, found again, cancelled, repeated, and given up with their clients."""

from __future__ import annotations

import base64
import json
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import numpy as np
import pytest

from service.http.preferences import Preference, read_preference
from service.queue.connection import connect
from service.queue.consumer import Consumer
from tests.service.http.test_http import check_error
from tests.service.support import Api, Service, call, eventually, expected_pixels, open_post, pixels, post

ASYNC = {"Prefer": "respond-async"}
LONG = {"REQUEST_TIMEOUT_S": "600"}
STATUS_FIELDS = {
    "id", "status", "created", "model", "model_version", "prompt", "seeds", "user", "metadata", "priority",
    "cancelling", "queue", "data", "runtime", "batch_size", "timings", "scoring", "error",
    "started", "finished", "expires_at", "key", "rank_by", "floor", "ended_by", "progress",
}  # fmt: skip


def post_with(url: str, headers: dict[str, str], **fields: Any) -> httpx.Response:
    return call("POST", f"{url}/generate", json=fields, headers=headers)


def status(url: str, id: str) -> dict[str, Any]:
    response = call("GET", f"{url}/jobs/{id}")
    assert response.status_code == 200, response.text
    return response.json()  # type: ignore[no-any-return]


def done(url: str, id: str) -> dict[str, Any]:
    return eventually(lambda: found if (found := status(url, id))["status"] == "done" else {}, "the job is done")


@pytest.mark.parametrize(
    ("header", "expected"),
    [
        ("", Preference()),
        ("respond-async", Preference(True)),
        ("Respond-Async; x=y", Preference(True)),
        ("wait=10", Preference(False, 10)),
        ("respond-async, wait = 7", Preference(True, 7)),
        ('wait="3"', Preference(False, 3)),
        ("wait=5, wait=6", Preference(False, 5)),
        ("wait=soon, handling=lenient", Preference()),
        ("wait=-1", Preference()),
        ("wait=999999999", Preference(False, 3600)),
    ],
)
def test_preferences_are_read_as_the_rfc_has_it(header: str, expected: Preference) -> None:
    assert read_preference(header) == expected


def test_a_job_is_accepted_at_once_found_while_it_waits_and_when_it_is_done(live: Service) -> None:
    response = post_with(live.url, ASYNC, prompt="later", seed=[4, 2], user="me", metadata={"page": "12"})
    assert response.status_code == 202 and response.headers["Preference-Applied"] == "respond-async"
    job = response.json()
    assert set(job) == STATUS_FIELDS and response.headers["Location"] == f"/jobs/{job['id']}"
    assert job["status"] in ("queued", "running", "done") and job["seeds"] == [4, 2]
    answer = done(live.url, job["id"])
    assert set(answer) == STATUS_FIELDS and answer["error"] is None and answer["queue"] is None
    assert (answer["user"], answer["metadata"], answer["prompt"]) == ("me", {"page": "12"}, "later")
    for k, image in enumerate(answer["data"]):
        assert image["url"].startswith(f"{live.url}/jobs/{job['id']}/images/{k}?") and image["b64_json"] is None
        picture = call("GET", image["url"])
        assert np.array_equal(pixels(picture.content), expected_pixels("later", [4, 2][k]))
    assert answer["timings"]["total_s"] > 0


def test_images_that_are_not_there_yet_or_never_will_be(make_api: Callable[..., Api], live: Service) -> None:
    api = make_api(**LONG)
    id = post_with(api.url, ASYNC, prompt="p").json()["id"]
    assert "queued" in check_error(call("GET", f"{api.url}/jobs/{id}/images/0"), 409, "conflict")
    call("POST", f"{api.url}/jobs/{id}/cancel")
    check_error(call("GET", f"{api.url}/jobs/{id}/images/0"), 404, "not_found")
    id = post(live.url, prompt="p").json()["id"]
    check_error(call("GET", f"{live.url}/jobs/{id}/images/1"), 404, "not_found")
    for wrong in ("-1", "x", "1.5"):
        check_error(call("GET", f"{live.url}/jobs/{id}/images/{wrong}"), 422, "invalid_request", "k")


@pytest.mark.parametrize("id", ["0" * 32, "x", "..%2f", "0" * 31 + "G", "0" * 10_000])
def test_a_job_that_is_none_is_not_found(live: Service, id: str) -> None:
    for method, path in (("GET", ""), ("POST", "/cancel"), ("GET", "/events"), ("GET", "/images/0")):
        check_error(call(method, f"{live.url}/jobs/{id}{path}"), 404, "not_found")


def test_somebody_elses_job_is_as_unknown_as_none(make_api: Callable[..., Api]) -> None:
    api = make_api(**LONG)
    id = post_with(api.url, ASYNC, prompt="p").json()["id"]
    api.redis.hset(f"{api.prefix}j:{id}", "key", "somebody")
    for method, path in (("GET", ""), ("POST", "/cancel"), ("GET", "/events"), ("GET", "/images/0")):
        check_error(call(method, f"{api.url}/jobs/{id}{path}"), 404, "not_found")
    assert api.hash_of(id)["state"] == "queued"


def test_a_job_that_another_version_wrote_is_not_fallen_over(make_api: Callable[..., Api]) -> None:
    api = make_api(**LONG)
    id = post_with(api.url, ASYNC, prompt="p").json()["id"]
    api.redis.hset(f"{api.prefix}j:{id}", "payload", '{"schema_version": 99}')
    check_error(call("GET", f"{api.url}/jobs/{id}"), 404, "not_found")


def test_a_waiting_job_tells_its_place(make_api: Callable[..., Api]) -> None:
    api = make_api(**LONG)
    ids = [post_with(api.url, ASYNC, prompt="p").json()["id"] for _ in range(3)]
    assert [status(api.url, id)["queue"]["position"] for id in ids] == [0, 1, 2]
    urgent = post_with(api.url, ASYNC, prompt="p", priority=5).json()
    assert urgent["queue"]["position"] == 0 and status(api.url, ids[0])["queue"]["position"] == 1


def test_cancelling_a_waiting_job_is_final_and_can_be_repeated(make_api: Callable[..., Api]) -> None:
    api = make_api(**LONG)
    id = post_with(api.url, ASYNC, prompt="p").json()["id"]
    for _ in range(3):
        response = call("POST", f"{api.url}/jobs/{id}/cancel")
        assert response.status_code == 200
        assert (response.json()["status"], response.json()["error"]["code"]) == ("cancelled", "cancelled")
    assert api.waiting() == 0


def test_cancelling_a_finished_job_changes_nothing(live: Service) -> None:
    id = post(live.url, prompt="p", seed=1).json()["id"]
    answer = call("POST", f"{live.url}/jobs/{id}/cancel").json()
    assert (answer["status"], answer["error"], len(answer["data"])) == ("done", None, 1)


def test_a_running_job_is_dropped_at_a_step_and_the_worker_goes_on(live: Service) -> None:
    id = post_with(live.url, ASYNC, prompt="fake:step=3 long").json()["id"]
    eventually(lambda: status(live.url, id)["status"] == "running", "it runs")
    answer = call("POST", f"{live.url}/jobs/{id}/cancel").json()
    assert (answer["status"], answer["cancelling"]) in (("running", True), ("cancelled", False))
    eventually(lambda: status(live.url, id)["status"] == "cancelled", "it is dropped")
    assert post(live.url, prompt="next", seed=1).status_code == 200
    assert "generated 0 of 1 jobs" in live.output.read_text()
    assert not list((live.data_dir / "results").glob(f"*/{id}/*/*"))


def test_a_client_that_waits_is_told_that_somebody_cancelled(make_api: Callable[..., Api]) -> None:
    api = make_api(**LONG)
    with ThreadPoolExecutor() as pool:
        waiting = pool.submit(post, api.url, prompt="p")
        [id] = eventually(lambda: api.ids() if api.waiting() else [], "it waits")
        call("POST", f"{api.url}/jobs/{id}/cancel")
        check_error(waiting.result(), 409, "cancelled")


def test_waiting_a_while_gives_the_answer_or_the_job(make_api: Callable[..., Api], live: Service) -> None:
    response = post_with(live.url, {"Prefer": "wait=20"}, prompt="p", seed=1)
    assert response.status_code == 200 and response.headers["Preference-Applied"] == "wait=20"
    assert np.array_equal(pixels(base64.b64decode(response.json()["data"][0]["b64_json"])), expected_pixels("p", 1))
    api = make_api(**LONG)
    response = post_with(api.url, {"Prefer": "wait=1"}, prompt="p", response_format="file")
    assert response.status_code == 202 and response.headers["Preference-Applied"] == "wait=1"
    [id] = api.ids()
    assert response.headers["Location"] == f"/jobs/{id}" and api.hash_of(id)["state"] == "queued"


def start(key: str = "", **headers: str) -> dict[str, str]:
    return {**({"Idempotency-Key": key} if key else {}), **headers}


def attended_by_two(api: Api) -> list[str]:
    """The ids of the jobs for which two clients wait."""
    return [id for id in api.ids() if api.redis.scard(f"{api.prefix}a:{id}") == 2]


def test_a_client_that_goes_away_before_wait_is_over_takes_its_job_with_it(make_api: Callable[..., Api]) -> None:
    api = make_api(**LONG)
    connection = open_post(api.url, start(Prefer="wait=600"), prompt="p")
    eventually(lambda: api.waiting() == 1)
    connection.close()
    eventually(lambda: api.states() == ["cancelled"])


def test_a_job_that_was_asked_for_asynchronously_outlives_its_client(make_api: Callable[..., Api]) -> None:
    api = make_api(**LONG)
    for prefer in ("respond-async", "respond-async, wait=600"):
        connection = open_post(api.url, start(Prefer=prefer), prompt="p")
        eventually(lambda: api.waiting() == 1)
        connection.close()
        sync = open_post(api.url, prompt="p")
        eventually(lambda: api.waiting() == 2)
        sync.close()
        eventually(lambda: sorted(api.states())[0] == "cancelled", "disconnections are noticed in order")
        assert api.waiting() == 1
        api.redis.flushall()


def test_fifty_requests_with_one_key_are_one_execution_with_fifty_equal_answers(live: Service) -> None:
    said = "generated 1 of 1 jobs"
    before = live.output.read_text().count(said)
    with ThreadPoolExecutor(50) as pool:
        ask = lambda _: post_with(live.url, start("fifty"), prompt="fake:step=0.3 once")  # noqa: E731
        answers = list(pool.map(ask, range(50)))
    assert {answer.status_code for answer in answers} == {200} and len({answer.text for answer in answers}) == 1
    assert post_with(live.url, start("fifty"), prompt="fake:step=0.3 once").text == answers[0].text
    eventually(lambda: live.output.read_text().count(said) > before, "the line is written")
    assert live.output.read_text().count(said) == before + 1
    error = post_with(live.url, start("fifty"), prompt="another")
    check_error(error, 422, "idempotency_mismatch", "Idempotency-Key")


def test_a_repeated_request_may_be_written_in_another_way_and_be_answered_in_another(live: Service) -> None:
    first = post_with(live.url, start("spelling"), prompt="p", n=1).json()
    assert post_with(live.url, start("spelling"), num_images_per_prompt=1, prompt="p").json() == first
    later = post_with(live.url, start("spelling", **ASYNC), prompt="p")
    assert later.status_code == 202 and later.json()["id"] == first["id"] and later.json()["status"] == "done"


@pytest.mark.parametrize("key", ["", "x" * 256, "a b"])
def test_a_key_that_is_none(live: Service, key: str) -> None:
    response = post_with(live.url, {"Idempotency-Key": key}, prompt="p")
    check_error(response, 422, "invalid_request", "Idempotency-Key")


def test_a_job_with_a_key_outlives_all_its_clients_for_a_while(make_api: Callable[..., Api]) -> None:
    api = make_api(RETRY_GRACE_S="600", **LONG)
    clients = [open_post(api.url, start("k"), prompt="p") for _ in range(2)]
    [id] = eventually(lambda: attended_by_two(api), "two wait")
    for client in clients:
        client.close()
    eventually(lambda: api.redis.zcard(f"{api.prefix}ab") == 1, "it is abandoned")
    assert api.states() == ["queued"]
    with open_post(api.url, start("k"), prompt="p"):
        eventually(lambda: api.redis.zcard(f"{api.prefix}ab") == 0, "a retry has found it")
    eventually(lambda: api.redis.zcard(f"{api.prefix}ab") == 1)
    api.redis.zadd(f"{api.prefix}ab", {id: 1})
    eventually(lambda: api.states() == ["cancelled"], "its time is over")


def test_a_job_is_cancelled_with_the_last_of_its_clients_not_with_the_first(make_api: Callable[..., Api]) -> None:
    api = make_api(RETRY_GRACE_S="0", **LONG)
    first = open_post(api.url, start("k"), prompt="p")
    eventually(lambda: api.waiting() == 1)
    second = open_post(api.url, start("k"), prompt="p")
    [id] = eventually(lambda: attended_by_two(api), "two wait")
    first.close()
    eventually(lambda: api.redis.scard(f"{api.prefix}a:{id}") == 1)
    assert api.states() == ["queued"]
    second.close()
    eventually(lambda: api.states() == ["cancelled"])


def test_a_retry_at_another_process_gets_the_answer_of_the_same_job(make_api: Callable[..., Api]) -> None:
    first, second = make_api(**LONG), make_api(**LONG)
    with ThreadPoolExecutor() as pool:
        answers = [pool.submit(post_with, first.url, start("k"), prompt="p", seed=1)]
        eventually(lambda: first.waiting() == 1)
        answers.append(pool.submit(post_with, second.url, start("k"), prompt="p", seed=1))
        [id] = eventually(lambda: attended_by_two(first), "two wait")
        worker = Consumer(connect(first.redis_url), "fake", "w", lease_s=60, max_attempts=3)
        [claimed] = worker.claim({first.hash_of(id)["lane"]: 8})
        worker.finish(id, claimed.token, "failed", {"error": {"code": "generation_failed", "message": "No."}})
        for answer in answers:
            assert answer.result().json()["error"]["message"] == "No."


def test_a_deadline_can_be_chosen_and_passes_with_504(make_api: Callable[..., Api]) -> None:
    api = make_api(**LONG)
    check_error(post(api.url, prompt="p", timeout_s=0.2), 504, "deadline_exceeded")
    assert api.waiting() == 0 and api.states() == ["expired"]
    id = post_with(api.url, ASYNC, prompt="p", timeout_s=0.1).json()["id"]
    answer = eventually(lambda: found if (found := status(api.url, id))["status"] == "expired" else {}, "it expires")
    assert answer["error"]["code"] == "deadline_exceeded"


def test_refusals_say_when_to_come_back(make_api: Callable[..., Api]) -> None:
    api = make_api(MAX_PENDING="3", **LONG)
    for _ in range(3):
        post_with(api.url, ASYNC, prompt="p")
    pace = {"jobs": 0, "work": 0, "busy": 0, "means": [4e6 / 16]}
    api.redis.hset(f"{api.prefix}rt", "3|fake|1", json.dumps(pace))
    full = post(api.url, prompt="p")
    check_error(full, 503, "queue_full")
    assert 4 <= int(full.headers["Retry-After"]) <= 8, "one job of four seconds, and not all come back at once"
    call("POST", f"{api.url}/jobs/{api.ids()[0]}/cancel")
    late = post(api.url, prompt="p", timeout_s=2.5)
    check_error(late, 504, "deadline_exceeded", "timeout_s")
    assert late.headers["Retry-After"] in ("6", "10"), (
        "5.5 s with its own four if it ties with the last one, else 9.5 s"
    )
    assert api.waiting() == 2
    metrics = call("GET", f"{api.url}/metrics").text
    for reason in ("full", "late"):
        assert f'fewstep_rejected_requests_total{{reason="{reason}"}} 1.0' in metrics


def test_who_has_not_said_how_long_it_waits_is_refused_where_others_have_left(make_api: Callable[..., Api]) -> None:
    api = make_api(**LONG)
    for _ in range(6):
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{api.url}/generate", json={"prompt": "p"}, timeout=0.3, trust_env=False)
    eventually(lambda: api.states() == ["cancelled"] * 6, "their jobs are cancelled")
    for _ in range(2):
        post_with(api.url, ASYNC, prompt="p")
    pace = {"jobs": 0, "work": 0, "busy": 0, "means": [4e6 / 16]}
    api.redis.hset(f"{api.prefix}rt", "3|fake|1", json.dumps(pace))
    left = post(api.url, prompt="p")
    check_error(left, 503, "queue_full")
    assert "timeout_s" in left.json()["error"]["message"] and int(left.headers["Retry-After"]) >= 11
    assert post_with(api.url, ASYNC, prompt="p").status_code == 202
    assert post_with(api.url, {"Prefer": "wait=0"}, prompt="p").status_code == 202
    asked = {"prompt": "p", "stream": True}
    with httpx.stream("POST", f"{api.url}/generate", json=asked, timeout=5.0, trust_env=False) as stream:
        assert stream.status_code == 200
    check_error(post(api.url, prompt="p", timeout_s=0.4), 504, "deadline_exceeded", "timeout_s")
    with pytest.raises(httpx.ReadTimeout):  # it is accepted
        httpx.post(f"{api.url}/generate", json={"prompt": "p", "timeout_s": 60}, timeout=0.5, trust_env=False)
    assert 'fewstep_rejected_requests_total{reason="left"} 1.0' in call("GET", f"{api.url}/metrics").text


def test_a_quota_that_is_used_up_is_429(make_api: Callable[..., Api]) -> None:
    api = make_api(QUOTA="0.032", **LONG)
    assert [post_with(api.url, ASYNC, prompt="p").status_code for _ in range(2)] == [202, 202]
    response = post_with(api.url, ASYNC, prompt="p")
    check_error(response, 429, "quota_exceeded")
    assert 1 <= int(response.headers["Retry-After"]) <= 30


@pytest.mark.parametrize(
    ("fields", "headers", "param"),
    [
        ({"priority": 6}, {}, "priority"),
        ({"priority": 1.5}, {}, "priority"),
        ({"timeout_s": 0}, {}, "timeout_s"),
        ({"timeout_s": 3601}, {}, "timeout_s"),
        ({"timeout_s": "1"}, {}, "timeout_s"),
        ({"stream": 1}, {}, "stream"),
        ({"stream": True}, ASYNC, "stream"),
        ({"stream": True}, {"Prefer": "wait=3"}, "stream"),
        ({"stream": True, "response_format": "file"}, {}, "response_format"),
        ({"partial_images": 4, "stream": True}, {}, "partial_images"),
        ({"partial_images": -1, "stream": True}, {}, "partial_images"),
        ({"partial_images": 1}, {}, "partial_images"),
    ],
)
def test_a_wrong_manner_of_asking_is_named(
    live: Service, fields: dict[str, Any], headers: dict[str, str], param: str
) -> None:
    assert param in check_error(post_with(live.url, headers, prompt="p", **fields), 422, "invalid_request", param)


def test_a_fused_runtime_shows_no_previews_and_says_so(make_api: Callable[..., Api]) -> None:
    api = make_api(**LONG)
    fused = Consumer(connect(api.redis_url), "fake", "w", lease_s=60, max_attempts=3)
    fused.beat({"runtime": "onnx-fused-fp32", "host": "h", "max_batch": 8, "shows_steps": False}, [])
    response = post_with(api.url, ASYNC, prompt="p", partial_images=1)
    assert "has no previews" in check_error(response, 422, "invalid_request", "partial_images")
    staged = Consumer(connect(api.redis_url), "fake", "v", lease_s=60, max_attempts=3)
    staged.beat({"runtime": "onnx-staged-fp32", "host": "h", "max_batch": 8, "shows_steps": True}, [])
    assert post_with(api.url, ASYNC, prompt="p", partial_images=1).status_code == 202
    assert json.loads(api.hash_of(api.ids()[0])["payload"])["previews"] == 1


def test_jobs_are_listed_newest_first_and_within_bounds(live: Service) -> None:
    ids = [post(live.url, prompt="a red heart").json()["id"] for _ in range(3)]
    answer = call("GET", f"{live.url}/jobs", params={"limit": 2})
    assert [job["id"] for job in answer.json()["data"]] == ids[:0:-1]
    assert answer.json()["data"][0] == call("GET", f"{live.url}/jobs/{ids[2]}").json()
    for limit in ("0", "101", "many"):
        refused = call("GET", f"{live.url}/jobs", params={"limit": limit})
        assert refused.status_code == 422 and refused.json()["error"]["param"] == "limit"


def test_an_image_whose_store_cannot_be_reached_has_not_expired(live: Service) -> None:
    """Where the folder of the job's results was, there is something that cannot be read as one."""
    id = post(live.url, prompt="a red heart", seed=3).json()["id"]
    image = call("GET", f"{live.url}/jobs/{id}").json()["data"][0]["url"]
    folder = live.data_dir / "results" / id[:2] / id
    shutil.move(folder, kept := folder.with_name(f"{id}-kept"))
    assert call("GET", image).status_code == 404
    folder.write_bytes(b"")
    answer = call("GET", image)
    assert answer.status_code == 503 and answer.json()["error"]["message"].startswith("The result store cannot be")
    folder.unlink()
    shutil.move(kept, folder)
    assert call("GET", image).status_code == 200

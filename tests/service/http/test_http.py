"""The contract of POST /generate and its neighbours, on a whole service."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import numpy as np
import pytest

from service.errors import STATUS
from service.queue.connection import connect
from service.queue.consumer import Consumer
from service.results.formats import MEDIA_TYPES, PICTURES
from student.runtimes.fake import FakeRuntime
from tests.service.support import Api, Service, call, check_answer, expected_pixels, pixels, post
from tests.service.worker.test_pictures import described


def get(live: Service, path: str, **options: Any) -> httpx.Response:
    return httpx.get(live.url + path, trust_env=False, **options)


def check_error(response: httpx.Response, status: int, code: str, param: str | None = None) -> str:
    """The one form of an error; returns its message."""
    assert response.status_code == status == STATUS[code], response.text
    body = response.json()
    assert set(body) == {"error", "request_id"} and set(body["error"]) == {"message", "type", "param", "code"}
    assert (body["error"]["code"], body["error"]["param"]) == (code, param)
    kind = {429: "rate_limit_error"}.get(status, "server_error" if status >= 500 else "invalid_request_error")
    assert body["error"]["type"] == kind
    assert body["request_id"] == response.headers["X-Request-ID"]
    message = str(body["error"]["message"])
    assert message.endswith(".") and "\n" not in message and "Traceback" not in message
    return message


def test_an_answer_is_exactly_what_the_contract_says(live: Service) -> None:
    response = post(live.url, prompt="a red heart", seed=41, num_images_per_prompt=2)
    assert response.status_code == 200
    answer = response.json()
    assert list(answer) == [
        "id", "created", "model", "model_version", "runtime", "batch_size", "data", "timings",
    ]  # fmt: skip
    assert (answer["model"], answer["model_version"], answer["runtime"]) == ("fake", "1", "fake")
    assert answer["batch_size"] == 2 and answer["created"] > 1_700_000_000 and len(answer["id"]) == 32
    for image in answer["data"]:
        assert set(image) == {"b64_json", "seed", "width", "height", "sha256", "reward", "reward_percentile"}
        assert (image["width"], image["height"]) == (64, 64)
    check_answer(answer, "a red heart", [41, 42])
    timings = answer["timings"]
    assert set(timings) == {"queue_s", "inference_s", "score_s", "encode_s", "total_s"}
    total_s = timings.pop("total_s")
    one_by_one_s = timings["queue_s"] + timings["inference_s"] + max(timings["score_s"], timings["encode_s"])
    assert all(seconds >= 0 for seconds in timings.values()) and one_by_one_s <= total_s


def test_rewards_are_those_of_the_picture(live: Service) -> None:
    [image] = post(live.url, prompt="a red heart", seed=3).json()["data"]
    scores = FakeRuntime().score(FakeRuntime().draw(["a red heart"], [3], 4), ["a red heart"])
    assert image["reward"] == pytest.approx({name: float(score[0]) for name, score in scores.items()})


def test_seeds_count_on_from_the_first_and_wrap_around(live: Service) -> None:
    last = 2**32 - 1
    answer = post(live.url, prompt="p", seed=last, num_images_per_prompt=3).json()
    check_answer(answer, "p", [last, 0, 1])
    for image in answer["data"]:
        [alone] = post(live.url, prompt="p", seed=image["seed"]).json()["data"]
        assert alone["b64_json"] == image["b64_json"] and alone["sha256"] == image["sha256"]


def test_a_missing_seed_is_drawn_and_told(live: Service) -> None:
    answers = [post(live.url, prompt="p", num_images_per_prompt=2).json() for _ in range(3)]
    firsts = [answer["data"][0]["seed"] for answer in answers]
    assert len(set(firsts)) == 3
    for answer, first in zip(answers, firsts, strict=True):
        check_answer(answer, "p", [first, (first + 1) % 2**32])


def test_ten_images_are_one_request(live: Service) -> None:
    check_answer(post(live.url, prompt="p", seed=1, num_images_per_prompt=10).json(), "p", list(range(1, 11)))


@pytest.mark.parametrize("output_format", PICTURES)
def test_a_file_is_the_bytes_of_the_image_and_headers_tell_the_rest(live: Service, output_format: str) -> None:
    [image] = post(live.url, prompt="p", seed=9, output_format=output_format).json()["data"]
    response = post(live.url, prompt="p", seed=9, output_format=output_format, response_format="file")
    assert response.status_code == 200 and response.headers["Content-Type"] == MEDIA_TYPES[output_format]
    assert response.content == base64.b64decode(image["b64_json"])
    assert (response.headers["X-Seed"], response.headers["X-Model-Version"]) == ("9", "1")
    assert float(response.headers["X-Reward-Score"]) == pytest.approx(image["reward"]["trained"], abs=1e-5)
    if output_format == "png":
        assert np.array_equal(pixels(response.content), expected_pixels("p", 9))


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({}, "prompt"),
        ({"prompt": None}, "prompt"),
        ({"prompt": 3}, "prompt"),
        ({"prompt": ["p"]}, "prompt"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": " \n\t "}, "prompt"),
        ({"prompt": "x" * 32_001}, "prompt"),
        ({"prompt": "word " * 25}, "prompt"),
        ({"prompt": "p", "seed": -1}, "seed"),
        ({"prompt": "p", "seed": 2**32}, "seed"),
        ({"prompt": "p", "seed": 1.0}, "seed"),
        ({"prompt": "p", "seed": "1"}, "seed"),
        ({"prompt": "p", "seed": True}, "seed"),
        ({"prompt": "p", "seed": []}, "seed"),
        ({"prompt": "p", "seed": [1, -1]}, "seed"),
        ({"prompt": "p", "seed": [1, "2"]}, "seed"),
        ({"prompt": "p", "seed": [1] * 11}, "seed"),
        ({"prompt": "p", "seed": [1, 2], "n": 1}, "seed"),
        ({"prompt": "p", "seed": [1, 2], "num_images_per_prompt": 3}, "seed"),
        ({"prompt": "p", "n": 0}, "n"),
        ({"prompt": "p", "n": 11}, "n"),
        ({"prompt": "p", "n": 1, "num_images_per_prompt": 1}, "n"),
        ({"prompt": "p", "num_images_per_prompt": 0}, "num_images_per_prompt"),
        ({"prompt": "p", "num_images_per_prompt": 11}, "num_images_per_prompt"),
        ({"prompt": "p", "num_images_per_prompt": None}, "num_images_per_prompt"),
        ({"prompt": "p", "output_format": "gif"}, "output_format"),
        ({"prompt": "p", "output_format": "PNG"}, "output_format"),
        ({"prompt": "p", "output_format": "jpeg", "output_compression": 101}, "output_compression"),
        ({"prompt": "p", "output_format": "webp", "output_compression": -1}, "output_compression"),
        ({"prompt": "p", "output_compression": 50}, "output_compression"),
        ({"prompt": "p", "response_format": "b64"}, "response_format"),
        ({"prompt": "p", "response_format": "file", "n": 2}, "n"),
        ({"prompt": "p", "response_format": "file", "seed": [1, 2]}, "seed"),
        ({"prompt": "p", "num_inference_steps": 3}, "num_inference_steps"),
        ({"prompt": "p", "num_inference_steps": 0}, "num_inference_steps"),
        ({"prompt": "p", "num_inference_steps": "4"}, "num_inference_steps"),
        ({"prompt": "p", "width": 0}, "width"),
        ({"prompt": "p", "width": 63}, "width"),
        ({"prompt": "p", "height": 65}, "height"),
        ({"prompt": "p", "width": 64, "height": 128}, "height"),
        ({"prompt": "p", "size": "64"}, "size"),
        ({"prompt": "p", "size": "064x64"}, "size"),
        ({"prompt": "p", "size": "64x65"}, "size"),
        ({"prompt": "p", "size": "64x64", "width": 64}, "size"),
        ({"prompt": "p", "negative_prompt": "blurry"}, "negative_prompt"),
        ({"prompt": "p", "user": 3}, "user"),
        ({"prompt": "p", "user": "x" * 129}, "user"),
        ({"prompt": "p", "metadata": {"a": 1}}, "metadata"),
        ({"prompt": "p", "metadata": {"": "a"}}, "metadata"),
        ({"prompt": "p", "metadata": {str(k): "" for k in range(17)}}, "metadata"),
        ({"prompt": "p", "response_format": "file", "num_images_per_prompt": 2}, "num_images_per_prompt"),
        ({"prompt": "p", "guidance_scale": 3}, "guidance_scale"),
        ({"prompt": "p", "guidance_scale": "3"}, "guidance_scale"),
        ({"prompt": "p", "Seed": 3}, "Seed"),
    ],
)
def test_a_wrong_field_is_named(live: Service, fields: dict[str, Any], param: str) -> None:
    assert param in check_error(post(live.url, **fields), 422, "invalid_request", param)


def test_the_longest_prompts_are_taken(live: Service) -> None:
    for prompt in ("x" * 1000, "word " * 24, "☃" * 1000):
        answer = post(live.url, prompt=prompt, seed=1)
        check_answer(answer.json(), prompt, [1])


def test_an_unknown_field_names_the_nearest_known_one(live: Service) -> None:
    assert "did you mean seed?" in check_error(post(live.url, prompt="p", sed=1), 422, "invalid_request", "sed")


def test_the_reason_of_a_refusal_is_told(live: Service) -> None:
    def message(param: str, value: Any) -> str:
        return check_error(post(live.url, **{"prompt": "p", param: value}), 422, "invalid_request", param)

    assert "was trained for 1, 2, 4" in message("num_inference_steps", 3)
    assert "guidance of fake is fixed by training" in message("guidance_scale", 3.5)
    assert "without the network pass that would read it" in message("negative_prompt", "blurry")
    assert "generates 64x64 pixels and no other size" in message("size", "128x128")
    assert "seed[1]" in message("seed", [1, -1])


@pytest.mark.parametrize(
    ("fields", "param"), [({"model": "other"}, "model"), ({"model_version": "9"}, "model_version")]
)
def test_a_model_that_is_not_served_is_not_found(live: Service, fields: dict[str, str], param: str) -> None:
    check_error(post(live.url, prompt="p", **fields), 404, "model_not_found", param)


def test_a_request_may_name_what_is_served(live: Service) -> None:
    same = {"model": "fake", "width": 64, "height": 64, "num_inference_steps": 4}
    for fields in ({**same, "model_version": "latest"}, {**same, "model_version": "1"}, {"size": "64x64"}):
        check_answer(post(live.url, prompt="p", seed=5, **fields).json(), "p", [5])


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_each_trained_step_count_can_be_had(live: Service, steps: int) -> None:
    [image] = post(live.url, prompt="p", seed=5, num_inference_steps=steps).json()["data"]
    assert np.array_equal(pixels(base64.b64decode(image["b64_json"])), expected_pixels("p", 5, steps))


@pytest.mark.parametrize("fields", [{}, {"n": 3}, {"num_images_per_prompt": 3}])
def test_each_image_can_have_a_seed_of_its_own(live: Service, fields: dict[str, int]) -> None:
    check_answer(post(live.url, prompt="p", seed=[9, 0, 9], **fields).json(), "p", [9, 0, 9])


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"size": "8192x8192"}, "size"),
        ({"width": 16384, "n": 10, "height": 16384}, "width"),
        ({"height": 16384, "n": 10, "width": 103}, "width"),
        ({"width": 16384, "height": 1025}, "width"),
    ],
)
def test_more_pixels_than_a_request_may_have_are_too_many(live: Service, fields: dict[str, Any], param: str) -> None:
    check_error(post(live.url, prompt="p", **fields), 413, "too_large", param)


def test_the_pixel_budget_counts_every_image(make_api: Callable[..., Api]) -> None:
    api = make_api(MAX_PIXELS=str(3 * 64 * 64), REQUEST_TIMEOUT_S="0.2")
    assert post(api.url, prompt="p", n=3).status_code == 504, "there is no worker, but it was accepted"
    check_error(post(api.url, prompt="p", n=4), 413, "too_large", "n")
    check_error(post(api.url, prompt="p", seed=[1] * 4), 413, "too_large", "seed")


@pytest.mark.parametrize("output_format", ["jpeg", "webp"])
def test_a_lower_quality_makes_smaller_files(live: Service, output_format: str) -> None:
    def size(**fields: Any) -> int:
        answer = post(live.url, prompt="p", seed=1, output_format=output_format, response_format="file", **fields)
        return len(answer.content)

    assert size(output_compression=0) < size(output_compression=60) < size()
    assert size() == size(output_compression=95)


def test_an_address_of_an_image_gives_its_bytes(live: Service) -> None:
    inline = post(live.url, prompt="p", seed=[3, 4]).json()
    answer = post(live.url, prompt="p", seed=[3, 4], response_format="url").json()
    for k, (image, same) in enumerate(zip(answer["data"], inline["data"], strict=True)):
        assert image["url"].startswith(f"{live.url}/jobs/{answer['id']}/images/{k}?") and "b64_json" not in image
        response = httpx.get(image["url"], trust_env=False)
        assert response.content == base64.b64decode(same["b64_json"])
        assert response.headers["X-Seed"] == str(image["seed"]) and response.headers["Content-Type"] == "image/png"
        assert response.headers["ETag"] == f'"{image["sha256"]}"'


@pytest.mark.parametrize("output_format", PICTURES)
def test_a_served_file_says_which_model_drew_it(live: Service, output_format: str) -> None:
    report = described(post(live.url, prompt="p", output_format=output_format, response_format="file").content)
    assert report["DigitalSourceType"].endswith("/trainedAlgorithmicMedia")
    assert (report["AISystemUsed"], report["AISystemVersionUsed"]) == ("fake", "1")


def test_the_address_of_an_image_is_the_one_that_clients_know(make_api: Callable[..., Api]) -> None:
    api = make_api(PUBLIC_URL="https://pictures.example/fewstep", REQUEST_TIMEOUT_S="600", INSECURE="true")
    id = call("POST", f"{api.url}/generate", json={"prompt": "p"}, headers={"Prefer": "respond-async"}).json()["id"]
    worker = Consumer(connect(api.redis_url), "fake", "w", lease_s=60, max_attempts=3)
    [claimed] = worker.claim({api.hash_of(id)["lane"]: 1})
    image = {"file": "f", "seed": 1, "width": 64, "height": 64, "sha256": "", "reward": {}}
    timings = {"queue_s": 0.0, "inference_s": 0.0, "score_s": 0.0, "encode_s": 0.0}
    worker.finish(id, claimed.token, "done", {"images": [image], "runtime": "r", "batch_size": 1, "timings": timings})
    [report] = call("GET", f"{api.url}/jobs/{id}").json()["data"]
    assert report["url"].startswith(f"https://pictures.example/fewstep/jobs/{id}/images/0?expires=")


JSON = {"Content-Type": "application/json"}


@pytest.mark.parametrize(
    ("body", "headers", "status", "code"),
    [
        (b'{"prompt": ', JSON, 400, "invalid_json"),
        (b"", JSON, 422, "invalid_request"),
        (b"\xff\xfe", JSON, 400, "invalid_json"),
        (b"[" * 50_000, JSON, 400, "invalid_json"),
        (b"[]", JSON, 422, "invalid_request"),
        (b'"p"', JSON, 422, "invalid_request"),
        (b"null", JSON, 422, "invalid_request"),
        (b'{"prompt": "p"}', {"Content-Type": "text/plain"}, 415, "unsupported_media_type"),
        (b'{"prompt": "p"}', {}, 415, "unsupported_media_type"),
        (b'{"prompt": "p", "seed": ' + b"9" * 5000 + b"}", JSON, 400, "invalid_json"),
        (b'{"prompt": "' + b"x" * 300_000 + b'"}', JSON, 413, "too_large"),
    ],
)
def test_a_body_that_is_no_request(live: Service, body: bytes, headers: dict[str, str], status: int, code: str) -> None:
    response = httpx.post(f"{live.url}/generate", content=body, headers=headers, trust_env=False)
    check_error(response, status, code)


def test_a_chunked_body_without_a_length_is_limited_too(live: Service) -> None:
    response = httpx.post(f"{live.url}/generate", content=iter([b"x" * 4000] * 100), headers=JSON, trust_env=False)
    check_error(response, 413, "too_large")


@pytest.mark.parametrize(
    ("body", "param"), [(b'{"prompt": "\\ud800"}', "prompt"), (b'{"prompt": "p", "\\ud800": 1}', None)]
)
def test_half_a_character_is_refused_and_not_fallen_over(live: Service, body: bytes, param: str | None) -> None:
    response = httpx.post(f"{live.url}/generate", content=body, headers=JSON, trust_env=False)
    check_error(response, 422, "invalid_request", param)


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/nothing", 404, "not_found"),
        ("GET", "/page/nothing.js", 404, "not_found"),
        ("GET", "/page/..%2fapp.py", 404, "not_found"),
        ("GET", "/generate/", 404, "not_found"),
        ("GET", "/generate", 405, "method_not_allowed"),
        ("DELETE", f"/jobs/{'0' * 32}", 405, "method_not_allowed"),
        ("DELETE", "/healthz", 405, "method_not_allowed"),
    ],
)
def test_an_address_that_is_none(live: Service, method: str, path: str, status: int, code: str) -> None:
    check_error(httpx.request(method, live.url + path, trust_env=False), status, code)


def test_a_failure_of_the_student_is_told_without_its_insides(live: Service) -> None:
    for prompt in ("fake:raise", "fake:nan"):
        message = check_error(post(live.url, prompt=prompt), 500, "generation_failed")
        assert "fake" not in message and "Error" not in message


def test_a_usable_request_id_is_kept_and_another_is_replaced(live: Service) -> None:
    assert get(live, "/healthz", headers={"X-Request-ID": "abc-123"}).headers["X-Request-ID"] == "abc-123"
    for bad in ("", "with space", "x" * 129, 'quote"'):
        given = get(live, "/healthz", headers={"X-Request-ID": bad}).headers["X-Request-ID"]
        assert given != bad and len(given) == 32
    body = httpx.post(f"{live.url}/generate", json={}, headers={"X-Request-ID": "mine"}, trust_env=False).json()
    assert body["request_id"] == "mine"


def test_the_probes(live: Service) -> None:
    assert get(live, "/healthz").json() == {"status": "ok"}
    ready = get(live, "/readyz").json()
    assert ready.pop("load_s") >= ready.pop("warm_up_s") >= 0
    assert ready == {
        "status": "ready", "model": "fake", "model_version": "1", "runtime": "fake", "workers": 1,
    }  # fmt: skip
    assert httpx.head(f"{live.url}/healthz", trust_env=False).status_code == 200


def test_requests_that_wait_together_ride_together_and_get_the_bytes_that_they_get_alone(live: Service) -> None:
    """The worker is held up by one request; the eight that arrive meanwhile are its next batch."""
    with ThreadPoolExecutor(16) as pool:
        held = pool.submit(post, live.url, prompt="fake:sleep=1.0 hold", seed=0)
        together = [pool.submit(post, live.url, prompt=f"p{k}", seed=k) for k in range(8)]
        answers = [future.result().json() for future in together]
        assert held.result().status_code == 200
    for k, answer in enumerate(answers):
        check_answer(answer, f"p{k}", [k])
    assert max(answer["batch_size"] for answer in answers) > 1
    alone = post(live.url, prompt="p5", seed=5).json()
    assert alone["batch_size"] == 1 and alone["data"] == answers[5]["data"]


def test_many_clients_each_get_their_own_pictures(live: Service) -> None:
    formats = ("png", "jpeg", "webp")

    def ask(k: int) -> None:
        count = 1 + k % 3
        response = post(
            live.url, prompt=f"client {k}", seed=1000 * k, num_images_per_prompt=count, output_format=formats[k % 3]
        )
        assert response.status_code == 200, response.text
        for index, image in enumerate(response.json()["data"]):
            seen = pixels(base64.b64decode(image["b64_json"])).astype(float)
            error = np.abs(seen - expected_pixels(f"client {k}", 1000 * k + index)).mean()
            assert error == 0 if k % 3 == 0 else error < 12
            assert image["sha256"] == hashlib.sha256(base64.b64decode(image["b64_json"])).hexdigest()

    with ThreadPoolExecutor(16) as pool:
        list(pool.map(ask, range(60)))


def test_the_http_process_and_the_worker_load_no_network_library_that_they_do_not_need(live: Service) -> None:
    for role in ("api", "worker"):
        with open(f"/proc/{live.pids()[role]}/maps") as maps:
            mapped = maps.read()
        assert not [name for name in ("libtorch", "onnxruntime", "libtriton") if name in mapped], role

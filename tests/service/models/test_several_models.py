"""Several students in one service: chosen by name, swapped under load, refused with the reason."""

from __future__ import annotations

import base64
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from tests.service.students import drawn_by, make_student
from tests.service.support import Service, call, eventually, pixels, post, running_service

CLIENTS = 6


def admin(service: Service, name: str, what: str, **query: Any) -> httpx.Response:
    return call("POST", f"{service.url}/admin/models/{name}/{what}", params=query)


def versions(service: Service) -> dict[str, dict[str, Any]]:
    rows = call("GET", f"{service.url}/admin/models").json()["data"]
    return {f"{row['model']}/{row['version']}": row for row in rows}


def models(service: Service) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = call("GET", f"{service.url}/v1/models").json()["data"]
    return found


def check_drawn(answer: dict[str, Any], id: str, version: str, prompt: str) -> None:
    """The answer says who drew it, and every pixel agrees."""
    assert (answer["model"], answer["model_version"]) == (id, version)
    for image in answer["data"]:
        key = np.rint(drawn_by(id, version, prompt, image["seed"]) * 255).astype(np.uint8).transpose(1, 2, 0)
        assert np.array_equal(pixels(base64.b64decode(image["b64_json"])), key), (id, version)


def check_refused(response: httpx.Response, status: int, words: str) -> None:
    assert response.status_code == status, response.text
    assert words in response.json()["error"]["message"], response.text


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_students(tmp_path_factory.mktemp("students"))


def make_students(folder: Path) -> Path:
    for id, version in (("cats", "1"), ("dogs", "9"), ("dogs", "10")):
        make_student(folder, id, version)
    return folder


@pytest.fixture(scope="module")
def service(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    with running_service(tmp_path_factory.mktemp("several") / "data", MODELS=str(folder), WORKERS="2") as running:
        eventually(lambda: [model["versions"][0]["workers"] for model in models(running)] == [2, 2], "both have both")
        yield running


def test_the_newest_version_of_each_is_served_and_drawn_with_by_name(service: Service) -> None:
    assert {name: row["state"] for name, row in versions(service).items()} == {
        "cats/1": "serving", "dogs/9": "available", "dogs/10": "serving",
    }  # fmt: skip
    for id, version in (("cats", "1"), ("dogs", "10")):
        check_drawn(post(service.url, prompt="p", model=id, seed=3, n=2).json(), id, version, "p")
        check_drawn(post(service.url, prompt="p", model=id, model_version=version).json(), id, version, "p")
    refused = post(service.url, prompt="p", model="birds").json()["error"]
    assert (refused["code"], refused["param"]) == ("model_not_found", "model")
    refused = post(service.url, prompt="p", model="dogs", model_version="9").json()["error"]
    assert (refused["code"], refused["param"]) == ("model_not_found", "model_version")
    unnamed = post(service.url, prompt="p")
    assert unnamed.status_code == 422 and unnamed.json()["error"]["param"] == "model"
    assert "cats, dogs" in unnamed.json()["error"]["message"]


def test_the_list_of_models_says_what_can_be_asked_of_them(service: Service) -> None:
    cats, dogs = call("GET", f"{service.url}/v1/models").json()["data"]
    assert (cats["id"], cats["object"], cats["latest"], dogs["latest"]) == ("cats", "model", "1", "10")
    [version] = dogs["versions"]
    assert version == {
        "version": "10", "latest": True, "steps": [1, 2, 4], "width": 64, "height": 64, "max_prompt_tokens": 24,
        "scorers": ["heldout", "trained"], "runtime": "fake", "shows_steps": True, "workers": 2,
        "probe": {"outcomes": {"none": 2}, "oldest_s": None}, "best_of": [], "fps": None, "lengths": None,
        "num_frames": None,
    }  # fmt: skip
    assert call("GET", f"{service.url}/v1/models/dogs@10").json() == dogs
    assert call("GET", f"{service.url}/v1/models/birds").status_code == 404


def test_one_is_swapped_under_load_without_a_failed_request(service: Service, folder: Path) -> None:
    stop, counts = threading.Event(), {("cats", "1"): 0, ("dogs", "10"): 0, ("dogs", "11"): 0}
    lock = threading.Lock()

    def ask(client: int) -> None:
        seed = client
        while not stop.is_set():
            id, prompt = ("cats", "dogs")[seed % 2], f"{client} fake:sleep=0.01"
            response = post(service.url, prompt=prompt, model=id, seed=seed)
            assert response.status_code == 200, response.text
            answer = response.json()
            check_drawn(answer, id, answer["model_version"], prompt)
            with lock:
                counts[id, answer["model_version"]] += 1
            seed += 1

    with ThreadPoolExecutor(CLIENTS) as pool:
        asked = [pool.submit(ask, client) for client in range(CLIENTS)]
        try:
            eventually(lambda: counts["dogs", "10"] > 5, "the old one draws")
            make_student(folder, "dogs", "11")  # it comes while the service runs
            assert admin(service, "dogs/11", "load").json()["state"] == "serving"
            before = counts["cats", "1"]
            eventually(lambda: counts["cats", "1"] > before + 3, "both draw")
            assert counts["dogs", "11"] == 0, "loading it is not yet promoting it"
            check_refused(admin(service, "dogs/10", "unload"), 409, "promote another one first")
            assert admin(service, "dogs/11", "promote").json()["latest"] is True
            unloaded = admin(service, "dogs/10", "unload")
            assert unloaded.json()["state"] == "unloaded" and unloaded.json()["workers"] == 0, unloaded.text
            eventually(lambda: counts["dogs", "11"] > 5, "the new one draws")
        finally:
            stop.set()
        for future in asked:
            future.result()
    assert post(service.url, prompt="p", model="dogs", model_version="10").status_code == 404
    states = {name: (row["state"], row["latest"]) for name, row in versions(service).items()}
    assert states["dogs/10"] == ("unloaded", False) and states["dogs/11"] == ("serving", True)


def test_a_server_that_has_lost_its_data_is_told_again_what_is_served(service: Service) -> None:
    before = [(model["id"], model["latest"]) for model in models(service)]
    service.redis.flushall()
    assert post(service.url, prompt="p", model="cats").status_code == 200
    eventually(lambda: [(model["id"], model["latest"]) for model in models(service)] == before, "as before")
    check_drawn(post(service.url, prompt="p", model="dogs").json(), "dogs", dict(before)["dogs"], "p")


def test_what_was_accepted_is_drawn_before_a_model_is_dropped(service: Service, folder: Path) -> None:
    assert admin(service, "dogs/9", "load").json()["state"] == "serving"

    def accepted() -> int:
        return len(list(service.redis.scan_iter("fewstep:{@models}:j:*")))

    before = accepted()
    with ThreadPoolExecutor(8) as pool:
        slow = [pool.submit(post, service.url, prompt=f"{k} fake:sleep=0.8", model="dogs", model_version="9", n=8)
                for k in range(7)]  # fmt: skip
        eventually(lambda: accepted() == before + 7, "all of them are accepted")
        assert service.redis.zcard("fewstep:{@models}:pending") >= 1, "and not all of them are being drawn"
        first = admin(service, "dogs/9", "unload", wait_s=0)
        assert (first.status_code, first.json()["state"]) == (202, "unloading")
        assert post(service.url, prompt="p", model="dogs", model_version="9").status_code == 404
        for k, future in enumerate(slow):
            assert future.result().status_code == 200, future.result().text
            check_drawn(future.result().json(), "dogs", "9", f"{k} fake:sleep=0.8")
    assert admin(service, "dogs/9", "unload").json()["state"] == "unloaded"


def test_a_model_that_fails_its_manifest_is_refused_and_the_running_one_stays(service: Service, folder: Path) -> None:
    make_student(folder, "cats", "2")
    weights = folder / "cats" / "2" / "transformer" / "weights.safetensors"
    weights.write_bytes(b"changed")
    check_refused(admin(service, "cats/2", "load"), 422, "has changed since student.json was written")
    row = versions(service)["cats/2"]
    assert row["state"] == "refused" and "has changed" in row["reason"]
    check_drawn(post(service.url, prompt="p", model="cats").json(), "cats", "1", "p")
    weights.write_bytes(bytes(1000))
    assert admin(service, "cats/2", "load").json()["state"] == "serving", "a second try is a new one"
    (folder / "cats" / "3").mkdir()
    (folder / "cats" / "3" / "student.json").write_text("{}")
    check_refused(admin(service, "cats/3", "load"), 422, "lacks the field")
    check_refused(admin(service, "cats/4", "load"), 404, "no such model")
    check_refused(admin(service, "cats/3", "promote"), 409, "load it first")


def test_a_model_of_another_name_is_refused(service: Service, folder: Path) -> None:
    make_student(folder, "cats", "5")
    (folder / "cats" / "5").rename(folder / "cats" / "6")
    check_refused(admin(service, "cats/6", "load"), 422, "names cats/5 instead")


def test_what_was_decided_outlives_every_process(tmp_path: Path) -> None:
    folder = make_students(tmp_path / "models")
    with running_service(tmp_path / "data", MODELS=str(folder)) as service:
        eventually(lambda: versions(service)["dogs/10"]["state"] == "serving")
        assert admin(service, "dogs/9", "load").status_code == 200
        assert admin(service, "dogs/9", "promote").status_code == 200
        assert admin(service, "cats/1", "unload").status_code == 200
        service.kill("worker")
        service.kill("api")
        eventually(lambda: post_or_none(service, model="dogs") == "9", "both are back")
    with running_service(tmp_path / "data", MODELS=str(folder)) as service:
        eventually(lambda: len(call("GET", f"{service.url}/v1/models").json()["data"]) == 1)
        check_drawn(post(service.url, prompt="p").json(), "dogs", "9", "p")
        assert versions(service)["cats/1"]["state"] == "unloaded"


def post_or_none(service: Service, **fields: Any) -> str | None:
    try:
        response = post(service.url, prompt="p", **fields)
    except httpx.TransportError:
        return None
    return response.json().get("model_version") if response.status_code == 200 else None


def test_a_model_that_does_not_fit_is_refused_and_the_running_one_stays(tmp_path: Path) -> None:
    """Weights of 1 MB are taken to need 4, each copied and in twice the precision, and 64 to compute in."""
    folder = tmp_path / "models"
    make_student(folder, "small", "1", 2**20)
    with running_service(tmp_path / "data", MODELS=str(folder), MODEL_MEMORY_MB="137") as service:
        make_student(folder, "small", "2", 2**20)
        make_student(folder, "small", "3", 2**20)
        assert admin(service, "small/2", "load").json()["state"] == "serving"
        check_refused(admin(service, "small/3", "load"), 422, "about 68 MB of memory, but only 1 MB of the 137 MB")
        check_drawn(post(service.url, prompt="p").json(), "small", "1", "p")
        assert admin(service, "small/2", "promote").status_code == 200
        assert admin(service, "small/1", "unload").json()["state"] == "unloaded"
        check_refused(admin(service, "small/2", "unload"), 409, "the only served model")
        assert admin(service, "small/3", "load").json()["state"] == "serving", "there is room again"


def test_a_service_of_one_student_has_nothing_to_load(live: Service) -> None:
    check_refused(admin(live, "fake/1", "load"), 409, "FEWSTEP_MODELS serves several")
    [model] = call("GET", f"{live.url}/v1/models").json()["data"]
    assert model["id"] == "fake" and model["versions"][0]["runtime"] == "fake"


def test_the_operators_addresses_are_not_for_those_behind_a_proxy(live: Service) -> None:
    response = call("GET", f"{live.url}/admin/models", headers={"X-Forwarded-For": "203.0.113.9"})
    assert response.status_code == 403 and response.json()["error"]["code"] == "untrusted_request"

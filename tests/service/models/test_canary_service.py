"""A canary in a whole service under load: a worse student is rolled back, an equal one promoted, no request fails."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from student.runtimes.runtime import FloatArray
from tests.service.models.test_several_models import check_drawn, versions
from tests.service.students import change_engine, copy_starter, make_student
from tests.service.support import Service, call, eventually, post, running_service
from training.shapes.prompts import measuring_prompts

CLIENTS = 4


@pytest.fixture
def service(tmp_path: Path) -> Iterator[Service]:
    """One version, by two HTTP processes and two workers."""
    make_student(tmp_path / "models", "m", "1")
    with running_service(tmp_path / "data", MODELS=str(tmp_path / "models"), APIS="2", WORKERS="2") as live:
        yield live


class Load:
    """Clients that ask for pictures of version "latest" until told to stop; each prompt or seed is another one."""

    def __init__(self, url: str, model: str = "m", prompts: Sequence[str] = ()) -> None:
        self._url = url
        self._model = model
        self._prompts = prompts
        self._numbers = itertools.count()
        self._stopping = threading.Event()
        self.answers: list[tuple[str, Any]] = []

    def client(self) -> None:
        while not self._stopping.is_set():
            number = next(self._numbers)
            prompt = self._prompts[number % len(self._prompts)] if self._prompts else f"a red heart {number}"
            answer = post(self._url, prompt=prompt, seed=number, model=self._model)
            self.answers.append((prompt, answer))

    @contextmanager
    def running(self) -> Iterator[None]:
        self._stopping.clear()
        with ThreadPoolExecutor(CLIENTS) as pool:
            clients = [pool.submit(self.client) for _ in range(CLIENTS)]
            try:
                yield
            finally:
                self._stopping.set()
                for one in clients:
                    one.result()


def canary(service: Service) -> dict[str, Any]:
    (found,) = call("GET", f"{service.url}/admin/canaries").json()["data"]
    return found  # type: ignore[no-any-return]


def start(service: Service, version: str, model: str = "m", **query: Any) -> Any:
    return call("POST", f"{service.url}/admin/canaries/{model}/{version}/start", params=query)


def test_a_worse_student_is_rolled_back_under_load_and_no_request_fails(service: Service, tmp_path: Path) -> None:
    make_student(tmp_path / "models", "m", "2", dim=0.8)
    load = Load(service.url)
    with load.running():
        eventually(lambda: len(load.answers) > 5, "there is load")
        answer = start(service, "2", share=1.0)
        assert answer.status_code == 200 and answer.json()["state"] == "running", answer.text
        eventually(lambda: canary(service)["state"] != "running", "it ends", patience_s=90)
        ended = len(load.answers)
        eventually(lambda: len(load.answers) > ended + 5, "and everything goes on")
    found = canary(service)
    assert found["state"] == "rolled_back" and "are lower by" in found["reason"]
    assert found["rewards"]["trained"]["mean"] == pytest.approx(-0.4, abs=0.1)  # (0.8 - 1) * 2, the mean brightness
    assert {answer.status_code for _, answer in load.answers} == {200}
    for prompt, answer in load.answers:
        check_drawn(answer.json(), "m", "1", prompt)
    assert {name: row["state"] for name, row in versions(service).items()} == {"m/1": "serving", "m/2": "serving"}
    assert versions(service)["m/1"]["latest"]
    state = 'fewstep_canary_state{base="1",candidate="2",model="m",state="rolled_back"} 1.0'
    eventually(
        lambda: state in call("GET", f"{service.url}/metrics").text, "metrics have what the queue answers in time"
    )


def blur(values: FloatArray) -> FloatArray:
    """Half as much noise as there is weight."""
    noise = np.random.default_rng(1).normal(size=values.size).astype(np.float32)
    return values + np.float32(0.5) * values.std() * noise


def test_the_shipped_student_with_damaged_weights_is_rolled_back_under_load(
    tmp_path: Path,
) -> None:
    """It still draws pictures; the scorers and the pairs tell that they are worse."""
    copy_starter(tmp_path / "models", "2")
    settings = {"RUNTIME": "onnx", "MODELS": str(tmp_path / "models"), "THREADS": "1"}
    with running_service(tmp_path / "data", **settings) as service:
        change_engine(copy_starter(tmp_path / "damaged", "3"), blur)
        (tmp_path / "damaged" / "shapes" / "3").rename(tmp_path / "models" / "shapes" / "3")
        load = Load(service.url, "shapes", measuring_prompts()[1])
        with load.running():
            assert start(service, "3", "shapes", share=1.0).status_code == 200
            eventually(lambda: canary(service)["state"] != "running", "it ends", patience_s=90)
            ended = len(load.answers)
            eventually(lambda: len(load.answers) > ended + 5, "and everything goes on")
        found = canary(service)
    assert found["state"] == "rolled_back" and "are lower by" in found["reason"], found
    assert found["rewards"]["trained"]["mean"] < -0.1 and found["base_failed"] == found["candidate_failed"] == 0, found
    assert {answer.status_code for _, answer in load.answers} == {200}
    assert {answer.json()["model_version"] for _, answer in load.answers} == {"2"}


def test_an_equal_student_is_promoted_through_the_death_of_every_process(service: Service, tmp_path: Path) -> None:
    """The pairs that were drawn before count on: they are in the server, not in a process."""
    make_student(tmp_path / "models", "m", "2")
    load = Load(service.url)
    assert start(service, "2", share=1.0, margin=0.5, failures=0.1).status_code == 200
    with load.running():
        eventually(lambda: canary(service)["pairs"] >= 5, "some pairs are drawn", patience_s=60)
    before, pids = canary(service)["pairs"], service.pids()
    for role in [role for role in pids if role.startswith(("api", "worker"))]:
        service.kill(role)
    eventually(lambda: not set(service.pids().values()) & {pids[r] for r in pids if r.startswith(("api", "worker"))})
    eventually(lambda: ready(service), "the service is back", patience_s=60)
    assert canary(service)["pairs"] >= before
    with load.running():
        eventually(lambda: canary(service)["state"] != "running", "it ends", patience_s=90)
    found = canary(service)
    assert found["state"] == "promoted" and found["candidate_failed"] == 0, found
    assert {answer.status_code for _, answer in load.answers} == {200}
    asked = lambda: post(service.url, prompt="p", model="m").json()["model_version"]  # noqa: E731
    eventually(lambda: asked() == "2", "every process knows")


def ready(service: Service) -> bool:
    try:
        return call("GET", f"{service.url}/readyz").status_code == 200
    except Exception:
        return False


def test_a_canary_that_makes_no_sense_is_refused(service: Service, tmp_path: Path) -> None:
    answer = start(service, "1")
    assert answer.status_code == 409 and "is the latest of its model" in answer.json()["error"]["message"]
    assert start(service, "9").status_code == 404
    make_student(tmp_path / "models", "m", "2")
    assert start(service, "2").status_code == 200
    answer = start(service, "2")
    assert answer.status_code == 409 and "stop it first" in answer.json()["error"]["message"]
    stopped = call("POST", f"{service.url}/admin/canaries/m/2/stop").json()
    assert (stopped["state"], stopped["reason"]) == ("stopped", "by the operator")
    assert call("POST", f"{service.url}/admin/canaries/m/1/stop").status_code == 404
    assert versions(service)["m/2"]["state"] == "serving"

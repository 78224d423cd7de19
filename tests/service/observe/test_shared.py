"""Several HTTP processes on one socket: whichever is scraped tells of all of them, and a restart forgets nothing."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from prometheus_client import values

from service.observe.shared import VARIABLE, fresh_folder, share_counts, shared_folder
from tests.service.observe.test_metrics import Samples, read, value
from tests.service.support import Service, alive, call, eventually, post, running_service

GENERATED = {"route": "/generate", "method": "POST", "code": "200"}


def apis(service: Service) -> list[int]:
    return [process["pid"] for process in service.run_file()["processes"] if process["role"] == "api"]


@contextmanager
def only(pid: int, pids: list[int]) -> Iterator[None]:
    """No other process takes a connection meanwhile."""
    others = [other for other in pids if other != pid]
    for other in others:
        os.kill(other, signal.SIGSTOP)
    try:
        yield
    finally:
        for other in others:
            os.kill(other, signal.SIGCONT)


def scrape(service: Service) -> Samples:
    return read(call("GET", f"{service.url}/metrics").text)


def images(samples: Samples) -> float:
    return samples.get(("fewstep_images_total", frozenset({"model": "fake", "version": "1"}.items())), 0.0)


def test_what_was_under_way_in_a_process_that_died_is_forgotten_and_all_else_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its successor has its part; requests that it was answering would be under way for ever."""
    monkeypatch.setattr(values, "ValueClass", values.ValueClass)
    monkeypatch.setenv(VARIABLE, "before")
    kept = {
        "counter_1.db", "histogram_1.db", "gauge_livesum_0.db", "gauge_livesum_11.db", "gauge_all_2.db", "counter_0.db",
    }  # fmt: skip
    for name in (*kept, "gauge_livesum_1.db", "gauge_all_1.db"):
        (tmp_path / name).touch()
    share_counts(tmp_path, 1)
    assert {path.name for path in tmp_path.iterdir()} == kept and shared_folder() == tmp_path
    fresh_folder(tmp_path / "data")
    (tmp_path / "data" / "counts" / "counter_0.db").touch()
    fresh_folder(tmp_path / "data")
    assert list((tmp_path / "data").rglob("*")) == [tmp_path / "data" / "counts"]


def test_a_scrape_of_any_process_tells_of_all(tmp_path: Path) -> None:
    with running_service(tmp_path / "data", APIS="2") as service:
        pids = apis(service)
        assert len(pids) == 2
        for pid, requests, sum_so_far in zip(pids, (3, 1), (3, 4), strict=True):
            with only(pid, pids):
                for seed in range(requests):
                    assert post(service.url, prompt="p", seed=seed).status_code == 200
                eventually(lambda wanted=sum_so_far: images(scrape(service)) == wanted, "the ends of jobs are noted")  # type: ignore[misc]
        seen = []
        for pid in pids:
            with only(pid, pids):
                seen.append(scrape(service))
        for samples in seen:
            assert value(samples, "requests_total", **GENERATED) == 4
            assert images(samples) == 4
            assert value(samples, "job_duration_seconds_count", model="fake", version="1") == 4
            assert value(samples, "inflight_requests") == 0
            assert value(samples, "workers") == 1, "what the queue says is no sum"
        assert {name for name, _ in seen[0]} == {name for name, _ in seen[1]}
        assert not [labels for _, labels in seen[0] if "pid" in dict(labels)]

        killed = pids[0]
        os.kill(killed, signal.SIGKILL)
        eventually(lambda: not alive(killed) and killed not in apis(service) and len(apis(service)) == 2, "a new one")
        eventually(lambda: call("GET", f"{service.url}/readyz").status_code == 200)
        assert images(scrape(service)) == 4
        assert value(scrape(service), "requests_total", **GENERATED) == 4
        assert sorted(path.name for path in (tmp_path / "data" / "counts").glob("counter_*")) == [
            "counter_0.db",
            "counter_1.db",
        ]

"""What a worker process is made of: how often it renews its leases, for how long they last, and what it scores."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from service.quality.feedback import FeedbackPolicy
from service.settings import Settings
from service.worker import process
from service.worker import worker as module
from service.worker.heartbeat import Heartbeat
from service.worker.scoring import ScorePolicy
from service.worker.worker import Worker
from student.runtimes.fake import FakeRuntime
from student.runtimes.options import Options
from tests.service.support import Api, Queue, post, start_worker


class Stop(Exception):
    """The worker is built; it need not run."""


def test_a_lease_survives_a_late_heartbeat(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A heartbeat that is late by a whole period still renews in time."""
    made: list[tuple[Any, ...]] = []
    leases: list[float] = []

    def consumer(*_: object, lease_s: float, **__: object) -> object:
        leases.append(lease_s)
        return object()

    def heartbeat(*arguments: Any, **_: object) -> Any:
        made.append(arguments)
        raise Stop

    monkeypatch.setattr(process, "Consumer", consumer)
    monkeypatch.setattr(process, "Heartbeat", heartbeat)
    settings = Settings(runtime="fake", redis_url="redis://127.0.0.1:1", data_dir=tmp_path, lease_s=30.0)
    with pytest.raises(Stop):
        process.run_worker(settings, "w")
    (every_s,) = [each for each in made[0] if isinstance(each, float)]
    assert leases and set(leases) == {30.0} and 0 < 2 * every_s < 30.0


def test_a_worker_among_others_shares_the_cores_with_them(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[Options] = []
    made: list[dict[str, Any]] = []

    def load(*arguments: Any) -> Any:
        asked.append(arguments[3])
        return FakeRuntime()

    def worker(*_: object, **options: Any) -> Any:
        made.append(options)
        raise Stop

    monkeypatch.setattr("student.runtimes.load.load", load)
    monkeypatch.setattr(process, "Worker", worker)
    monkeypatch.setattr(Settings, "cores", 8)
    monkeypatch.setattr(process.Consumer, "beat", lambda *_: {})  # there is no server
    monkeypatch.setattr(process.Consumer, "release", lambda *_: 0)
    for workers in (1, 2):
        settings = Settings(redis_url="redis://127.0.0.1:1", data_dir=tmp_path, workers=workers)
        with pytest.raises(Stop):
            process.run_worker(settings, "w")
    assert [options.crowded_threads for options in asked] == [0, 4]
    assert [options["neighbours"] is not None for options in made] == [False, True]


def test_each_setting_of_a_worker_arrives_there(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    made: list[dict[str, Any]] = []
    grace: list[float] = []

    def worker(*_: object, **options: Any) -> Any:
        made.append(options)
        raise Stop

    monkeypatch.setattr(process, "Worker", worker)
    monkeypatch.setattr(process, "_stop_on_signal", lambda *arguments: grace.append(arguments[3]))
    monkeypatch.setattr(process.Consumer, "beat", lambda *_: {})  # there is no server
    monkeypatch.setattr(process.Consumer, "release", lambda *_: 0)
    settings = Settings(
        runtime="fake", redis_url="redis://127.0.0.1:1", data_dir=tmp_path, workers=1, provenance=False, score="0.25",
        call_timeout_s=7.0, batch=5, probe_s=11.0, feedback_percentile=13.0, feedback_max=170, feedback_days=19.0,
        grace_s=23.0,
    )  # fmt: skip
    with pytest.raises(Stop):
        process.run_worker(settings, "w")
    (options,) = made
    tracing, on_hang = options.pop("tracing"), options.pop("on_hang")
    assert tracing is not None and callable(on_hang) and grace == [pytest.approx(23.2)]
    assert options == {
        "provenance": False, "signer": None, "call_timeout_s": 7.0, "batch": 5, "neighbours": None,
        "policy": ScorePolicy(0.25), "probe_s": 11.0, "feedback": FeedbackPolicy(13.0, 170, 19.0),
    }  # fmt: skip


def test_a_worker_hands_on_what_its_parts_act_by(queue: Queue, monkeypatch: pytest.MonkeyPatch) -> None:
    made: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {}
    for name in ("Settler", "LateScores", "Finisher", "Prober", "Bounds", "Watchdog", "Claims"):
        part = getattr(module, name)

        def make(*arguments: Any, name: str = name, part: Any = part, **options: Any) -> Any:
            made[name] = (arguments, options)
            return part(*arguments, **options)

        monkeypatch.setattr(module, name, make)
    consumer, signer, policy, feedback = queue.consumer("w"), object(), ScorePolicy(0.5), FeedbackPolicy(5.0)
    heartbeat, stopping, store = Heartbeat(queue.consumer("w"), {}, 60.0), threading.Event(), object()
    worker = Worker(
        FakeRuntime(), consumer, heartbeat, store, stopping, provenance=False, signer=signer, policy=policy,  # type: ignore[arg-type]
        call_timeout_s=7.0, probe_s=11.0, feedback=feedback, on_hang=print,
    )  # fmt: skip
    assert made["Settler"] == (
        (consumer, store, heartbeat, stopping), {"provenance": False, "signer": signer, "feedback": feedback},
    )  # fmt: skip
    assert made["LateScores"][0][3] == policy and made["LateScores"][1] == {"feedback": feedback}
    assert made["Finisher"][0][3] == policy and made["Prober"][0][1:] == (consumer, 11.0)
    assert made["Bounds"][0][:2] == (worker.device, 7.0) and made["Watchdog"][0] == (print,)
    assert made["Claims"][0][1:4] == (consumer, heartbeat, worker.device)


def test_a_process_scores_what_the_setting_says(make_api: Callable[..., Api], tmp_path: Path) -> None:
    api, seeds = make_api(), list(range(10))
    worker = start_worker(api.redis_url, tmp_path / "data", SCORE="0.5")
    try:
        answer = post(api.url, prompt="p", seed=seeds).json()
    finally:
        worker.kill()
        worker.wait()
    scored = [bool(image["reward"]) for image in answer["data"]]
    assert scored == [ScorePolicy(0.5).scores(seed) for seed in seeds] and 0 < sum(scored) < len(seeds)

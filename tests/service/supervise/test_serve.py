"""``serve`` as a whole: what it starts, what it survives, what it refuses, and that nothing is left of it."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import httpx
import pytest

from service.errors import StartupError
from service.queue.status import WorkerState
from service.settings import Settings
from service.supervise.supervisor import Supervisor
from tests.service.support import (
    REPOSITORY,
    Api,
    Service,
    alive,
    check_answer,
    clean_environment,
    eventually,
    post,
    running_service,
    start_worker,
)

STOP_LIMIT_S = 20  # 5 are promised; on a machine that is busy with other things the clock proves nothing


def refused(data_dir: Path, **settings: str) -> str:
    """The only line that a refused start prints."""
    ended = subprocess.run(
        [sys.executable, "-m", "service.run"],
        cwd=REPOSITORY,
        env=clean_environment({"RUNTIME": "fake", "PORT": "0", "DATA_DIR": str(data_dir), **settings}),
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert ended.returncode == 1 and ended.stdout == ""
    [line] = ended.stderr.splitlines()
    assert line.startswith("fewstep: ") and line.endswith((".", "?"))
    return line


def test_it_starts_everything_from_a_long_path_with_a_space_and_leaves_nothing(tmp_path: Path) -> None:
    data_dir = tmp_path / "a long path with spaces" / ("x" * 100)
    data_dir.parent.mkdir()
    with running_service(data_dir) as service:
        pids = service.pids()
        assert set(pids) == {"supervisor", "redis", "api", "worker"} and all(alive(pid) for pid in pids.values())
        assert pids["supervisor"] == service.process.pid
        check_answer(post(service.url, prompt="p", seed=1).json(), "p", [1])
    assert service.process.returncode == 0
    assert not (data_dir / "run.json").exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_it_stops_within_its_promise_even_in_the_middle_of_work(number: signal.Signals, tmp_path: Path) -> None:
    service = Service(tmp_path / "data", {})
    try:
        service.wait_until_ready()
        pids = service.pids()
        with ThreadPoolExecutor() as pool:
            busy = pool.submit(post, service.url, prompt="fake:sleep=60")
            eventually(lambda: service.redis.zcard("fewstep:{fake}:l") == 1, "the worker is busy")
            service.process.send_signal(number)
            assert service.process.wait(STOP_LIMIT_S) == 0
            assert busy.result().status_code == 503
        assert [role for role, pid in pids.items() if alive(pid)] == []
    finally:
        service.process.kill()


def test_a_batch_that_cannot_be_ended_in_time_is_handed_back_and_done_after_the_next_start(tmp_path: Path) -> None:
    """The job of a client that has gone is cancelled; this one's client has only lost its HTTP process."""
    with running_service(tmp_path / "data") as service:
        with ThreadPoolExecutor() as pool:
            lost = pool.submit(post, service.url, prompt="fake:sleep=2 kept", seed=5)
            eventually(lambda: service.redis.zcard("fewstep:{fake}:l") == 1, "the worker is busy")
            service.kill("api")
            with pytest.raises(httpx.HTTPError):
                lost.result()
        [key] = service.redis.keys("fewstep:{fake}:j:*")
    with running_service(tmp_path / "data") as service:
        eventually(lambda: service.redis.hget(key, "state") == "done", "the job is done")
        assert service.redis.hget(key, "attempts") == "1"


def test_nothing_outlives_a_killed_supervisor(tmp_path: Path) -> None:
    service = Service(tmp_path / "data", {})
    service.wait_until_ready()
    pids = service.pids()
    service.process.kill()
    service.process.wait()
    eventually(lambda: not [pid for pid in pids.values() if alive(pid)], "all are gone")
    with running_service(tmp_path / "data") as again:
        check_answer(post(again.url, prompt="p", seed=1).json(), "p", [1])


def test_a_taken_port_is_one_sentence_and_nothing_is_started(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        line = refused(tmp_path / "data", PORT=str(port))
    assert f"127.0.0.1:{port}" in line and "in use" in line and "FEWSTEP_PORT" in line
    assert not (tmp_path / "data").exists()


def test_a_data_directory_serves_one_service(tmp_path: Path) -> None:
    with running_service(tmp_path / "data") as service:
        assert "already uses" in refused(tmp_path / "data")
        check_answer(post(service.url, prompt="p", seed=1).json(), "p", [1])


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"RUNTIME": "auto", "MODEL": "/nowhere"}, "/nowhere is not a student"),
        ({"PROT": "1"}, "did you mean FEWSTEP_PORT?"),
        ({"PORT": "x"}, "FEWSTEP_PORT"),
        ({"DATA_DIR": "/dev/null/x"}, "FEWSTEP_DATA_DIR"),
        ({"REDIS_URL": "unix:///nowhere.sock"}, "FEWSTEP_REDIS_URL"),
        ({"REDIS_URL": "nonsense"}, "FEWSTEP_REDIS_URL"),
    ],
)
def test_a_service_that_cannot_start_says_why_in_one_sentence(
    settings: dict[str, str], words: str, tmp_path: Path
) -> None:
    assert words in refused(tmp_path / "data", **settings)


def test_a_worker_that_cannot_load_its_student_ends_the_start(tmp_path: Path) -> None:
    """The manifest is right, so the supervisor begins; the weights are not there."""
    from student.files import write_student
    from student.runtimes.fake import fake_student

    bundle = tmp_path / "bundle"
    bundle.mkdir()
    (bundle / "model_index.json").write_text("{}")
    write_student(bundle, fake_student())
    service = Service(tmp_path / "data", {"RUNTIME": "auto", "MODEL": str(bundle)})
    assert service.process.wait(60) == 1
    assert "instead of becoming ready" in service.output.read_text()
    assert "Traceback" not in service.output.read_text()


def test_every_accepted_request_is_answered_with_its_own_picture_though_workers_are_killed(tmp_path: Path) -> None:
    """kill -9 in mid-batch, three times, under the load of sixteen clients."""
    num_requests = 120
    # The lease is so long that only the supervisor can give the jobs of a dead worker to the next one in time.
    with running_service(tmp_path / "data", LEASE_S="600") as service, ThreadPoolExecutor(16) as pool:

        def ask(k: int) -> None:
            count = 1 + k % 2
            response = post(service.url, prompt=f"fake:sleep=0.05 client {k}", seed=10 * k, num_images_per_prompt=count)
            assert response.status_code == 200, response.text
            check_answer(response.json(), f"fake:sleep=0.05 client {k}", list(range(10 * k, 10 * k + count)))

        asked = [pool.submit(ask, k) for k in range(num_requests)]
        killed = set()
        for _ in range(3):
            eventually(lambda: service.redis.zcard("fewstep:{fake}:l") > 0, "a worker holds jobs")
            killed.add(service.kill("worker"))
            eventually(lambda: service.pids().get("worker") not in {None, *killed}, "another worker")
        for future in asked:
            future.result()
        counters = service.redis.hgetall("fewstep:{fake}:n")
        assert int(counters["finished"]) == num_requests and int(counters["redelivered"]) > 0
        assert "dead" not in counters and service.redis.zcard("fewstep:{fake}:pending") == 0
        assert len(killed) == 3


def test_the_server_of_the_queue_can_be_killed_under_load(tmp_path: Path) -> None:
    num_requests = 60
    with running_service(tmp_path / "data") as service, ThreadPoolExecutor(8) as pool:
        first = service.pids()["redis"]
        half_way = threading.Event()

        def ask(k: int) -> None:
            if k == num_requests // 2:
                half_way.set()
            prompt = f"fake:sleep=0.02 client {k}"
            response = post(service.url, prompt=prompt, seed=k)
            assert response.status_code == 200, response.text
            check_answer(response.json(), prompt, [k])

        asked = [pool.submit(ask, k) for k in range(num_requests)]
        assert half_way.wait(30)
        service.kill("redis")
        for future in asked:
            future.result()
        assert eventually(lambda: service.pids().get("redis")) != first


def test_the_http_process_is_replaced_and_clients_wait_for_it(tmp_path: Path) -> None:
    with running_service(tmp_path / "data") as service:
        pid = service.kill("api")
        check_answer(post(service.url, prompt="p", seed=1).json(), "p", [1])
        assert service.pids()["api"] != pid


def test_a_prompt_that_kills_workers_is_given_up_and_its_mates_are_drawn(tmp_path: Path) -> None:
    with running_service(tmp_path / "data", MAX_ATTEMPTS="2") as service, ThreadPoolExecutor() as pool:
        held = pool.submit(post, service.url, prompt="fake:sleep=0.5 hold", seed=0)
        eventually(lambda: service.redis.zcard("fewstep:{fake}:l") == 1, "the worker is busy")
        poison = pool.submit(post, service.url, prompt="fake:die", seed=1)
        mates = [pool.submit(post, service.url, prompt=f"mate {k}", seed=k) for k in range(3)]
        check_answer(held.result().json(), "fake:sleep=0.5 hold", [0])
        for k, mate in enumerate(mates):
            check_answer(mate.result().json(), f"mate {k}", [k])
        assert poison.result().status_code == 500
        assert poison.result().json()["error"]["code"] == "worker_lost"
        assert service.redis.zcard("fewstep:{fake}:dead") == 1


def test_another_server_is_used_when_one_is_named(redis_url: str, tmp_path: Path) -> None:
    with running_service(tmp_path / "data", REDIS_URL=f"{redis_url}?db=1") as service:
        assert set(service.pids()) == {"supervisor", "api", "worker"}
        assert not (tmp_path / "data" / "redis").exists()
        check_answer(post(service.url, prompt="p", seed=1).json(), "p", [1])


def test_a_worker_tells_a_container_whether_it_is_well(redis_url: str, tmp_path: Path) -> None:
    url = f"{redis_url}?db=2"
    environment = clean_environment({"RUNTIME": "fake", "REDIS_URL": url, "DATA_DIR": str(tmp_path)})

    def probe() -> int:
        command = [sys.executable, "-m", "service.run", "probe"]
        return subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True).returncode

    assert probe() == 1
    worker = start_worker(url, tmp_path)
    try:
        eventually(lambda: probe() == 0, "the worker is well")
        os.kill(worker.pid, signal.SIGTERM)
        assert worker.wait(STOP_LIMIT_S) == 0
        assert probe() == 1
    finally:
        worker.kill()


def test_two_workers_share_the_work(tmp_path: Path) -> None:
    """Each of the two is held up by one request, so both must have been at work at the same time."""
    with running_service(tmp_path / "data", WORKERS="2") as service, ThreadPoolExecutor() as pool:
        eventually(lambda: httpx.get(f"{service.url}/readyz", trust_env=False).json()["workers"] == 2)
        first = pool.submit(post, service.url, prompt="fake:sleep=3 first", seed=0)
        eventually(lambda: service.redis.zcard("fewstep:{fake}:l") == 1, "one worker is busy")
        second = pool.submit(post, service.url, prompt="fake:sleep=3 second", seed=0)
        eventually(lambda: service.redis.zcard("fewstep:{fake}:l") == 2, "both workers are busy")
        assert first.result().status_code == second.result().status_code == 200


@pytest.mark.parametrize("fate", [signal.SIGKILL, signal.SIGSTOP])
def test_without_a_supervisor_the_lease_of_a_silent_worker_runs_out(
    fate: signal.Signals, make_api: Callable[..., Api], tmp_path: Path
) -> None:
    """As in containers: a killed worker, or one that is frozen and wakes up when its job has been done by another."""
    api = make_api(LEASE_S="1")
    workers = [start_worker(api.redis_url, tmp_path / "data", LEASE_S="1")]
    try:
        with ThreadPoolExecutor() as pool:
            prompt = "fake:sleep=0.5 p"
            asked = pool.submit(post, api.url, prompt=prompt, seed=3)
            eventually(lambda: api.redis.zcard(f"{api.prefix}l") == 1, "the worker is busy")
            workers[0].send_signal(fate)
            workers.append(start_worker(api.redis_url, tmp_path / "data", LEASE_S="1"))
            check_answer(asked.result().json(), prompt, [3])
        [key] = api.redis.keys(f"{api.prefix}j:*")
        result, attempts = api.redis.hmget(key, "result", "attempts")
        assert attempts == "2"
        if fate is signal.SIGSTOP:
            workers[0].send_signal(signal.SIGCONT)
            eventually(lambda: api.redis.hget(f"{api.prefix}n", "fenced") == "1", "the zombie is turned away")
            folder = tmp_path / "data" / "results"
            eventually(lambda: len(list(folder.glob("*/*/*/*.png"))) == 1, "the zombie has taken its picture away")
        assert api.redis.hget(key, "result") == result
        check_answer(post(api.url, prompt="next", seed=1).json(), "next", [1])
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()


def test_several_http_processes_answer_on_one_socket_and_each_is_started_again(tmp_path: Path) -> None:
    with running_service(tmp_path / "data", APIS="2") as service:
        apis = {process["pid"] for process in service.run_file()["processes"] if process["role"] == "api"}
        assert len(apis) == 2
        check_answer(post(service.url, prompt="p", seed=1).json(), "p", [1])
        dead = service.kill("api")

        def replaced() -> bool:
            now = {process["pid"] for process in service.run_file()["processes"] if process["role"] == "api"}
            return len(now) == 2 and dead not in now

        eventually(replaced, "another one is started")
        check_answer(post(service.url, prompt="p", seed=2).json(), "p", [2])


def test_a_relative_path_means_the_same_in_every_process(tmp_path: Path) -> None:
    """The children run in another folder; the file holds a setting that only they read."""
    (tmp_path / "sec").mkdir()
    (tmp_path / "sec" / "fewstep_webhook_secret").write_text(f"whsec_{'A' * 32}")
    settings = {"RUNTIME": "fake", "PORT": "0", "DATA_DIR": "data", "SECRETS_DIR": "sec"}
    environment = {**clean_environment(settings), "PYTHONPATH": str(REPOSITORY)}
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "service.run"], cwd=tmp_path, env=environment, stdout=log, stderr=subprocess.STDOUT
        )
    try:
        eventually(lambda: "open http://" in (tmp_path / "log").read_text(), "ready", patience_s=60)
    finally:
        process.send_signal(signal.SIGTERM)
        assert process.wait(STOP_LIMIT_S) == 0, (tmp_path / "log").read_text()


def test_the_start_waits_for_workers_that_load_and_not_for_a_silent_http_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    supervisor = Supervisor(Settings(runtime="fake", port=0, data_dir=tmp_path, redis_url="unix:///nowhere.sock"))
    monkeypatch.setattr("service.supervise.supervisor.READY_TIMEOUT_S", 0.0)
    monkeypatch.setattr("service.supervise.supervisor.POLL_EVERY_S", 0.0)
    asked: list[str] = []

    def ask(url: str) -> dict[str, object]:
        asked.append(url)
        if url.endswith("/healthz"):
            return {"status": "ok"}
        return {"status": "ready"} if len(asked) > 9 else {}

    loading = SimpleNamespace(state=WorkerState.LOADING)
    monkeypatch.setattr("service.supervise.supervisor.live_workers", lambda _: [loading])
    monkeypatch.setattr("service.supervise.supervisor._ask", ask)
    assert supervisor._wait_until_ready() == {"status": "ready"}
    assert "still loading" in capsys.readouterr().err
    monkeypatch.setattr("service.supervise.supervisor._ask", lambda url: {})
    with pytest.raises(StartupError, match="does not answer"):
        supervisor._wait_until_ready()
    supervisor._stop()

"""``make docker-test``: build the images, start docker-compose.yml, and send requests through the published port.

BASE=debootstrap makes the base image from Debian's packages; FEWSTEP_RUNTIME=fake generates without a student.
DOCKER_ROOT is the folder in which an engine that the test starts keeps its builds and the base image for the next time.
Without an engine the test is skipped, with the reason.
"""

from __future__ import annotations

import base64
import hashlib
import itertools
import json
import os
import re
import subprocess
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from deploy.base_image import make_base_images
from deploy.dashboard import queries
from deploy.engine import Engine, NoEngine, engine
from deploy.stack import DIRECT, GRAFANA_PORT, PORT, PROMETHEUS_PORT, URL, Stack, expect

ROOT = Path(__file__).resolve().parent.parent
SECRETS = {
    "valkey": "/secrets/queue/password",
    "prometheus": "/secrets/metrics/token",
    "grafana": "/secrets/grafana/password",
}
WORKERS = 3
PROMPT = "a red heart above a blue star"
IMAGES = {"fewstep-api": 300, "fewstep-worker-cpu": 400}  # megabytes that each may add to its base
PNG = b"\x89PNG\r\n\x1a\n"
CLIENTS, ANSWERS = 8, 20  # clients that ask without a pause; answers to wait for before and after the kill
REQUEST_TIMEOUT_S = 90.0
DEBOOTSTRAP = "debootstrap"
GENERATED = re.compile(r"\bgenerated [1-9]\d* of \d+ jobs\b")  # in a worker's log


def main() -> None:
    data_root = Path(os.environ["DOCKER_ROOT"]).absolute() if os.environ.get("DOCKER_ROOT") else None
    ports = {"FEWSTEP_PORT": PORT, "PROMETHEUS_PORT": PROMETHEUS_PORT, "GRAFANA_PORT": GRAFANA_PORT}
    environment = {**ports, **os.environ}
    if subprocess.run(["docker", "buildx", "version"], capture_output=True).returncode != 0:
        environment |= {"DOCKER_BUILDKIT": "0", "COMPOSE_DOCKER_CLI_BUILD": "0"}
    os.chdir(ROOT)
    try:
        with engine(environment, data_root) as docker:
            test(docker, data_root)
    except NoEngine as reason:
        print(f"skipped: {reason}")


def test(docker: Engine, cache: Path | None) -> None:
    files, services = ["docker-compose.yml"], ["valkey", "api", "worker", "prometheus"]
    base = os.environ.get("BASE", "python:3.11-slim-bookworm")
    if base == DEBOOTSTRAP:
        files.append("deploy/compose.debian.yml")
        base, build_base = make_base_images(docker, cache)
        docker = Engine({**docker.environment, "BASE": base, "BUILD_BASE": build_base, "BUILD_NETWORK": "host"})
    else:
        services.append("grafana")
    stack = Stack(docker, files, services)
    with timed("images built"):
        stack.compose("build", *(service for service in services if service != "grafana"))
    check_images(docker, base)
    try:
        check_stack(docker, stack)
    finally:
        stack.compose("down", "-v", check=False)
    print("docker-test passed")


def check_stack(docker: Engine, stack: Stack) -> None:
    """The checks of the running stack, from the first start on."""
    started = time.monotonic()
    stack.compose("up", "-d", *stack.services)
    stack.wait_until_ready()
    key = stack.key()
    check_picture(draw(7, key), seed=7)
    print(f"first picture {time.monotonic() - started:.1f} s after 'up'", flush=True)
    expect(status_without_key() == 401, "the published port answers without a key")
    stack.wait_until_healthy()
    check_containers(docker, stack)
    check_secrets(docker, stack, key)
    check_kill(docker, stack, key)
    stack.wait_for_data()
    print(f"Prometheus answers all {len(queries(gpus=False))} queries of the dashboard, GPUs aside", flush=True)
    check_shared_load(stack, key)
    stack.compose("up", "-d", *stack.services)
    expect(stack.key() == key, "a second start made another key")
    check_picture(draw(7, key), seed=7)


def check_images(docker: Engine, base: str) -> None:
    """The size of an image above its base, and that it has neither torch nor the settings of the build."""
    base_bytes = int(docker.run("docker", "image", "inspect", "-f", "{{.Size}}", base))
    for image, limit in IMAGES.items():
        added = (int(docker.run("docker", "image", "inspect", "-f", "{{.Size}}", image)) - base_bytes) / 1e6
        print(f"{image}: {added:.0f} MB above its base of {base_bytes / 1e6:.0f} MB")
        expect(added < limit, f"{image} adds {added:.0f} MB to its base; {limit} MB are allowed")
        history = docker.run("docker", "history", "--no-trunc", "--format", "{{.CreatedBy}}", image)
        expect("PIP_" not in history, f"{image}'s history contains pip's settings: {history}")
        find = "from importlib.util import find_spec as f; print([n for n in ('torch', 'pip', 'setuptools') if f(n)])"
        python = "/opt/venv/bin/python"
        found = docker.run("docker", "run", "--rm", "--entrypoint", python, image, "-I", "-c", find)
        expect(found == "[]", f"{image} holds {found}")


def check_containers(docker: Engine, stack: Stack) -> None:
    for service in ("api", "worker"):
        user = docker.run("docker", "exec", stack.container(service), "id", "-u")
        expect(user == "10001", f"{service} runs as user {user}")
        write = "touch /app/x 2>/dev/null && echo written"
        wrote = docker.run("docker", "exec", stack.container(service), "sh", "-c", write, check=False)
        expect(not wrote, f"{service} can write to its own code")
    ports = docker.run("docker", "inspect", "-f", "{{json .HostConfig.PortBindings}}", stack.container("valkey"))
    expect(ports in ("{}", "null"), f"the queue is published: {ports}")


def check_secrets(docker: Engine, stack: Stack, key: str) -> None:
    """No secret is in a layer or in a container's description, and each container has only its own secrets."""
    secrets = [key]
    for service in SECRETS.keys() & set(stack.services):
        secrets.append(docker.run("docker", "exec", stack.container(service), "cat", SECRETS[service]))
    for service in stack.services:
        container = stack.container(service)
        image = docker.run("docker", "inspect", "-f", "{{.Image}}", container)
        shown = docker.run("docker", "history", "--no-trunc", image) + docker.run("docker", "inspect", container)
        expect(not any(secret in shown for secret in secrets), f"{service}'s image or description contains a secret")
    listed = docker.run("docker", "exec", stack.container("worker"), "ls", "/secrets/metrics", "/secrets/grafana")
    expect("token" not in listed and "password" not in listed, "the worker holds the secrets of others")


def check_shared_load(stack: Stack, key: str) -> None:
    """Several workers share the requests."""
    stack.compose("up", "-d", "--no-recreate", "--scale", f"worker={WORKERS}", *stack.services)
    stack.wait_until_ready(WORKERS)
    expect(len(stack.containers("worker")) == WORKERS, f"there are not {WORKERS} workers")
    with ThreadPoolExecutor(CLIENTS) as pool:
        for seed, answer in enumerate(pool.map(lambda seed: draw(seed, key), range(3 * ANSWERS))):
            check_picture(answer, seed)
    drew = who_drew(stack.compose("logs", "--no-color", "worker"))
    expect(len(drew) == WORKERS, f"only {sorted(drew)} drew")


def who_drew(logs: str) -> set[str]:
    """The containers whose workers say in their logs that they have drawn something."""
    return {line.split("|")[0].strip() for line in logs.splitlines() if GENERATED.search(line)}


def check_kill(docker: Engine, stack: Stack, key: str) -> None:
    """A worker that dies under load: every request is answered, with the same picture as otherwise."""
    expected = {seed: check_picture(draw(seed, key), seed) for seed in range(3)}
    worker = stack.container("worker")
    stopping, seeds, drawn = threading.Event(), itertools.count(), dict[int, str]()

    def client() -> None:
        while not stopping.is_set():
            seed = next(seeds)
            drawn[seed] = check_picture(draw(seed, key), seed)

    with ThreadPoolExecutor(CLIENTS) as pool:
        clients = [pool.submit(client) for _ in range(CLIENTS)]
        try:
            before = wait_for_answers(drawn, clients, ANSWERS)
            docker.run("docker", "kill", "--signal", "KILL", worker)
            killed = time.monotonic()
            docker.run("docker", "start", worker)
            wait_for_answers(drawn, clients, len(drawn) + CLIENTS + ANSWERS)
        finally:
            stopping.set()
        for done in clients:
            done.result()
    expect({seed: drawn[seed] for seed in expected} == expected, "other bytes for the same seed")
    asked = next(seeds)
    expect(len(drawn) == asked, f"{asked - len(drawn)} of {asked} requests were not answered")
    took = time.monotonic() - killed
    print(f"worker killed after {before} answers: all {asked} requests answered, the last {took:.1f} s after the kill")


def wait_for_answers(drawn: Mapping[int, str], clients: list[Future[None]], count: int) -> int:
    """The number of answers, once there are so many or a client has failed."""
    while len(drawn) < count and not any(client.done() for client in clients):
        time.sleep(0.01)
    return len(drawn)


def draw(seed: int, key: str) -> dict[str, Any]:
    """One picture, through the published port, as the best of several candidates, so that the dashboard has figures
    for them; the first is always good enough."""
    body = json.dumps({"prompt": PROMPT, "seed": seed, "best_of": 2, "min_reward": -1000.0}).encode()
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {key}"}
    with DIRECT.open(urllib.request.Request(f"{URL}/generate", body, headers), timeout=REQUEST_TIMEOUT_S) as answer:
        return dict(json.load(answer))


def status_without_key() -> int:
    request = urllib.request.Request(f"{URL}/generate", b"{}", {"Content-Type": "application/json"})
    try:
        with DIRECT.open(request, timeout=REQUEST_TIMEOUT_S) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code


def check_picture(answer: dict[str, Any], seed: int) -> str:
    """Check an answer with one picture; returns the picture's sha256."""
    (picture,) = answer["data"]
    data = base64.b64decode(picture["b64_json"])
    expect(data.startswith(PNG), "the picture is no PNG")
    digest = hashlib.sha256(data).hexdigest()
    expect(digest == picture["sha256"], "the picture is not the one that was announced")
    expect(picture["seed"] == seed, f"asked for seed {seed}, got {picture['seed']}")
    return digest


@contextmanager
def timed(what: str) -> Iterator[None]:
    started = time.monotonic()
    yield
    print(f"{what} in {time.monotonic() - started:.0f} s", flush=True)


if __name__ == "__main__":
    main()

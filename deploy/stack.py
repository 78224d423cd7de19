"""The services of docker-compose.yml, started for a test."""

from __future__ import annotations

import json
import os
import re
import sys
import time
import urllib.parse
import urllib.request
from collections.abc import Callable
from typing import Any

from deploy.dashboard import queries, without_data
from deploy.engine import Engine

PROJECT = "fewstep-test"
PORT = os.environ.get("FEWSTEP_PORT", "18080")
PROMETHEUS_PORT = os.environ.get("PROMETHEUS_PORT", "19090")
GRAFANA_PORT = os.environ.get("GRAFANA_PORT", "13000")
URL = f"http://127.0.0.1:{PORT}"
PROMETHEUS_URL = f"http://127.0.0.1:{PROMETHEUS_PORT}"
KEY = re.compile(r"fewstep_[0-9a-f]{12}_[0-9a-f]{48}")
HEALTHY_TIMEOUT_S = 300.0
DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))


class Stack:
    """The services of docker-compose.yml."""

    def __init__(self, docker: Engine, files: list[str], services: list[str]) -> None:
        self._docker = docker
        self.services = services
        self._compose = [*docker.compose, "--project-name", PROJECT, *(part for file in files for part in ("-f", file))]

    def compose(self, *arguments: str, check: bool = True) -> str:
        return self._docker.run(*self._compose, *arguments, check=check)

    def container(self, service: str) -> str:
        return self.containers(service)[0]

    def containers(self, service: str) -> list[str]:
        return self.compose("ps", "-q", service).splitlines()

    def key(self) -> str:
        """The API key that the first start printed."""
        found = KEY.findall(self.compose("logs", "--no-color", "init"))
        expect(len(found) == 1, f"the first start printed {len(found)} keys")
        return str(found[0])

    def wait_until_ready(self, workers: int = 1) -> None:
        """Wait until the API reports so many ready workers."""
        self._wait(lambda: [] if ready_workers() >= workers else ["api"], "ready")

    def wait_until_healthy(self) -> None:
        """Wait until every container is healthy."""
        self._wait(lambda: [service for service in self.services if self._health(service) != "healthy"], "healthy")

    def wait_for_data(self) -> None:
        """Wait until Prometheus answers every query of the dashboard."""
        self._wait(lambda: without_data(queries(gpus=False), ask_prometheus), "answered")

    def _wait(self, missing: Callable[[], list[str]], what: str) -> None:
        deadline = time.monotonic() + HEALTHY_TIMEOUT_S
        while waiting := missing():
            if time.monotonic() > deadline:
                print(self.compose("logs", "--tail", "40", check=False))
                fail(f"{', '.join(waiting)}: not {what} after {HEALTHY_TIMEOUT_S:.0f} s")
            time.sleep(0.5)

    def _health(self, service: str) -> str:
        return self._docker.run("docker", "inspect", "-f", "{{.State.Health.Status}}", self.container(service))


def ready_workers() -> int:
    try:
        with DIRECT.open(f"{URL}/readyz", timeout=5) as answer:
            return int(json.load(answer)["workers"])
    except OSError:
        return 0


def ask_prometheus(expression: str) -> list[Any]:
    """The samples of an instant query; none if there is no answer."""
    asked = urllib.parse.urlencode({"query": expression})
    try:
        with DIRECT.open(f"{PROMETHEUS_URL}/api/v1/query?{asked}", timeout=10) as answer:
            return list(json.load(answer)["data"]["result"])
    except OSError:
        return []


def expect(holds: bool, otherwise: str) -> None:
    if not holds:
        fail(otherwise)


def fail(reason: str) -> None:
    sys.exit(f"docker-test: {reason}")

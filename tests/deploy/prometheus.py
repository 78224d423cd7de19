"""A real Prometheus with the repository's configuration and rules, where the program is on PATH."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from deploy.dashboard import FOLDER
from tests.service.support import eventually

DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))


class Prometheus:
    def __init__(self, url: str) -> None:
        self.url = url

    def get(self, path: str, **query: Any) -> Any:
        with DIRECT.open(f"{self.url}{path}?{urllib.parse.urlencode(query)}", timeout=30) as answer:
            return json.load(answer)

    def ask(self, expression: str) -> list[Any]:
        """An instant query's samples."""
        return list(self.get("/api/v1/query", query=expression)["data"]["result"])

    def ready(self) -> bool:
        try:
            with DIRECT.open(f"{self.url}/-/ready", timeout=5) as answer:
                return bool(answer.status == 200)
        except OSError:
            return False


def configuration(folder: Path, target: str, token: str | None, interval: str = "1s") -> Path:
    """The repository's configuration, but for where its one target and the token are, and a faster pace."""
    config = yaml.safe_load((FOLDER / "prometheus" / "prometheus.yml").read_text("utf-8"))
    (job,) = config["scrape_configs"]
    del job["dns_sd_configs"]
    job["static_configs"] = [{"targets": [target]}]
    if token is None:
        del job["authorization"]
    else:
        (folder / "token").write_text(token)
        job["authorization"]["credentials_file"] = str(folder / "token")
    config["global"] = {"scrape_interval": interval, "evaluation_interval": interval}
    config["rule_files"] = [str(FOLDER / "prometheus" / "rules" / "*.yml")]
    path = folder / "prometheus.yml"
    path.write_text(yaml.safe_dump(config))
    return path


@contextmanager
def running(folder: Path, target: str, token: str | None = None, interval: str = "1s") -> Iterator[Prometheus]:
    """Prometheus on a free port, scraping ``target`` (host:port)."""
    folder.mkdir(parents=True, exist_ok=True)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    program = str(shutil.which("prometheus"))
    config = configuration(folder, target, token, interval)
    command = [program, f"--config.file={config}", f"--storage.tsdb.path={folder / 'data'}"]
    with (folder / "log").open("wb") as output:
        process = subprocess.Popen(
            [*command, f"--web.listen-address=127.0.0.1:{port}"], stdout=output, stderr=subprocess.STDOUT
        )
    try:
        prometheus = Prometheus(f"http://127.0.0.1:{port}")
        eventually(prometheus.ready, "Prometheus is ready")
        yield prometheus
    finally:
        process.terminate()
        process.wait(30)

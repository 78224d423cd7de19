"""BentoML: adaptive batching of up to eight, one worker for each engine."""

from __future__ import annotations

import os
from typing import Any

import bentoml

from benchmarks.serving.engine import MOST, Engine
from benchmarks.serving.servers.options import options

WORKERS, THREADS, DEADLINE = "BENCHMARK_WORKERS", "BENCHMARK_THREADS", "BENCHMARK_DEADLINE_S"
LONGEST_MS = 60_000
TRAFFIC: dict[str, Any] = {"timeout": float(os.environ.get(DEADLINE) or 0) or 60.0}


@bentoml.service(workers=int(os.environ.get(WORKERS, "1")), traffic=TRAFFIC)
class Pictures:
    def __init__(self) -> None:
        self.engine = Engine(int(os.environ.get(THREADS, "1")))

    @bentoml.api(batchable=True, max_batch_size=MOST, max_latency_ms=LONGEST_MS, route="/generate")
    def generate(self, requests: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return self.engine.answer([one["prompt"] for one in requests], [one["seed"] for one in requests])


if __name__ == "__main__":
    chosen = options()
    os.environ.update({WORKERS: str(chosen.workers), THREADS: str(chosen.threads), DEADLINE: str(chosen.deadline_s)})
    name = "benchmarks.serving.servers.bento:Pictures"
    os.execvp("bentoml", ["bentoml", "serve", name, "--port", str(chosen.port), "--host", "127.0.0.1", "-q"])

"""Ray Serve: replicas with ``serve.batch`` of up to eight."""

from __future__ import annotations

import signal
from typing import Any

import ray
from ray import serve
from starlette.requests import Request

from benchmarks.serving.engine import MOST, Engine
from benchmarks.serving.servers.options import options

BATCH_WAIT_S = 0.01


@serve.deployment(max_ongoing_requests=100)
class Pictures:
    def __init__(self, threads: int) -> None:
        self.engine = Engine(threads)

    @serve.batch(max_batch_size=MOST, batch_wait_timeout_s=BATCH_WAIT_S)
    async def answer(self, requests: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return self.engine.answer([one["prompt"] for one in requests], [one["seed"] for one in requests])

    async def __call__(self, request: Request) -> Any:
        return await self.answer(await request.json())


if __name__ == "__main__":
    chosen = options()
    ray.init(include_dashboard=False, log_to_driver=False, num_cpus=max(2, chosen.workers))
    http: dict[str, Any] = {"host": "127.0.0.1", "port": chosen.port}
    if chosen.deadline_s:
        http["request_timeout_s"] = chosen.deadline_s
    serve.start(http_options=http)
    deployment = Pictures.options(
        num_replicas=chosen.workers, ray_actor_options={"num_cpus": 1, "runtime_env": {"env_vars": {}}}
    )
    serve.run(deployment.bind(chosen.threads), route_prefix="/generate")
    signal.sigwait({signal.SIGTERM, signal.SIGINT})
    serve.shutdown()
    ray.shutdown()

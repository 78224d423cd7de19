"""LitServe: batches of up to eight, workers on the CPU."""

from __future__ import annotations

from typing import Any

import litserve as ls

from benchmarks.serving.engine import MOST, Engine
from benchmarks.serving.servers.options import Options, options

BATCH_TIMEOUT_S = 0.005


class Api(ls.LitAPI):  # type: ignore[misc]
    threads = 1

    def setup(self, device: str) -> None:
        self.engine = Engine(self.threads)

    def decode_request(self, request):  # type: ignore[no-untyped-def]  # LitServe reads an annotation as a body model
        return request["prompt"], request["seed"]

    def batch(self, inputs: list[tuple[str, int]]) -> list[tuple[str, int]]:
        return inputs

    def predict(self, batch: Any) -> list[dict[str, Any]]:
        return self.engine.answer([prompt for prompt, _ in batch], [seed for _, seed in batch])

    def unbatch(self, output: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return output

    def encode_response(self, output: dict[str, Any]) -> dict[str, Any]:
        return output


def serve(chosen: Options) -> None:
    api = Api(max_batch_size=MOST, batch_timeout=BATCH_TIMEOUT_S, api_path="/generate")
    api.threads = chosen.threads
    server = ls.LitServer(
        api, accelerator="cpu", workers_per_device=chosen.workers, timeout=chosen.deadline_s or False,
        healthcheck_path="/ready",
    )  # fmt: skip
    server.run(port=chosen.port, generate_client_file=False, log_level="warning", access_log=False)


if __name__ == "__main__":
    serve(options())

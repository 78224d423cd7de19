"""Plain FastAPI: a synchronous handler in its thread pool, uvicorn's own workers, uvloop and httptools."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import uvicorn
from fastapi import FastAPI
from pydantic import BaseModel

from benchmarks.serving.engine import Engine
from benchmarks.serving.servers.options import options

THREADS = "BENCHMARK_THREADS"  # uvicorn's workers are processes of their own, which import this file again


class Request(BaseModel):
    prompt: str
    seed: int


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    app.state.engine = Engine(int(os.environ[THREADS]))
    yield


app = FastAPI(lifespan=lifespan)


@app.post("/generate")
def generate(request: Request) -> dict[str, Any]:
    answer: dict[str, Any] = app.state.engine.answer([request.prompt], [request.seed])[0]
    return answer


@app.get("/ready")
def ready() -> bool:
    return True


if __name__ == "__main__":
    chosen = options()
    os.environ[THREADS] = str(chosen.threads)
    uvicorn.run(
        "benchmarks.serving.servers.plain_fastapi:app", port=chosen.port, workers=chosen.workers, access_log=False,
        log_level="warning",
    )  # fmt: skip

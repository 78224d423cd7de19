"""The target of a load: a fewstep service, or any server with OpenAI's endpoint for images."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, cast

import httpx

from fewstep.async_client import AsyncClient
from fewstep.connection import connection
from fewstep.errors import FewstepError
from fewstep.load.drive import Outcome, Send
from fewstep.load.workload import Request
from fewstep.protocol import error_of
from fewstep.request import Options
from fewstep.retries import Retries

OPENAI_PATH = "v1/images/generations"


@asynccontextmanager
async def fewstep_target(url: str | None, api_key: str | None, timeout_s: float, most: int) -> AsyncIterator[Send]:
    """Sends to POST /generate, without retries, which would hide failures."""
    once = Retries(tries=1)
    async with AsyncClient(url, api_key, timeout_s=timeout_s, retries=once, connections=most) as client:

        async def send(request: Request) -> Outcome:
            prompt, options = request["prompt"], {name: v for name, v in request.items() if name != "prompt"}
            answer = await client.generate(prompt, **cast(Options, options))
            stages = {name: v for name, v in answer.timings.model_dump().items() if isinstance(v, float)}
            return Outcome(len(answer.data), None, answer.batch_size, stages)

        yield send


@asynccontextmanager
async def openai_target(url: str | None, api_key: str | None, timeout_s: float, most: int) -> AsyncIterator[Send]:
    """Sends to POST /v1/images/generations: prompt, n, size and model, and the load's other fields."""
    limits = httpx.Limits(max_connections=most, max_keepalive_connections=most)
    async with connection(url, api_key, timeout_s).open(httpx.AsyncClient, limits=limits) as http:

        async def send(request: Request) -> Outcome:
            try:
                response: Any = await http.post(OPENAI_PATH, json=dict(request))
            except httpx.TransportError as failure:
                response = failure
            if (error := error_of(response)) is not None:
                raise error
            try:
                return Outcome(len(response.json()["data"]))
            except (ValueError, KeyError, TypeError):
                raise FewstepError("The response is not one of OpenAI's images API; is the address right?") from None

        yield send


TARGETS = {"fewstep": fewstep_target, "openai": openai_target}

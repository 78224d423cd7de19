"""``fewstep bench``: how fast a service draws, measured from outside."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Annotated, Any, cast

import typer

from fewstep.async_client import AsyncClient
from fewstep.errors import ServerError, WrongUse
from fewstep.load import Report, run
from fewstep.options import ApiKey, Json, Url
from fewstep.output import milliseconds, print_json
from fewstep.request import Options
from fewstep.retries import Retries

PROMPTS = ("a red heart above a blue star", "a large yellow star on a navy background", "a green ring on cream")
BAR_CHARS = 40


def bench(
    requests: Annotated[int, typer.Option(min=1, max=100_000, help="How many requests in all.")] = 100,
    concurrency: Annotated[int, typer.Option(min=1, max=512, help="How many at a time.")] = 4,
    count: Annotated[int, typer.Option("-n", "--count", min=1, max=10, help="Images of each request.")] = 1,
    prompts: Annotated[Path | None, typer.Option(help="A file with one prompt a line.")] = None,
    steps: Annotated[int | None, typer.Option(help="One of the model's step counts.", show_default="its most")] = None,
    model: Annotated[str | None, typer.Option(help="The id of a served model.")] = None,
    warmup: Annotated[int, typer.Option(min=0, max=1000, help="Requests before those that count.")] = 4,
    url: Url = None,
    api_key: ApiKey = None,
    json: Json = False,
) -> None:
    """Send a bounded load, each request when one before it was answered, and print latencies and throughput."""
    options: dict[str, Any] = {"n": count, "num_inference_steps": steps, "model": model}
    asked = _read(prompts) if prompts else PROMPTS
    told = asyncio.run(_bench(url, api_key, asked, cast(Options, options), requests, concurrency, warmup))
    if json:
        print_json(told)
    else:
        typer.echo(sentences(told))
    if told.errors:
        raise typer.Exit(ServerError.exit_code)


async def _bench(
    url: str | None, api_key: str | None, prompts: tuple[str, ...], options: Options,
    requests: int, concurrency: int, warmup: int,
) -> Report:  # fmt: skip
    async with AsyncClient(url, api_key, retries=Retries(tries=1), connections=concurrency) as client:
        if warmup:
            await client.generate(prompts[0], **options)  # what is wrong with all of them is told at once
            await run(client, prompts, options, requests=warmup, concurrency=concurrency)
        return await run(client, prompts, options, requests=requests, concurrency=concurrency)


def _read(file: Path) -> tuple[str, ...]:
    try:
        lines = tuple(line.strip() for line in file.read_text("utf-8").splitlines() if line.strip())
    except (OSError, UnicodeDecodeError) as error:
        raise WrongUse(f"{file} cannot be read: {getattr(error, 'strerror', None) or 'it is no text'}.") from None
    if not lines:
        raise WrongUse(f"{file} holds no prompt.")
    return lines


def sentences(report: Report) -> str:
    """A report for people."""
    lines = [
        f"{report.images} images of {report.requests} requests, {report.concurrency} at a time, "
        f"in {report.wall_s:.2f} s",
        f"{report.images_per_s:.1f} images/s, {report.requests_per_s:.1f} requests/s",
    ]
    if report.latency is not None:
        lines.append("latency  " + _figures(report.latency.model_dump()))
        lines.append("stages   " + _figures(report.stages))
    if report.batch_sizes:
        lines.append("batch    images")
        lines += _bars(report.batch_sizes)
    lines += [f"error    {code}: {count} requests" for code, count in report.errors.items()]
    return "\n".join(lines)


def _figures(seconds: dict[str, float]) -> str:
    return "  ".join(f"{name.removesuffix('_s')} {milliseconds(value)}" for name, value in seconds.items())


def _bars(sizes: dict[int, int]) -> list[str]:
    most = max(sizes.values())
    return [f"{size:>5}    {'█' * max(1, round(BAR_CHARS * n / most))} {n}" for size, n in sizes.items()]

"""``fewstep bench``: how fast a service generates images, measured from outside."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import typer

from fewstep.errors import ServerError, WrongUse
from fewstep.load.drive import MOST_IN_FLIGHT, Sample, Send, closed_loop, open_loop
from fewstep.load.plot import plot
from fewstep.load.report import Report, report
from fewstep.load.targets import TARGETS
from fewstep.load.workload import Arrival, Mix, Request, poisson, read_trace, shares
from fewstep.options import ApiKey, Json, Url, write_file
from fewstep.output import milliseconds, print_json

PROMPTS = ("a red heart above a blue star", "a large yellow star on a navy background", "a green ring on cream")
BAR_CHARS = 40
WEIGHTED = "Repeat it to mix several, with optional weights (4:3 is three times as frequent)."


class Api(StrEnum):
    """The endpoints that can be measured."""

    fewstep = "fewstep"
    openai = "openai"


@dataclass(frozen=True)
class Load:
    """One load: open if it has arrivals, else closed."""

    name: str
    mix: Mix
    seed: int
    users: int
    count: int | None
    seconds: float | None
    arrivals: list[Arrival] | None

    @property
    def total(self) -> int | None:
        """The number of requests, if it is known in advance."""
        return self.count if self.arrivals is None else len(self.arrivals)


def bench(
    requests: Annotated[int, typer.Option(min=1, max=1_000_000, help="Closed loop: number of requests in all.")] = 100,
    concurrency: Annotated[int, typer.Option(min=1, max=2000, help="Closed loop: number of users.")] = 4,
    seconds: Annotated[
        float | None,
        typer.Option(min=0.1, help="How long to send requests, in place of --requests.", show_default="60"),
    ] = None,
    rate: Annotated[
        float | None, typer.Option(min=0.001, help="Open loop: random (Poisson) arrivals, this many per second.")
    ] = None,
    trace: Annotated[
        Path | None, typer.Option(help='Open loop: arrivals from a file of JSON lines, {"at_s": 0.5, "prompt": "..."}.')
    ] = None,
    objective: Annotated[float | None, typer.Option(help="Seconds within which an answer counts as goodput.")] = None,
    count: Annotated[list[str], typer.Option("-n", "--count", help=f"Images per request. {WEIGHTED}")] = [],  # noqa: B006
    steps: Annotated[list[str], typer.Option(help=f"Step counts. {WEIGHTED}")] = [],  # noqa: B006
    size: Annotated[list[str], typer.Option(help=f"WIDTHxHEIGHT. {WEIGHTED}")] = [],  # noqa: B006
    model: Annotated[list[str], typer.Option(help=f"Ids of served models. {WEIGHTED}")] = [],  # noqa: B006
    prompts: Annotated[Path | None, typer.Option(help="A file with one prompt per line.")] = None,
    api: Annotated[Api, typer.Option(help="openai: any server with POST /v1/images/generations.")] = Api.fewstep,
    warmup: Annotated[int, typer.Option(min=0, max=1000, help="Requests before the measurement.")] = 4,
    timeout: Annotated[float, typer.Option(min=0.1, help="Seconds to wait for an answer.")] = 120.0,
    seed: Annotated[int, typer.Option(help="Seed of the arrivals and the mix.")] = 1,
    output: Annotated[Path | None, typer.Option("-o", "--output", help="Write the report to this file (JSON).")] = None,
    picture: Annotated[Path | None, typer.Option("--plot", help="Plot latencies and rates to this file (PNG).")] = None,
    url: Url = None,
    api_key: ApiKey = None,
    json: Json = False,
) -> None:
    """Send a bounded load and print latencies, throughput and goodput.

    In a closed loop a fixed number of users each wait for their answer before the next request. An open loop (--rate or
    --trace) sends requests when they are due, whether or not earlier ones are answered, as independent users do.
    """
    chosen = {"n": (count, int), "num_inference_steps": (steps, int), "size": (size, str), "model": (model, str)}
    fields = {name: shares(texts, kind) for name, (texts, kind) in chosen.items() if texts}
    mix = Mix(_read(prompts) if prompts else PROMPTS, fields)
    load = _load(mix, requests, concurrency, seconds, rate, trace, seed)
    samples = asyncio.run(_run(api, url, api_key, timeout, load, warmup))
    found = report(load.name, samples, load.seconds, objective)
    if output is not None:
        write_file(output, (found.model_dump_json(indent=1) + "\n").encode())
    if picture is not None:
        plot(found, samples, picture)
    print_json(found) if json else typer.echo(sentences(found))
    if found.errors:
        raise typer.Exit(ServerError.exit_code)


def _load(
    mix: Mix, requests: int, users: int, seconds: float | None, rate: float | None, trace: Path | None, seed: int
) -> Load:
    """The load that the options describe.

    Raises:
        WrongUse: they describe two, or the trace cannot be read.
    """
    if rate is not None and trace is not None:
        raise WrongUse("--rate and --trace exclude each other: give one of them.")
    if trace is not None:
        whole = read_trace(_text(trace), mix.requests(seed))
        arrivals = [arrival for arrival in whole if seconds is None or arrival.at_s < seconds]
        return Load(f"trace {trace.name}", mix, seed, users, None, seconds or whole[-1].at_s or None, arrivals)
    if rate is not None:
        lasting_s = seconds or 60.0
        arrivals = poisson(mix.requests(seed), rate, lasting_s, seed)
        if not arrivals:
            raise WrongUse(f"No request arrives within {lasting_s:g} s at {rate:g} per second: raise one of them.")
        return Load(f"open loop, {rate:g} requests/s", mix, seed, users, None, lasting_s, arrivals)
    return Load(f"closed loop, {users} users", mix, seed, users, None if seconds else requests, seconds, None)


async def _run(
    api: Api, url: str | None, api_key: str | None, timeout_s: float, load: Load, warmup: int
) -> list[Sample]:
    from rich.console import Console  # slow to load, and of no use to other commands
    from rich.progress import Progress

    most = load.users if load.arrivals is None else MOST_IN_FLIGHT
    async with TARGETS[api](url, api_key, timeout_s, most) as send:
        await _warm_up(send, load.mix.requests(load.seed), load.users, warmup)
        with Progress(console=Console(stderr=True), disable=not Console(stderr=True).is_terminal) as progress:
            task = progress.add_task(load.name, total=load.total)

            def watch(sample: Sample) -> None:
                progress.advance(task)

            if load.arrivals is not None:
                return await open_loop(send, load.arrivals, watch=watch)
            requests = load.mix.requests(load.seed)
            return await closed_loop(send, requests, load.users, count=load.count, seconds=load.seconds, watch=watch)


async def _warm_up(send: Send, requests: Iterator[Request], users: int, count: int) -> None:
    """Send the first request alone, so that an error that concerns all of them shows at once."""
    if count:
        await send(next(requests))
        await closed_loop(send, islice(requests, count - 1), users)


def _text(file: Path) -> str:
    try:
        return file.read_text("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise WrongUse(f"{file} cannot be read: {reason}.") from None


def _read(file: Path) -> tuple[str, ...]:
    lines = tuple(line.strip() for line in _text(file).splitlines() if line.strip())
    if not lines:
        raise WrongUse(f"{file} has no prompts: one per line is accepted.")
    return lines


def sentences(report: Report) -> str:
    """A report as text."""
    lines = [
        f"{report.load}: {report.images} images from {report.requests} requests in {report.wall_s:.2f} s",
        f"{report.images_per_s:.1f} images/s, {report.requests_per_s:.1f} requests/s"
        f" ({report.offered_per_s:.1f} offered)",
    ]
    if report.objective_s is not None and report.goodput_share is not None:
        within = f"within {milliseconds(report.objective_s)}"
        lines.append(f"goodput  {report.goodput_per_s:.1f} requests/s {within}: {report.goodput_share:.1%} of all")
    if report.latency is not None:
        lines.append("latency  " + _figures(report.latency.model_dump()))
    if report.stages:
        lines.append("stages   " + _figures(report.stages))
    if report.batch_sizes:
        lines.append("batch    images")
        lines += _bars(report.batch_sizes)
    lines += [f"error    {code}: {count} requests" for code, count in report.errors.items()]
    return "\n".join(lines)


def _figures(seconds: dict[str, Any]) -> str:
    return "  ".join(f"{name.removesuffix('_s')} {milliseconds(value)}" for name, value in seconds.items())


def _bars(sizes: dict[int, int]) -> list[str]:
    most = max(sizes.values())
    return [f"{size:>5}    {'█' * max(1, round(BAR_CHARS * n / most))} {n}" for size, n in sizes.items()]

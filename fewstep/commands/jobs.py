"""``fewstep jobs``: the jobs that you submitted, and their images."""

from __future__ import annotations

from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from fewstep.answers import Event, Job
from fewstep.errors import JobFailed
from fewstep.options import ApiKey, Json, Url, client, write_file
from fewstep.output import job_line, print_json, rewards, shortened, table

app = typer.Typer(
    no_args_is_help=True,
    help="List, show, watch and cancel your jobs, fetch their images, and give feedback on them.",
)


class State(StrEnum):
    """The states of a job."""

    queued = "queued"
    running = "running"
    done = "done"
    failed = "failed"
    cancelled = "cancelled"
    expired = "expired"


class Feedback(StrEnum):
    """The feedback that an image can get."""

    chosen = "chosen"
    rejected = "rejected"
    rerolled = "rerolled"


JobId = Annotated[str, typer.Argument(metavar="ID", help="The job's id.")]


@app.command("list")
def list_jobs(
    limit: Annotated[int, typer.Option(min=1, max=10_000, help="The most to list, newest first.")] = 20,
    status: Annotated[list[State], typer.Option(help="Only jobs in this state; may be repeated.")] = [],  # noqa: B006
    everybody: Annotated[bool, typer.Option("--all", help="The jobs of all keys; needs the scope admin.")] = False,
    url: Url = None,
    api_key: ApiKey = None,
    json: Json = False,
) -> None:
    """List your own jobs that the service still keeps; with --all, everybody's."""
    with client(url, api_key) as service:
        jobs = service.jobs(limit, status=[state.value for state in status], everybody=everybody)
    if json:
        return print_json({"data": jobs})
    owner = ("KEY",) if everybody else ()
    rows = [(*_row(job), *((job.key or "-",) if everybody else ()), shortened(job.prompt)) for job in jobs]
    head = ("ID", "STATUS", "CREATED", "IMAGES", *owner, "PROMPT")
    typer.echo(table(head, rows) if rows else "There are no such jobs.")


@app.command()
def get(id: JobId, url: Url = None, api_key: ApiKey = None, json: Json = False) -> None:
    """Show a job as it is now."""
    with client(url, api_key) as service:
        _show(service.job(id), json)


@app.command()
def cancel(id: JobId, url: Url = None, api_key: ApiKey = None, json: Json = False) -> None:
    """Cancel a job; one that has ended stays as it is."""
    with client(url, api_key) as service:
        _show(service.cancel(id), json)


@app.command()
def feedback(
    id: JobId,
    word: Annotated[Feedback, typer.Argument(metavar="WORD", help="chosen, rejected or rerolled.")],
    image: Annotated[int, typer.Option(help="Which image of the job, from 0.")] = 0,
    url: Url = None,
    api_key: ApiKey = None,
    json: Json = False,
) -> None:
    """Report what became of an image; the last report counts."""
    with client(url, api_key) as service:
        noted = service.feedback(id, word.value, image)
    trains = "; its prompt may train later students" if noted.trains else ""
    print_json(noted.model_dump()) if json else typer.echo(f"Image {image} of {id} is {word.value}{trains}.")


@app.command()
def watch(id: JobId, url: Url = None, api_key: ApiKey = None, json: Json = False) -> None:
    """Follow a job to its end; with --json, print one event per line. Exit code 8: it ended without images."""
    with client(url, api_key) as service:
        for event in service.events(id):
            if json:
                print_json({"number": event.number, "event": event.name, **event.data})
            else:
                typer.echo(_sentence(event))


@app.command()
def wait(
    id: JobId,
    timeout: Annotated[float | None, typer.Option(min=0, help="Seconds to wait at most.")] = None,
    url: Url = None,
    api_key: ApiKey = None,
    json: Json = False,
) -> None:
    """Wait for a job to end. Exit code 8: it ended without images."""
    with client(url, api_key) as service:
        job = service.wait(id, timeout)
    _show(job, json)
    if job.status != "done":
        raise typer.Exit(JobFailed.exit_code)


@app.command()
def image(
    id: JobId,
    output: Annotated[Path, typer.Option("-o", "--output", help="The file to write.")],
    index: Annotated[int, typer.Option("-k", "--index", min=0, help="Which image, from 0.")] = 0,
    url: Url = None,
    api_key: ApiKey = None,
    json: Json = False,
) -> None:
    """Write one image of a finished job to a file."""
    with client(url, api_key) as service:
        data = service.image(id, index)
    write_file(output, data)
    print_json({"file": str(output), "bytes": len(data)}) if json else typer.echo(str(output))


def _show(job: Job, json: bool) -> None:
    if json:
        return print_json(job)
    typer.echo(job_line(job))
    for picture in job.data:
        typer.echo(f"  {picture.url}  seed {picture.seed}  {rewards(picture.reward)}")


def _row(job: Job) -> tuple[str, ...]:
    return job.id, job.status, _time(job), str(len(job.seeds))


def _time(job: Job) -> str:
    return datetime.fromtimestamp(job.created, UTC).astimezone().strftime("%Y-%m-%d %H:%M:%S")


def _sentence(event: Event) -> str:
    data = event.data
    if event.name == "queued":
        return "queued" if data.get("position") is None else f"queued; {data['position']} jobs are ahead of it"
    if event.name == "started":
        return f"started after {data['queue_s']:.2f} s"
    if event.name == "image_generation.partial_image":
        return f"image {data['index']}: preview {data['partial_image_index'] + 1}"
    if event.name == "image_generation.completed":
        return f"image {data['index']}: seed {data['seed']}  {rewards(data['reward'])}"
    return event.name

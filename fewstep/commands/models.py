"""``fewstep models``: the models of a running service, and the operator's load, promote, unload and canary."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from fewstep.options import AdminKey, Json, Url, client
from fewstep.output import print_json, table
from fewstep.protocol import quoted

HEAD = ("MODEL", "VERSION", "STATE", "", "WORKERS", "REASON")

app = typer.Typer(no_args_is_help=True, help="List, load, promote, unload and compare the models of a running service.")

Name = Annotated[str, typer.Argument(metavar="ID", help="The model: the name of its folder in FEWSTEP_MODELS.")]
Version = Annotated[str, typer.Argument(metavar="VERSION", help="The version: the name of its folder in the model's.")]
Wait = Annotated[float, typer.Option("--wait", min=0, max=600, help="Seconds to wait for the workers.")]


@app.command("list")
def list_models(url: Url = None, api_key: AdminKey = None, json: Json = False) -> None:
    """List every version in the service's directory, and its state."""
    with client(url, api_key) as service:
        body = service.operate("GET", "admin/models")
    print_json(body) if json else typer.echo(table(HEAD, [_row(version) for version in body["data"]]))


@app.command()
def load(
    model: Name, version: Version, wait: Wait = 120.0, url: Url = None, api_key: AdminKey = None, json: Json = False
) -> None:
    """Load and warm up a version on every worker, beside the served ones. Exit code 3: it was refused."""
    with client(url, api_key) as service:
        _show(service.operate("POST", _path(model, version, "load"), wait_s=wait), json)


@app.command()
def promote(model: Name, version: Version, url: Url = None, api_key: AdminKey = None, json: Json = False) -> None:
    """Make a loaded version the latest, which requests without a version get."""
    with client(url, api_key) as service:
        _show(service.operate("POST", _path(model, version, "promote")), json)


@app.command()
def unload(
    model: Name, version: Version, wait: Wait = 120.0, url: Url = None, api_key: AdminKey = None, json: Json = False
) -> None:
    """Refuse new requests for a version, finish those that were accepted, and unload it."""
    with client(url, api_key) as service:
        _show(service.operate("POST", _path(model, version, "unload"), wait_s=wait), json)


@app.command()
def canary(
    model: Name,
    version: Version,
    share: Annotated[float, typer.Option(help="Share of the latest version's requests that both generate.")] = 0.05,
    margin: Annotated[
        float, typer.Option(help="How much lower a scorer's mean may be, in standard deviations of the teacher.")
    ] = 0.1,
    failures: Annotated[float, typer.Option(help="Share of the pairs that may fail with the new version only.")] = 0.02,
    slowdown: Annotated[float, typer.Option(help="How many times as long a call may take.")] = 1.25,
    stop: Annotated[bool, typer.Option("--stop", help="Stop comparing and keep the latest version.")] = False,
    wait: Wait = 120.0,
    url: Url = None,
    api_key: AdminKey = None,
    json: Json = False,
) -> None:
    """Compare a version with the latest one on a share of the traffic; promote it or roll it back once that is sure.

    Both generate the same prompts from the same seeds, at low priority, and the pictures are sent to nobody.
    """
    query = {"share": share, "margin": margin, "failures": failures, "slowdown": slowdown, "wait_s": wait}
    action, options = ("stop", {}) if stop else ("start", query)
    with client(url, api_key) as service:
        body = service.operate("POST", f"admin/canaries/{quoted(model)}/{quoted(version)}/{action}", **options)
    print_json(body) if json else typer.echo(_sentence(body))


@app.command()
def canaries(url: Url = None, api_key: AdminKey = None, json: Json = False) -> None:
    """List each model's canary, running or ended, with the result of its pairs."""
    with client(url, api_key) as service:
        body = service.operate("GET", "admin/canaries")
    if json:
        return print_json(body)
    typer.echo("\n".join(map(_sentence, body["data"])) or "There was no canary yet.")


def _sentence(row: dict[str, Any]) -> str:
    """A canary in one line."""
    shown = [f"{name} {one['mean']:+.3f}{_width(one['half_width'])}" for name, one in sorted(row["rewards"].items())]
    why = f" ({row['reason']})" if row["reason"] else ""
    figures = "; ".join([f"{row['pairs']} pairs", *shown])
    return f"{row['model']} {row['candidate']} against {row['base']}: {row['state']}{why}; {figures}."


def _width(half_width: float | None) -> str:
    return "" if half_width is None else f" ± {half_width:.3f}"


def _path(model: str, version: str, action: str) -> str:
    return f"admin/models/{quoted(model)}/{quoted(version)}/{action}"


def _show(row: dict[str, Any], as_json: bool) -> None:
    if as_json:
        return print_json(row)
    latest = " and its model's latest version" if row["latest"] else ""
    typer.echo(f"{row['model']} {row['version']} is {row['state']}{latest}.")


def _row(version: dict[str, Any]) -> list[str]:
    latest = "latest" if version["latest"] else ""
    return [version["model"], version["version"], version["state"], latest, str(version["workers"]), version["reason"]]

"""Who calls, and under which address the service was called."""

from __future__ import annotations

from starlette.requests import Request
from starlette.types import Receive

from service.observe.context import ANONYMOUS
from service.settings import Settings


def key_of(request: Request) -> str:
    """The id of the key that a request came with; ``service.http.access`` sets ``request.state.key``."""
    return str(getattr(request.state, "key", ANONYMOUS))


def owner_of(request: Request) -> str | None:
    """Whose jobs a caller may see and cancel: its own, or with the scope admin everybody's (None)."""
    everybodys = request.state.keyed and "admin" in request.state.scopes
    return None if everybodys else key_of(request)


def base_url_of(request: Request, settings: Settings) -> str:
    """The prefix of the URLs in responses, with a trailing slash."""
    return f"{settings.public_url}/" if settings.public_url else str(request.base_url)


def job_url(settings: Settings, id: str) -> str:
    """Where to ask for a job; relative to the host where the service knows no address of its own."""
    return f"{settings.public_url or ''}/jobs/{id}"


async def client_gone(receive: Receive) -> None:
    """Returns when the client has closed the connection. (The body has been read before.)"""
    while (await receive())["type"] != "http.disconnect":
        pass

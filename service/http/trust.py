"""Which requests a service without API keys accepts: those of programs and people on its own machine.

Every web page that is open on the machine can send requests to 127.0.0.1 (DNS rebinding, cross-site forms), and so can
anyone whom a reverse proxy in front of the service lets in. Without keys, only their headers give them away.
"""

from __future__ import annotations

import ipaddress
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.types import Scope

from service.errors import Forbidden
from service.settings import Settings

PROXY_HEADERS = ("forwarded", "x-real-ip", "via")
PROXY_PREFIX = "x-forwarded-"
SAFE_METHODS = ("GET", "HEAD", "OPTIONS")
CODE = "untrusted_request"
MAKE_A_KEY = "create an API key with fewstep keys create"


def check_keyless(scope: Scope, settings: Settings) -> None:
    """Return if a request without a key may be answered by a service that has none.

    Raises:
        Forbidden: it comes from another web page, or (without --insecure) through a proxy or under a host name that is
            not this machine's own.
    """
    headers = Headers(scope=scope)
    if scope.get("method", "GET") not in SAFE_METHODS and _cross_site(headers, settings):
        raise Forbidden("Requests from other web pages are refused: FEWSTEP_CORS allows their origins.", code=CODE)
    if settings.insecure:
        return
    if settings.public_url or proxied(headers):
        raise Forbidden(f"This service is behind a proxy and has no API key: {MAKE_A_KEY}.", code=CODE)
    if not is_loopback_name(headers.get("host", "")):
        message = f"This service has no API key, so it accepts requests to localhost only: use that, or {MAKE_A_KEY}."
        raise Forbidden(message, code=CODE)


def proxied(headers: Headers) -> bool:
    """Whether the headers show a proxy between the client and this process."""
    return any(name in PROXY_HEADERS or name.startswith(PROXY_PREFIX) for name in headers.keys())


def is_loopback_name(host: str) -> bool:
    """Whether a Host header names this machine to itself: localhost, 127.0.0.0/8 or [::1], with or without a port."""
    try:
        name = urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return False
    if name == "localhost" or name.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


def is_local(scope: Scope) -> bool:
    """Whether a request comes directly from this machine."""
    client, headers = scope.get("client"), Headers(scope=scope)
    if client is None or proxied(headers) or not is_loopback_name(headers.get("host", "")):
        return False
    try:
        return ipaddress.ip_address(client[0]).is_loopback
    except ValueError:
        return False


def _cross_site(headers: Headers, settings: Settings) -> bool:
    origin = headers.get("origin")
    if origin is not None and (origin in settings.cors or "*" in settings.cors):
        return False
    if headers.get("sec-fetch-site", "none") not in ("same-origin", "none"):
        return True
    return origin is not None and urlsplit(origin).netloc != headers.get("host", "")

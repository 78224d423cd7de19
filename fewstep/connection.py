"""Where the service is and who asks: from arguments, else from the environment."""

from __future__ import annotations

import os
from dataclasses import dataclass
from ipaddress import ip_address

import httpx

from fewstep.errors import WrongUse

URL_VARIABLE, KEY_VARIABLE = "FEWSTEP_URL", "FEWSTEP_API_KEY"
DEFAULT_URL = "http://127.0.0.1:8000"
USER_AGENT = "fewstep-python"
CONNECT_S = 10.0


@dataclass(frozen=True)
class Connection:
    """``proxies`` says whether the environment's proxies are used: never for this machine's own addresses."""

    base_url: str
    headers: dict[str, str]
    proxies: bool
    timeout: httpx.Timeout


def connection(url: str | None, api_key: str | None, timeout_s: float) -> Connection:
    """How to reach the service.

    Raises:
        WrongUse: the address or the key cannot be one.
    """
    address = (url or os.environ.get(URL_VARIABLE) or DEFAULT_URL).rstrip("/")
    key = api_key or os.environ.get(KEY_VARIABLE)
    headers = {"User-Agent": USER_AGENT}
    if key is not None:
        if not (key.isascii() and key.isprintable()) or " " in key:
            raise WrongUse("An API key has printable ASCII characters and no space.")
        headers["Authorization"] = f"Bearer {key}"
    return Connection(f"{address}/", headers, not _is_here(address), httpx.Timeout(timeout_s, connect=CONNECT_S))


def _is_here(address: str) -> bool:
    try:
        parsed = httpx.URL(address)
    except httpx.InvalidURL as error:
        raise WrongUse(f"{address} is no address: {error}.") from None
    if parsed.scheme not in ("http", "https") or not parsed.host:
        raise WrongUse(f"{address} is no address: it must begin with http:// or https:// and name a host.")
    try:
        return ip_address(parsed.host).is_loopback
    except ValueError:
        return parsed.host == "localhost"

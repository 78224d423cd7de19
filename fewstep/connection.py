"""The service's address, the key and the proxy: from arguments, else from the environment."""

from __future__ import annotations

import os
import re
import ssl
from dataclasses import dataclass
from ipaddress import ip_address
from typing import Any, TypeVar
from urllib.request import getproxies, proxy_bypass

import httpx

from fewstep.errors import WrongUse

URL_VARIABLE, KEY_VARIABLE = "FEWSTEP_URL", "FEWSTEP_API_KEY"
DEFAULT_URL = "http://127.0.0.1:8000"
OPENAI_SUFFIX = "/v1"  # OpenAI's clients want it in their address; this client adds what each call needs
USER_AGENT = "fewstep-python"
CONNECT_S = 10.0
LARGEST_PORT = 65535
HOST_NAME = re.compile(rb"[A-Za-z0-9._-]+")
SOCKS_MISSING = "A SOCKS proxy needs one more package: pip install 'httpx[socks]'."

H = TypeVar("H", httpx.Client, httpx.AsyncClient)


@dataclass(frozen=True)
class Connection:
    """``proxy`` is the environment's proxy for this service, if there is one: never for this machine itself."""

    base_url: str
    headers: dict[str, str]
    proxy: str | None
    timeout: httpx.Timeout

    def open(self, kind: type[H], **more: Any) -> H:
        """An httpx client for this service; ``more`` are httpx's own arguments.

        Raises:
            WrongUse: a proxy or certificate variable of the environment cannot be used.
        """
        if more.get("transport") is None:
            more = {**more, "proxy": self.proxy, "verify": _certificates(self.base_url)}
        try:
            return kind(base_url=self.base_url, headers=self.headers, timeout=self.timeout, trust_env=False, **more)
        except ImportError:
            raise WrongUse(SOCKS_MISSING) from None
        except (ValueError, httpx.InvalidURL) as error:
            reason = str(error).rstrip(".")
            raise WrongUse(f"The proxy of the environment, {_shown(self.proxy)}, cannot be used: {reason}.") from None


def connection(url: str | None, api_key: str | None, timeout_s: float) -> Connection:
    """How to reach the service.

    Raises:
        WrongUse: the address or the key is invalid.
    """
    address = (url or os.environ.get(URL_VARIABLE) or DEFAULT_URL).rstrip("/").removesuffix(OPENAI_SUFFIX).rstrip("/")
    key = api_key or os.environ.get(KEY_VARIABLE)
    headers = {"User-Agent": USER_AGENT}
    if key is not None:
        if not (key.isascii() and key.isprintable()) or " " in key:
            raise WrongUse("The API key is not one: accepted are printable ASCII characters without spaces.")
        headers["Authorization"] = f"Bearer {key}"
    timeout = httpx.Timeout(timeout_s, connect=CONNECT_S)
    return Connection(f"{address}/", headers, _proxy(_checked(address)), timeout)


def _checked(address: str) -> httpx.URL:
    """The parsed address of a service; an address that httpx would accept but that makes no sense is refused."""
    try:
        parsed = httpx.URL(address)
    except httpx.InvalidURL as error:
        raise WrongUse(f"{address} is not an address: {str(error).rstrip('.')}.") from None
    except UnicodeEncodeError:
        raise WrongUse(f"{address!a} is not an address: it contains bytes that are not UTF-8 text.") from None
    if parsed.scheme not in ("http", "https") or not parsed.host:
        raise WrongUse(f"{address} is not an address: it must begin with http:// or https:// and name a host.")
    if not (_is_ip(parsed.host) or HOST_NAME.fullmatch(parsed.raw_host)):
        raise WrongUse(f"{address} is not an address: {parsed.host!r} is not a host name.")
    if parsed.port is not None and not 0 < parsed.port <= LARGEST_PORT:
        raise WrongUse(f"{address} is not an address: ports are 1 to {LARGEST_PORT}.")
    if parsed.query or parsed.fragment:
        raise WrongUse(f"{address} is not the address of a service: leave out the query and the fragment.")
    return parsed


def _proxy(address: httpx.URL) -> str | None:
    """The environment's proxy for a host. NO_PROXY is read by the standard library, since httpx's own parser refuses
    entries such as ``[::1]``."""
    names = (address.host, address.netloc.decode("ascii"))
    if _is_here(address.host) or any(proxy_bypass(name) for name in names):
        return None
    proxies = getproxies()
    proxy = proxies.get(address.scheme) or proxies.get("all")
    return proxy if not proxy or "://" in proxy else f"http://{proxy}"


def _certificates(base_url: str) -> ssl.SSLContext | bool:
    """The certificates for an https service; plain http needs none, so a broken variable does not matter there."""
    if not base_url.startswith("https"):
        return False
    try:
        return httpx.create_ssl_context()
    except OSError as error:  # ssl.SSLError is one, too
        named = [name for name in ("SSL_CERT_FILE", "SSL_CERT_DIR") if os.environ.get(name)]
        where = f"{named[0]} ({os.environ[named[0]]})" if named else "The certificates of certifi"
        raise WrongUse(f"{where} cannot be read: {error.strerror or error}.") from None


def _is_ip(host: str) -> bool:
    try:
        ip_address(host)
    except ValueError:
        return False
    return True


def _is_here(host: str) -> bool:
    return ip_address(host).is_loopback if _is_ip(host) else host == "localhost"


def _shown(proxy: str | None) -> str:
    """A proxy's address without the name and password that it may hold."""
    return re.sub(r"//[^/@]*@", "//", proxy or "")

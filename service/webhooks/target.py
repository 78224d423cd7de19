"""Where webhooks may go: a client chooses the URL, so it must not lead into the operator's own network.

The name is resolved once for each delivery, all its addresses must be allowed, and the connection goes to the address
that was checked, so a DNS answer that changes in between has no effect.
"""

from __future__ import annotations

import asyncio
import ipaddress
import socket
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from urllib.parse import SplitResult, urlsplit

from service.settings import Network, Settings

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Resolve = Callable[[str, int], Awaitable[list[str]]]

MAX_URL_CHARS = 2048
RESOLVE_S = 3.0
UNICAST = ipaddress.ip_network("2000::/3")  # what the world routes; Python counts old site-local addresses in
# These carry an IPv4 address inside, which another machine unpacks: NAT64, 6to4, Teredo.
CARRIERS = [ipaddress.ip_network(text) for text in ("64:ff9b::/96", "64:ff9b:1::/48", "2002::/16", "2001::/32")]


class TargetRefused(ValueError):
    """An address to which no webhook goes; the message says why."""


@dataclass(frozen=True)
class Rules:
    """``networks`` are allowed beside public addresses; ``http`` allows addresses without TLS."""

    networks: Sequence[Network] = ()
    http: bool = False


def rules_of(settings: Settings) -> Rules:
    """Where webhooks may go here."""
    return Rules(settings.webhook_networks, settings.webhook_http)


@dataclass(frozen=True)
class Target:
    """A checked address: connect to ``address``, speak to ``host``."""

    url: SplitResult
    host: str
    port: int
    address: str

    @property
    def pinned_url(self) -> str:
        """The URL with the checked address in place of the name."""
        address = f"[{self.address}]" if ":" in self.address else self.address
        return self.url._replace(netloc=f"{address}:{self.port}", fragment="").geturl()


def check_url(url: str, rules: Rules) -> SplitResult:
    """What can be said of a URL without asking anybody.

    Raises:
        TargetRefused: it is no URL, not https, or names an address that is not allowed.
    """
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        raise TargetRefused("it is not a URL") from None
    if len(url) > MAX_URL_CHARS or any(ord(char) <= 32 or ord(char) >= 127 for char in url):
        raise TargetRefused("it is too long or has unescaped characters")
    if parts.scheme != "https" and not (rules.http and parts.scheme == "http"):
        raise TargetRefused("it must begin with https://")
    if not parts.hostname or port == 0:
        raise TargetRefused("it has no host")
    if parts.username is not None or parts.password is not None:
        raise TargetRefused("it must not contain a user name or password")
    try:
        literal = ipaddress.ip_address(parts.hostname)
    except ValueError:
        return parts
    _check_address(literal, rules)
    return parts


async def find_target(url: str, rules: Rules, resolve: Resolve | None = None) -> Target:
    """Check a URL and every address of its host; the first is the one to connect to.

    Raises:
        TargetRefused: see ``check_url``; or one of its addresses is not allowed.
        OSError: the name cannot be resolved (now).
    """
    parts = check_url(url, rules)
    host, port = str(parts.hostname), parts.port or (443 if parts.scheme == "https" else 80)
    found = await (resolve or _resolve)(host, port)
    if not found:
        raise OSError(f"{host} has no address")
    for address in found:
        _check_address(ipaddress.ip_address(address.partition("%")[0]), rules)
    return Target(parts, host, port, found[0])


def _check_address(address: Address, rules: Rules) -> None:
    plain = address.ipv4_mapped or address if isinstance(address, ipaddress.IPv6Address) else address
    if any(plain in network for network in rules.networks if network.version == plain.version):
        return
    carried = any(plain in network for network in CARRIERS if network.version == plain.version)
    odd = plain.version == 6 and plain not in UNICAST
    if carried or odd or not plain.is_global or plain.is_multicast or plain.is_reserved:
        raise TargetRefused("it leads to an address that is not public")


async def _resolve(host: str, port: int) -> list[str]:
    try:
        found = await asyncio.wait_for(
            asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM), RESOLVE_S
        )
    except (TimeoutError, UnicodeError) as error:
        raise OSError(f"{host} cannot be resolved") from error
    return [str(address[0]) for *_, address in found]

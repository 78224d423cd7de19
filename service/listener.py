"""The listening socket."""

from __future__ import annotations

import socket
from typing import Any

from service.errors import StartupError

BACKLOG = 2048


def resolve(host: str, port: int) -> Any:
    """(family, kind, protocol, name, address) of the address to listen on.

    Raises:
        StartupError: there is no such host.
    """
    try:
        return socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except OSError as error:
        raise _refusal(host, port, error) from error


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens on this address; port 0 takes a free one.

    Raises:
        StartupError: the address is in use, not permitted, or not on this machine.
    """
    try:
        family, kind, protocol, _, address = resolve(host, port)
        listener = socket.socket(family, kind, protocol)
        try:
            # Lets a new service take the port of one that has just ended, never that of a running one.
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
            listener.listen(BACKLOG)
        except OSError:
            listener.close()
            raise
    except OSError as error:
        raise _refusal(host, port, error) from error
    return listener


def _refusal(host: str, port: int, error: OSError) -> StartupError:
    reason = (error.strerror or str(error)).lower()
    return StartupError(
        f"Cannot listen on {host}:{port} ({reason}); FEWSTEP_HOST and FEWSTEP_PORT choose another address."
    )

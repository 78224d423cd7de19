"""The listening socket."""

from __future__ import annotations

import socket

from service.errors import StartupError

BACKLOG = 2048


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens on this address; port 0 takes a free one.

    Raises:
        StartupError: the address is taken, or not allowed, or not this machine's.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
        try:
            # Lets a new service take the port of one that has just ended; never that of one that runs.
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
            listener.listen(BACKLOG)
        except OSError:
            listener.close()
            raise
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise StartupError(
            f"Cannot listen on {host}:{port} ({reason}); FEWSTEP_HOST and FEWSTEP_PORT choose another address."
        ) from error
    return listener

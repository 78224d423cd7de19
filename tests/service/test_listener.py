"""The socket that a service listens on: taken again at once, and never from somebody who has it."""

from __future__ import annotations

import socket

import pytest

from service.errors import StartupError
from service.listener import listen, resolve


def test_the_port_of_a_service_that_has_just_ended_is_taken_again() -> None:
    """Its last connection, which it has closed itself, keeps the port for a minute."""
    with listen("127.0.0.1", 0) as first:
        port = first.getsockname()[1]
        with socket.create_connection(("127.0.0.1", port)) as client:
            accepted, _ = first.accept()
            accepted.close()
            assert client.recv(1) == b""
    with listen("127.0.0.1", port) as second:
        assert second.getsockname() == ("127.0.0.1", port)


def test_a_port_that_somebody_has_is_refused_with_the_settings_that_choose_another() -> None:
    with listen("127.0.0.1", 0) as first:
        port = first.getsockname()[1]
        with pytest.raises(StartupError, match=rf"Cannot listen on 127.0.0.1:{port} \(.*FEWSTEP_HOST and FEWSTEP_PORT"):
            listen("127.0.0.1", port)


def test_a_host_that_does_not_exist_is_refused() -> None:
    with pytest.raises(StartupError, match="Cannot listen on nowhere.invalid:80"):
        resolve("nowhere.invalid", 80)
    assert resolve("127.0.0.1", 80)[4] == ("127.0.0.1", 80)

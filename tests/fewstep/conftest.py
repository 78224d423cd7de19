"""A service to talk to, and the client's variables out of the way."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from fewstep.client import Client
from fewstep.connection import KEY_VARIABLE, URL_VARIABLE
from tests.service.conftest import live as live
from tests.service.conftest import make_api as make_api
from tests.service.support import Service


@pytest.fixture(autouse=True)
def no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (URL_VARIABLE, KEY_VARIABLE):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def client(live: Service) -> Iterator[Client]:
    with Client(live.url) as client:
        yield client

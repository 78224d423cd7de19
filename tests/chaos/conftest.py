"""Rows that take long run with ``--chaos`` (``make chaos``), which makes the others larger and writes the table."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator

import pytest

from tests.chaos.clients import Clients, executed_twice
from tests.chaos.fleet import Fleet
from tests.chaos.table import Row, write

QUICK_JOBS, CHAOS_JOBS = 12, 100
ROWS: list[Row] = []


def jobs_of(config: pytest.Config) -> int:
    """How many jobs a row sends."""
    return int(os.environ.get("CHAOS_JOBS", CHAOS_JOBS)) if config.getoption("--chaos") else QUICK_JOBS


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    skip = pytest.mark.skip(reason="takes long: make chaos")
    for item in items:
        if "slow" in item.keywords and not config.getoption("--chaos"):
            item.add_marker(skip)


def pytest_sessionfinish(session: pytest.Session) -> None:
    if ROWS and session.config.getoption("--chaos"):
        jobs, seed = jobs_of(session.config), session.config.getoption("--chaos-seed")
        about = (
            f"Measured by `make chaos` (seed {seed}, {jobs} jobs a row, {platform.machine()}, {os.cpu_count()} cores)."
        )
        write(ROWS, about)


@pytest.fixture(scope="session")
def seed(request: pytest.FixtureRequest) -> int:
    return int(request.config.getoption("--chaos-seed"))


@pytest.fixture(scope="session")
def jobs(request: pytest.FixtureRequest) -> int:
    return jobs_of(request.config)


@pytest.fixture(scope="session")
def _fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    fleet = Fleet(tmp_path_factory.mktemp("fleet") / "f")
    yield fleet
    fleet.close()


@pytest.fixture
def fleet(_fleet: Fleet) -> Iterator[Fleet]:
    """The fleet, well and at rest, before and after each row."""
    _fleet.wait_until_ready()
    yield _fleet
    _fleet.wait_until_ready()


@pytest.fixture
def clients(fleet: Fleet, seed: int) -> Iterator[Clients]:
    with Clients([member.url for member in fleet.apis], seed) as clients:
        yield clients


class Ledger:
    """Checks a row's account and keeps it for the table."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet

    def close(self, number: int, fault: str, clients: Clients, seen: str = "") -> None:
        account = clients.settle()
        twice = executed_twice(self._fleet, account)
        refused = sum(account.refused.values())
        row = Row(number, fault, account.sent, account.answered, refused, twice, account.lost, account.wrong, seen)
        ROWS.append(row)
        assert row.lost == row.wrong == 0, row


@pytest.fixture
def ledger(fleet: Fleet) -> Ledger:
    return Ledger(fleet)

"""What an HTTP process is made of: each setting arrives where it acts, and each duty is done at its time."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from fastapi.middleware.cors import CORSMiddleware
from redis.exceptions import ConnectionError as RedisConnectionError

from service.http import services as module
from service.http.access import Access
from service.http.app import build_app
from service.http.middleware import BodyLimit, RequestContext
from service.http.overload import OverloadGuard, OverloadMiddleware
from service.http.services import Services, ending, open_services
from service.http.submission import rate_headers
from service.http.wire import WireCheck
from service.models.controller import SingleModel
from service.observe.background import Background
from service.observe.metrics import Metrics
from service.observe.tracer import Tracing
from service.settings import Settings

Duties = dict[str, tuple[Any, float, bool]]


@pytest.fixture
def duties(monkeypatch: pytest.MonkeyPatch) -> Duties:
    """What is done in the background, when, and whether the process is not ready without it; it is done once."""
    found: Duties = {}

    async def once(
        self: Background, name: str, action: Any, every_s: float = 0.0, *, vital: bool = False
    ) -> None:  # fmt: skip
        found[name] = (action, every_s, vital)

    monkeypatch.setattr(Background, "forever", once)
    return found


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, tuple[tuple[Any, ...], dict[str, Any]]]]:
    """With what each part was made."""
    found: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {}
    for name in ("Producer", "Replies", "Streams", "Links", "FeedbackLog", "open_store"):
        part = getattr(module, name)

        def make(*arguments: Any, name: str = name, part: Any = part, **options: Any) -> Any:
            found[name] = (arguments, options)
            return part(*arguments, **options)

        monkeypatch.setattr(module, name, make)
    yield found


async def open_them(settings: Settings) -> Services:
    metrics = Metrics("m", "1", {})
    async with open_services(settings, metrics, SingleModel(settings), Tracing(), OverloadGuard()) as services:
        await asyncio.sleep(0)  # the duties have begun
        return services


def test_each_setting_of_the_queue_arrives_there(
    redis_url: str, tmp_path: Path, runner: asyncio.Runner, made: dict[str, tuple[tuple[Any, ...], dict[str, Any]]]
) -> None:
    settings = Settings(
        runtime="fake", redis_url=redis_url, data_dir=tmp_path, result_ttl_s=7.0, max_pending=11, max_attempts=13,
        priority_images=17, quota=0.019, replicas=0, max_streams=23, feedback_percentile=29.0, feedback_max=310,
        feedback_days=37.0,
    )  # fmt: skip
    runner.run(open_them(settings))
    (client, queue, api), limits = made["Producer"]
    assert limits == {
        "ttl_s": 7.0, "max_pending": 11, "max_attempts": 13, "priority_images": 17, "quota": 19, "managed": False,
        "replicas": 0,
    }  # fmt: skip
    assert queue == "fake" and len(api) == 32
    assert made["Streams"][0][1:] == (23,) and made["Links"][0][1:] == (7.0,)
    policy = made["FeedbackLog"][0][2]
    assert (policy.percentile, policy.most, policy.most_per_key, policy.kept_ms) == (29.0, 310, 31, 37 * 86_400_000)
    assert made["open_store"][0] == (settings,)


def test_each_duty_is_done_at_its_time_and_the_process_is_not_ready_without_the_vital_ones(
    redis_url: str, tmp_path: Path, runner: asyncio.Runner, duties: Duties
) -> None:
    settings = Settings(runtime="fake", redis_url=redis_url, data_dir=tmp_path, sweep_s=41.0)
    services = runner.run(open_them(settings))
    assert {name: (every_s, vital) for name, (_, every_s, vital) in duties.items()} == {
        "replies": (0.0, True), "models": (0.0, True), "reaper": (1.0, True), "streams": (10.0, False),
        "sweeper": (41.0, False),
    }  # fmt: skip
    assert duties["replies"][0] == services.replies.read and duties["models"][0] == services.models.poll
    assert duties["streams"][0] == services.streams.renew
    duties.clear()
    runner.run(open_them(settings.model_copy(update={"sweep_s": 0.0})))
    assert "sweeper" not in duties, "0 turns it off"


def test_one_process_sweeps_and_with_the_settings_bounds(
    redis_url: str, tmp_path: Path, runner: asyncio.Runner, duties: Duties, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[Any, ...]] = []
    turns = iter([True, False])

    async def take_turn(*arguments: Any) -> bool:
        asked.append(arguments[1:])
        return next(turns)

    swept: list[tuple[float, int]] = []
    store = SimpleNamespace(sweep=lambda *bounds: swept.append(bounds))
    monkeypatch.setattr(module, "open_store", lambda _: store)
    monkeypatch.setattr(module.Producer, "take_turn", take_turn)
    settings = Settings(
        runtime="fake", redis_url=redis_url, data_dir=tmp_path, sweep_s=40.0, result_ttl_s=7.0, results_quota_mb=3
    )
    runner.run(open_them(settings))
    for _ in range(2):
        runner.run(duties["sweeper"][0]())
    assert asked == [("sweep", 20.0)] * 2 and swept == [(7.0, 3 * 2**20)]


def test_failures_of_duties_are_counted_in_the_queue_once_each_and_later_where_it_was_away(
    redis_url: str, tmp_path: Path, runner: asyncio.Runner, duties: Duties, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[Any] = []
    away = True

    async def reap(_: object) -> None:
        done.append("reap")

    async def count(_: object, failures: dict[str, int]) -> None:
        if away:
            raise ConnectionError
        done.append(failures)

    monkeypatch.setattr(module.Producer, "reap", reap)
    monkeypatch.setattr(module.Producer, "count_failures", count)
    services = runner.run(open_them(Settings(runtime="fake", redis_url=redis_url, data_dir=tmp_path)))
    once, duty = duties["reaper"][0], services.background.duty("models")
    runner.run(once())
    for _ in range(2):
        duty.failed(ConnectionError("away"))
    with pytest.raises(ConnectionError):
        runner.run(once())
    away = False
    for _ in range(2):
        runner.run(once())
    duty.failed(ConnectionError("away"))
    runner.run(once())
    assert done == ["reap", "reap", "reap", {"models": 2}, "reap", "reap", {"models": 1}]


def test_the_end_comes_when_requests_were_still_accepted_and_then_could_end(
    redis_url: str, tmp_path: Path, runner: asyncio.Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    slept: list[float] = []

    async def sleep(seconds: float) -> None:
        slept.append(seconds)

    async def stopped() -> None:
        settings = Settings(runtime="fake", redis_url=redis_url, data_dir=tmp_path, drain_s=3.0, grace_s=4.0)
        services = SimpleNamespace(settings=settings, stopping=asyncio.Event())
        task = asyncio.create_task(ending(services))  # type: ignore[arg-type]
        await asyncio.wait([task], timeout=0.05)
        assert not task.done()
        monkeypatch.setattr(module.asyncio, "sleep", sleep)
        services.stopping.set()
        await task
        monkeypatch.undo()

    runner.run(stopped())
    assert slept == [7.0]


def test_checks_come_in_their_order_and_with_their_bounds(tmp_path: Path) -> None:
    """From the outside in: a request has an id before it can be refused, and a stranger is refused before anything of
    it is read."""
    settings = Settings(runtime="fake", data_dir=tmp_path, body_timeout_s=43.0, cors=("https://a.example",))
    app = build_app(settings)
    assert [each.cls for each in app.user_middleware] == [
        RequestContext, CORSMiddleware, Access, WireCheck, OverloadMiddleware, BodyLimit,
    ]  # fmt: skip
    options = {each.cls: each.kwargs for each in app.user_middleware}
    assert options[BodyLimit] == {"max_bytes": 262_144}  # type: ignore[index]
    assert options[WireCheck] == {"body_timeout_s": 43.0}  # type: ignore[index]
    cors = options[CORSMiddleware]  # type: ignore[index]
    assert (cors["allow_origins"], cors["allow_methods"], cors["allow_headers"]) == (
        ("https://a.example",), ["GET", "POST"], ["*"],
    )  # fmt: skip
    assert set(cors["expose_headers"]) == {  # type: ignore[call-overload]
        "Location", "Preference-Applied", "Retry-After", "X-Request-ID", "X-Seed", "X-Model-Version", "X-Reward-Score",
        "X-RateLimit-Limit", "X-RateLimit-Remaining", "X-RateLimit-Reset", "x-should-retry",
    }  # fmt: skip
    without = build_app(Settings(runtime="fake", data_dir=tmp_path))
    assert CORSMiddleware not in [each.cls for each in without.user_middleware]


@pytest.mark.parametrize(
    ("quota", "left", "remaining", "reset"),
    [(60, 60, 60, 0), (60, 59, 59, 1), (60, 0, 0, 60), (90, 1, 1, 60), (60, -30, 0, 90), (7, 3, 3, 35)],
)
def test_a_quota_is_full_again_when_what_is_missing_has_come_back(
    quota: int, left: int, remaining: int, reset: int
) -> None:
    """It refills completely in a minute; a debt comes back first."""
    assert rate_headers(quota, left) == {
        "X-RateLimit-Limit": str(quota), "X-RateLimit-Remaining": str(remaining), "X-RateLimit-Reset": str(reset),
        "RateLimit-Policy": f'"kilopixel-steps";q={quota};w=60',
        "RateLimit": f'"kilopixel-steps";r={remaining};t={reset}',
    }  # fmt: skip


def test_without_a_quota_nothing_is_said_of_one() -> None:
    assert rate_headers(0, 0) == rate_headers(-1, 5) == {} and rate_headers(1, 1) != {}


def test_whoever_waits_and_what_comes_later_is_measured(
    redis_url: str, tmp_path: Path, runner: asyncio.Runner, made: dict[str, tuple[tuple[Any, ...], dict[str, Any]]]
) -> None:
    services = runner.run(open_them(Settings(runtime="fake", redis_url=redis_url, data_dir=tmp_path)))
    (_, producer, queue, api, *observers), options = made["Replies"]
    assert (producer, queue, api) == (services.producer, "fake", made["Producer"][0][2]) and options == {}
    assert observers == [services.metrics.record, services.metrics.scores]


@pytest.mark.parametrize("away", [None, RedisConnectionError("away"), OSError("away"), "for ever"])
def test_a_process_looks_once_at_what_is_served_before_it_takes_requests_and_not_for_long(
    away: Any, redis_url: str, tmp_path: Path, runner: asyncio.Runner, duties: Duties, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked: list[bool] = []

    async def refresh(_: SingleModel) -> None:
        looked.append(bool(duties))
        if isinstance(away, Exception):
            raise away
        if away:
            await asyncio.Event().wait()

    monkeypatch.setattr(SingleModel, "refresh", refresh)
    monkeypatch.setattr(module, "FIRST_LOOK_S", 0.01)
    runner.run(open_them(Settings(runtime="fake", redis_url=redis_url, data_dir=tmp_path)))
    assert looked == [False] and "models" in duties, "whatever the first look has found"


def test_what_was_traced_is_sent_before_the_process_ends(
    redis_url: str, tmp_path: Path, runner: asyncio.Runner
) -> None:
    class Kept(Tracing):
        closed = 0

        def close(self) -> None:
            self.closed += 1

    kept = Kept()
    app = build_app(Settings(runtime="fake", redis_url=redis_url, data_dir=tmp_path), kept)

    async def run() -> None:
        async with app.router.lifespan_context(app):
            assert kept.closed == 0

    runner.run(run())
    assert kept.closed == 1


@pytest.mark.parametrize(("quota", "thousandths"), [(0.0, 0), (1e-6, 1), (0.0004, 1), (2.5, 2500)])
def test_the_least_quota_is_one(
    quota: float, thousandths: int, redis_url: str, tmp_path: Path, runner: asyncio.Runner,
    made: dict[str, tuple[tuple[Any, ...], dict[str, Any]]],
) -> None:  # fmt: skip
    """Rounded to nothing it would be none."""
    runner.run(open_them(Settings(runtime="fake", redis_url=redis_url, data_dir=tmp_path, quota=quota)))
    assert made["Producer"][1]["quota"] == thousandths


def test_both_connections_to_the_queue_are_closed_at_the_end(
    redis_url: str, tmp_path: Path, runner: asyncio.Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    connect, closed = module.connect_async, list[float]()

    def noted(url: str, *, block_s: float = 0.0) -> Any:
        client = connect(url, block_s=block_s)
        close = client.aclose

        async def aclose() -> None:
            closed.append(block_s)
            await close()

        monkeypatch.setattr(client, "aclose", aclose)
        return client

    monkeypatch.setattr(module, "connect_async", noted)
    runner.run(open_them(Settings(runtime="fake", redis_url=redis_url, data_dir=tmp_path)))
    assert sorted(closed) == [0.0, 2.0]

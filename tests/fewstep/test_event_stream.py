"""Server-sent events: the format, and streams that break."""

from __future__ import annotations

import pytest

from fewstep.answers import Event
from fewstep.client import Client
from fewstep.errors import JobFailed, NotFound, Unreachable
from fewstep.events import Parser
from fewstep.retries import Retries
from tests.fewstep.proxy import breaking
from tests.service.support import Service, expected_pixels, pixels

SLOW = "fake:step=0.05"
EAGER = Retries(tries=4, first_pause_s=0.01)


def parse(text: str) -> list[Event]:
    parser = Parser()
    return [event for line in text.splitlines() if (event := parser.line(line)) is not None]


def test_the_format_is_read_as_the_standard_has_it() -> None:
    events = parse(
        ': comment\n\nid: 3\nevent: queued\ndata: {"a":\ndata: 1}\n\n'
        'data:{"b": 2}\nretry: 5\nunknown: x\n\nevent: nothing\n\nid: x\ndata: [1]\n\n'
        'data: a proxy says that it is busy\n\ndata: {"cut": "off"}\n'
    )
    assert [(event.name, event.number, event.data) for event in events] == [
        ("queued", 3, {"a": 1}),
        ("message", None, {"b": 2}),
        ("message", None, {}),
        ("message", None, {}),
    ]


def numbered(events: list[Event]) -> list[tuple[int, str]]:
    return [(event.number, event.name) for event in events if event.number is not None]


def test_a_stream_shows_a_job_from_its_place_to_its_pictures(client: Client) -> None:
    events = list(client.stream(SLOW, seed=[3, 5], num_inference_steps=4, partial_images=2))
    names = [event.name for event in events if event.number is not None]
    looks = ["image_generation.partial_image"] * 4
    assert names == ["queued", "started", *looks, *["image_generation.completed"] * 2, "done"]
    for event, seed in zip((e for e in events if e.name.endswith("completed")), (3, 5), strict=True):
        assert event.picture is not None
        assert (pixels(event.picture) == expected_pixels(SLOW, seed)).all()


@pytest.mark.parametrize("cut", [0, 150, 700, 3000])
def test_a_stream_that_breaks_misses_nothing_and_tells_nothing_twice(client: Client, live: Service, cut: int) -> None:
    job = client.submit(SLOW, seed=9, num_inference_steps=4, partial_images=3)
    with breaking(live.url, cut, cut) as proxy, Client(proxy.url, retries=EAGER) as broken:
        through = list(broken.events(job.id))
        assert proxy.connections == 3
    whole = list(client.events(job.id))
    assert numbered(through) == numbered(whole)
    assert numbered(whole)[-1][1] == "done"


def test_a_stream_that_always_breaks_ends_in_a_sentence(client: Client, live: Service) -> None:
    job = client.submit("p", seed=9)
    client.wait(job.id)
    with breaking(live.url, *[0] * 9) as proxy, Client(proxy.url, retries=EAGER) as broken:
        with pytest.raises(Unreachable, match="event stream"):
            list(broken.events(job.id))
        assert proxy.connections == EAGER.tries


def test_events_after_one_that_was_seen(client: Client) -> None:
    job = client.submit("p", seed=9)
    whole = list(client.events(job.id))
    later = list(client.events(job.id, after=1))
    assert [event.name for event in later if event.number is not None] == ["image_generation.completed", "done"]
    assert list(client.events(job.id, after=whole[-1].number)) == []


def test_a_job_without_a_picture_ends_the_stream_with_its_reason(client: Client) -> None:
    with pytest.raises(JobFailed) as caught:
        list(client.stream("fake:raise"))
    assert caught.value.code == "generation_failed"


def test_events_of_a_job_that_never_was(client: Client) -> None:
    with pytest.raises(NotFound, match="There is no such job"):
        list(client.events("f" * 32))

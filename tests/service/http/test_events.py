"""A job's life as server-sent events: in order, each once, and nothing missed by whoever comes back."""

from __future__ import annotations

import base64
import json
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import httpx
import numpy as np
import pytest

from service.http.events import COMPLETED, END, PREVIEW, QUEUED, STARTED, events_of
from service.queue.job import Record
from service.queue.states import State
from student.runtimes.fake import fake_preview
from tests.service.http.test_http import check_error
from tests.service.http.test_jobs import ASYNC, LONG, post_with, status
from tests.service.support import (
    PATIENCE_S,
    Api,
    Service,
    call,
    eventually,
    expected_pixels,
    open_post,
    pixels,
)  # fmt: skip

NAMES = ["queued", "started", "image_generation.partial_image", "image_generation.completed", "done"]


@dataclass(frozen=True)
class Seen:
    number: int | None
    name: str
    data: dict[str, Any]


def read(lines: Iterator[str]) -> Iterator[Seen]:
    """Events as a browser would read them; comments are skipped."""
    fields: dict[str, str] = {}
    for line in lines:
        if line.startswith(":"):
            continue
        if line:
            name, _, value = line.partition(": ")
            fields[name] = value
        elif fields:
            data = json.loads(fields["data"])
            assert data["type"] == fields["event"]
            yield Seen(int(fields["id"]) if "id" in fields else None, fields["event"], data)
            fields = {}


def listen(method: str, url: str, **options: Any) -> list[Seen]:
    """All events of a stream, to its end."""
    with httpx.stream(method, url, timeout=PATIENCE_S, trust_env=False, **options) as response:
        assert response.status_code == 200 and response.headers["Content-Type"].startswith("text/event-stream")
        return list(read(response.iter_lines()))


def numbered(events: list[Seen]) -> list[int]:
    return [event.number for event in events if event.number is not None]


def check_preview(event: Seen, prompt: str, seed: int, steps: int, step: int) -> None:
    expected = np.rint(fake_preview(prompt, seed, steps, step) * 255).astype(np.uint8).transpose(1, 2, 0)
    assert np.array_equal(pixels(base64.b64decode(event.data["b64_json"])), expected)


def record(state: State, **changes: Any) -> Record:
    return Record("id", state, **{"result": {}, "created_s": 1.0, **changes})


def test_every_event_has_a_number_and_numbers_follow_time() -> None:
    image = {"seed": 1, "width": 1, "height": 1, "sha256": "", "reward": {}, "file": "f"}
    previews = {"1:0": "c", "0:1": "b", "0:0": "a"}
    full = record(State.DONE, result={"images": [image] * 2}, claimed_s=2.0, previews=previews)
    events = events_of(full)
    expected = [QUEUED, STARTED, PREVIEW, PREVIEW + 1, 2 * PREVIEW, COMPLETED, COMPLETED + 1, END]
    assert [event.number for event in events] == expected == sorted(expected)
    assert [event.file for event in events] == [None, None, "a", "b", "c", "f", "f", None]
    assert [event.name for event in events_of(record(State.QUEUED))] == ["queued"]
    assert [event.name for event in events_of(record(State.RUNNING, claimed_s=2.0))] == ["queued", "started"]
    assert [event.name for event in events_of(record(State.CANCELLED))] == ["queued", "error"]


def test_a_stream_tells_a_whole_life(live: Service) -> None:
    body = {"prompt": "streamed", "seed": [3, 9], "stream": True, "partial_images": 2}
    events = listen("POST", f"{live.url}/generate", json=body)
    names = [event.name for event in events if event.number is not None]
    assert names == [NAMES[0], NAMES[1], *[NAMES[2]] * 4, *[NAMES[3]] * 2, NAMES[4]]
    assert events[0].data["position"] in (0, None)
    previews = [event for event in events if event.name == NAMES[2]]
    assert [(e.data["partial_image_index"], e.data["index"]) for e in previews] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    for event in previews:
        seed, step = [3, 9][event.data["index"]], [0, 2][event.data["partial_image_index"]]
        check_preview(event, "streamed", seed, 4, step)
        assert (event.data["size"], event.data["output_format"]) == ("64x64", "png")
    for event, seed in zip((event for event in events if event.name == NAMES[3]), (3, 9), strict=True):
        assert event.data["seed"] == seed
        image = pixels(base64.b64decode(event.data["b64_json"]))
        assert np.array_equal(image, expected_pixels("streamed", seed))
    assert events[-1].data["job"]["status"] == "done" and len(events[-1].data["job"]["data"]) == 2


def test_a_job_that_has_ended_tells_its_life_again_from_wherever_one_was(live: Service) -> None:
    response = post_with(live.url, ASYNC, prompt="again", seed=1, partial_images=3, response_format="url")
    url = f"{live.url}/jobs/{response.json()['id']}/events"
    whole = listen("GET", url)
    assert numbered(whole) == [QUEUED, STARTED, PREVIEW, 2 * PREVIEW, 3 * PREVIEW, COMPLETED, END]
    assert "/images/0?" in whole[-2].data["url"] and "b64_json" not in whole[-2].data
    for seen in numbered(whole)[:-1]:
        rest = listen("GET", url, headers={"Last-Event-ID": str(seen)})
        assert numbered(rest) == [number for number in numbered(whole) if number > seen]
    assert call("GET", url, headers={"Last-Event-ID": str(END)}).status_code == 204
    for wrong in ("x", "-1", "1.5"):
        check_error(call("GET", url, headers={"Last-Event-ID": wrong}), 422, "invalid_request", "Last-Event-ID")


def test_whoever_comes_back_in_the_middle_misses_nothing(live: Service) -> None:
    """Each event is read on a connection of its own, which is broken after it."""
    response = post_with(live.url, ASYNC, prompt="fake:step=0.3 broken", seed=1, partial_images=3)
    url = f"{live.url}/jobs/{response.json()['id']}/events"
    seen: list[int] = []
    while not seen or seen[-1] != END:
        headers = {"Last-Event-ID": str(seen[-1])} if seen else {}
        with httpx.stream("GET", url, headers=headers, timeout=PATIENCE_S, trust_env=False) as stream:
            seen.append(next(e.number for e in read(stream.iter_lines()) if e.number is not None))
    assert seen == [QUEUED, STARTED, PREVIEW, 2 * PREVIEW, 3 * PREVIEW, COMPLETED, END]


def test_a_place_in_the_queue_is_told_whenever_it_changes(make_api: Callable[..., Api]) -> None:
    api = make_api(**LONG)
    first, second, third = (post_with(api.url, ASYNC, prompt="p").json()["id"] for _ in range(3))
    with httpx.stream("GET", f"{api.url}/jobs/{third}/events", timeout=PATIENCE_S, trust_env=False) as stream:
        events = read(stream.iter_lines())
        assert (next(events).data["position"]) == 2
        call("POST", f"{api.url}/jobs/{first}/cancel")
        after = next(events)
        assert (after.name, after.data["position"], after.number) == ("queued", 1, None)
        call("POST", f"{api.url}/jobs/{second}/cancel")
        assert next(events).data["position"] == 0
        call("POST", f"{api.url}/jobs/{third}/cancel")
        last = next(events)
    assert (last.name, last.number, last.data["error"]["code"]) == ("error", END, "cancelled")
    assert last.data["job"]["status"] == "cancelled"


def test_a_silent_stream_says_that_it_is_alive(make_api: Callable[..., Api]) -> None:
    api = make_api(EVENT_HEARTBEAT_S="0.1", **LONG)
    id = post_with(api.url, ASYNC, prompt="p").json()["id"]
    with httpx.stream("GET", f"{api.url}/jobs/{id}/events", timeout=PATIENCE_S, trust_env=False) as stream:
        comments = (line for line in stream.iter_lines() if line.startswith(":"))
        assert [next(comments) for _ in range(2)] == [": keep-alive"] * 2


def test_a_failure_is_told_as_an_error(live: Service) -> None:
    events = listen("POST", f"{live.url}/generate", json={"prompt": "fake:raise", "stream": True})
    assert [event.name for event in events if event.number is not None] == ["queued", "started", "error"]
    assert events[-1].data["error"]["code"] == "generation_failed"


def test_a_request_that_is_refused_is_no_stream(live: Service) -> None:
    response = call("POST", f"{live.url}/generate", json={"prompt": "", "stream": True})
    check_error(response, 422, "invalid_request", "prompt")


def receive_until(connection: socket.socket, words: bytes) -> bytes:
    data = b""
    while words not in data:
        part = connection.recv(65536)
        assert part, data
        data += part
    return data


def test_a_stream_that_is_broken_takes_its_job_with_it(make_api: Callable[..., Api]) -> None:
    api = make_api(**LONG)
    connection = open_post(api.url, prompt="p", stream=True)
    receive_until(connection, b"event: queued")
    connection.close()
    eventually(lambda: api.states() == ["cancelled"])


def test_a_running_job_ends_with_its_broken_stream(live: Service) -> None:
    connection = open_post(live.url, prompt="fake:step=2 broken stream", stream=True)
    data = receive_until(connection, b"event: started")
    id = json.loads(data.partition(b"data: ")[2].partition(b"\n")[0])["id"]
    connection.close()
    eventually(lambda: status(live.url, id)["status"] == "cancelled", "it is dropped between two steps")


def test_a_watcher_may_go_without_harm(make_api: Callable[..., Api]) -> None:
    api = make_api(**LONG)
    id = post_with(api.url, ASYNC, prompt="p").json()["id"]
    with httpx.stream("GET", f"{api.url}/jobs/{id}/events", timeout=PATIENCE_S, trust_env=False) as stream:
        next(read(stream.iter_lines()))
    with open_post(api.url, prompt="p"):
        eventually(lambda: api.waiting() == 2)
    eventually(lambda: sorted(api.states()) == ["cancelled", "queued"])
    assert api.hash_of(id)["state"] == "queued"


@pytest.mark.parametrize("watching", [True, False])
def test_a_stream_at_another_process_hears_of_everything(make_api: Callable[..., Api], watching: bool) -> None:
    first, second = make_api(**LONG), make_api(**LONG)
    id = post_with(first.url, ASYNC, prompt="p").json()["id"]
    with httpx.stream("GET", f"{second.url}/jobs/{id}/events", timeout=PATIENCE_S, trust_env=False) as stream:
        events = read(stream.iter_lines())
        assert next(events).name == "queued"
        if not watching:  # a notice that is lost costs a moment and nothing else
            first.redis.hdel(f"{first.prefix}j:{id}", "watchers")
        call("POST", f"{first.url}/jobs/{id}/cancel")
        assert next(event for event in events if event.number is not None).name == "error"

"""The Python client against a real service."""

from __future__ import annotations

import asyncio
import hashlib
import uuid
from collections.abc import Callable
from pathlib import Path

import pytest

import fewstep
from fewstep.answers import Answer, Job
from fewstep.client import Client
from fewstep.connection import connection
from fewstep.errors import Busy, NotFound, Refused, ServerError, TooLate, Unreachable, WrongUse
from fewstep.retries import Retries
from tests.fewstep.proxy import breaking
from tests.service.support import Api, Service, expected_pixels, pixels

EAGER = Retries(tries=4, first_pause_s=0.01)
ONCE = Retries(tries=1)


def unique() -> str:
    """A prompt that no other test has."""
    return f"p{uuid.uuid4().hex}"


def test_the_package_offers_its_client() -> None:
    from fewstep.async_client import AsyncClient

    assert fewstep.Client is Client and fewstep.AsyncClient is AsyncClient
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        _ = fewstep.Nothing  # type: ignore[attr-defined]


def test_generate_draws_what_was_asked_for(client: Client, tmp_path: Path) -> None:
    answer = client.generate("a red heart", seed=[7, 9], num_inference_steps=2)
    assert [picture.seed for picture in answer.data] == [7, 9]
    for picture in answer.data:
        assert hashlib.sha256(picture.data).hexdigest() == picture.sha256
        assert (pixels(picture.data) == expected_pixels("a red heart", picture.seed, 2)).all()
        assert set(picture.reward) == {"trained", "heldout"}
    saved = answer.data[0].save(tmp_path / "heart.png")
    assert saved.read_bytes() == answer.data[0].data
    assert answer.timings.total_s > 0 and answer.model == "fake" and answer.batch_size == 2


def test_a_job_is_asked_for_later(client: Client) -> None:
    job = client.submit("a red heart", seed=7, metadata={"page": "12"})
    assert job.seeds == [7] and job.metadata == {"page": "12"}
    ended = client.wait(job.id, timeout_s=30)
    assert ended.status == "done" and ended.final and client.job(job.id).status == "done"
    assert (pixels(client.image(job.id)) == expected_pixels("a red heart", 7)).all()
    with pytest.raises(NotFound, match="The job has 1 images"):
        client.image(job.id, 1)
    assert ended.data[0].url is not None
    with pytest.raises(WrongUse, match="address"):
        _ = ended.data[0].data


def test_ones_own_jobs_are_listed_newest_first(client: Client) -> None:
    prompts = [unique() for _ in range(3)]
    ids = [client.submit(prompt).id for prompt in prompts]
    listed = client.jobs(limit=3)
    assert [job.id for job in listed] == ids[::-1] and [job.prompt for job in listed] == prompts[::-1]
    assert len(client.jobs(limit=1)) == 1
    assert len(client.jobs(limit=101)) >= 3
    with pytest.raises(Refused, match="limit"):
        client.jobs(limit=0)


def test_a_cancelled_job_stays_cancelled(make_api: Callable[..., Api]) -> None:
    api = make_api()
    with Client(api.url) as client:
        job = client.submit("a red heart")
        assert client.cancel(job.id).status == client.cancel(job.id).status == "cancelled"
        assert client.wait(job.id).error is not None
        with pytest.raises(TooLate, match="had not ended after 0.05 s"):
            client.wait(client.submit("a red heart").id, timeout_s=0.05)


def test_waiting_on_asyncio_ends_in_time_too(make_api: Callable[..., Api]) -> None:
    async def wait(url: str) -> None:
        async with fewstep.AsyncClient(url) as client:
            await client.wait((await client.submit("a red heart")).id, timeout_s=0.05)

    with pytest.raises(TooLate, match="had not ended after 0.05 s"):
        asyncio.run(asyncio.wait_for(wait(make_api().url), 20))


def test_an_answer_that_was_lost_is_fetched_and_not_drawn_again(client: Client, live: Service) -> None:
    prompt = unique()
    with breaking(live.url, 0) as proxy, Client(proxy.url, retries=EAGER) as broken:
        answer = broken.generate(prompt)
        assert proxy.connections == 2
    jobs = [job for job in client.jobs(limit=100) if job.prompt == prompt]
    assert [job.id for job in jobs] == [answer.id]


def test_without_the_key_it_would_be_drawn_twice(client: Client, live: Service) -> None:
    """What the test above rests on."""
    prompt = unique()
    first, second = (client.generate(prompt, idempotency_key=f"{prompt}{k}") for k in range(2))
    assert first.id != second.id
    assert client.generate(prompt, idempotency_key=f"{prompt}1").id == second.id


@pytest.mark.parametrize(
    ("prompt", "options", "kind", "message"),
    [
        ("p", {"num_inference_steps": 3}, Refused, "num_inference_steps is 3: fake was trained for 1, 2, 4."),
        ("p", {"model": "other"}, NotFound, "The model 'other' is not served: accepted is fake."),
        ("fake:raise", {}, ServerError, None),
    ],
)
def test_an_error_is_typed_and_one_sentence(
    client: Client, prompt: str, options: fewstep.request.Options, kind: type, message: str | None
) -> None:
    with pytest.raises(kind) as caught:
        client.generate(prompt, **options)
    text = str(caught.value)
    assert text.endswith(".") and "\n" not in text and (message is None or text == message)
    assert caught.value.request_id


def test_a_full_queue_is_busy(make_api: Callable[..., Api]) -> None:
    api = make_api(MAX_PENDING="1")
    with Client(api.url, retries=ONCE) as client:
        client.submit("p")
        with pytest.raises(Busy) as caught:
            client.submit("p")
        assert caught.value.code == "queue_full" and caught.value.retry_after_s


def test_nobody_there_is_one_sentence() -> None:
    with Client("http://127.0.0.1:9", retries=ONCE) as client, pytest.raises(Unreachable, match="cannot be reached"):
        client.job("a")


@pytest.mark.parametrize(
    "url",
    ["here", "ftp://host", "http://", "http://[::1", "http://a b", "http://host:99999", "http://host:0",
     "http://h\udce9", "http://a_b/\udce9", "http://host:port"],
)  # fmt: skip
def test_what_is_no_address_is_refused_at_once(url: str) -> None:
    with pytest.raises(WrongUse, match="is not an address"):
        Client(url)


def test_where_and_who_come_from_arguments_before_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEWSTEP_URL", "http://elsewhere:1/base/")
    monkeypatch.setenv("FEWSTEP_API_KEY", "fs_env")
    monkeypatch.setenv("http_proxy", "proxy:3128")
    found = connection(None, None, 1.0)
    assert found.base_url == "http://elsewhere:1/base/" and found.proxy == "http://proxy:3128"
    assert found.headers["Authorization"] == "Bearer fs_env"
    found = connection("http://localhost:2", "fs_mine", 1.0)
    assert found.base_url == "http://localhost:2/" and found.proxy is None
    assert found.headers["Authorization"] == "Bearer fs_mine"
    with pytest.raises(WrongUse) as caught:
        connection(None, "a secret", 1.0)
    assert "secret" not in str(caught.value)


def test_the_same_on_asyncio(live: Service) -> None:
    async def all_of_it() -> tuple[Answer, Job, list[str], bytes, Job]:
        async with fewstep.AsyncClient(live.url) as client:
            answers = await asyncio.gather(*(client.generate("a red heart", seed=k) for k in range(3)))
            job = await client.submit("a blue star", seed=4)
            names = [event.name async for event in client.events(job.id)]
            streamed = [event async for event in client.stream("fake:step=0.01", seed=5, partial_images=1)]
            assert streamed[-1].name == "done"
            ended = await client.wait(job.id)
            assert (await client.jobs(1))[0].prompt == "fake:step=0.01"
            cancelled = await client.cancel(job.id)
            return answers[2], ended, names, await client.image(job.id), cancelled

    answer, ended, names, data, cancelled = asyncio.run(all_of_it())
    assert (pixels(answer.data[0].data) == expected_pixels("a red heart", 2)).all()
    assert ended.status == cancelled.status == "done" and names[-1] == "done"
    assert (pixels(data) == expected_pixels("a blue star", 4)).all()


@pytest.mark.parametrize("cut", [0, 700])
def test_a_broken_stream_on_asyncio(live: Service, cut: int) -> None:
    async def through(url: str, id: str | None) -> tuple[str, list[int]]:
        async with fewstep.AsyncClient(url, retries=EAGER) as client:
            found = id or (await client.submit("fake:step=0.05", partial_images=2)).id
            return found, [event.number async for event in client.events(found) if event.number is not None]

    id, whole = asyncio.run(through(live.url, None))
    with breaking(live.url, cut, cut) as proxy:
        assert asyncio.run(through(proxy.url, id)) == (id, whole)
        assert proxy.connections == 3


def test_nobody_there_on_asyncio() -> None:
    async def ask() -> None:
        async with fewstep.AsyncClient("http://127.0.0.1:9", retries=EAGER) as client:
            await client.models()

    with pytest.raises(Unreachable):
        asyncio.run(ask())

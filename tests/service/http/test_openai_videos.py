"""The official ``openai`` package's videos against a whole service: nothing here but the refusals is made by hand."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from service.keys import KeyStore
from student.runtimes.fake import fake_video
from tests.service.support import PATIENCE_S, Service, call, running_service
from tests.service.video_files import as_bytes, decode_mp4, psnr

pytestmark = pytest.mark.filterwarnings("ignore:The Sora API is scheduled:DeprecationWarning")


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    with running_service(tmp_path_factory.mktemp("videos") / "data", RUNTIME="fake-video") as service:
        yield service


def client_of(service: Service, key: str = "none") -> openai.OpenAI:
    direct = httpx.Client(trust_env=False, timeout=PATIENCE_S)
    return openai.OpenAI(base_url=f"{service.url}/v1", api_key=key, max_retries=0, http_client=direct)


@pytest.fixture(scope="module")
def client(videos: Service) -> Iterator[openai.OpenAI]:
    with client_of(videos) as client:
        yield client


def test_a_video_is_created_polled_and_downloaded(client: openai.OpenAI) -> None:
    asked: Any = {"seconds": "2", "size": "64x64", "model": "fake-video"}  # the package only knows Sora's own
    video = client.videos.create(prompt="waves", extra_body={"seed": "7"}, **asked)
    assert video.id.startswith("video_") and video.status in ("queued", "in_progress")
    assert (video.object, video.prompt, video.size, video.model) == ("video", "waves", "64x64", "fake-video")
    done = client.videos.poll(video.id, poll_interval_ms=20)
    assert (done.status, done.progress, done.error) == ("completed", 100, None)
    assert done.completed_at is not None and done.expires_at is not None and done.seconds == "2.125"
    found = decode_mp4(client.videos.download_content(video.id).read())
    assert found.frames_FHWC.shape[0] == 17, "2 s of 8 frames each, and the first"
    assert psnr(found.frames_FHWC, as_bytes(fake_video("waves", 7, 4, 17))) > 25


def test_a_video_without_seconds_has_the_students_own_length(client: openai.OpenAI) -> None:
    done = client.videos.create_and_poll(prompt="waves", poll_interval_ms=20)
    assert (done.status, done.seconds) == ("completed", "1.125")


def test_a_video_that_cannot_be_drawn_has_failed_with_its_reason(client: openai.OpenAI) -> None:
    done = client.videos.create_and_poll(prompt="fake:raise", poll_interval_ms=20)
    assert done.status == "failed" and done.error is not None
    assert (done.error.code, done.error.message) == ("generation_failed", "The image could not be generated.")
    with pytest.raises(openai.NotFoundError):
        client.videos.download_content(done.id)


@pytest.mark.parametrize(
    ("fields", "status", "param", "message"),
    [
        ({"seconds": "12"}, 413, "seconds", "the longest video of 64x64 that fits into the memory here has 33 frames"),
        ({"seconds": "900"}, 400, "seconds", "that is 7201 frames, of 1024 at most"),
        ({"seconds": "soon"}, 400, "seconds", "should be a valid number"),
        ({"size": "720x1280"}, 400, "size", "generates 64x64 pixels and no other size"),
        ({"input_reference": ("a.png", b"123")}, 400, "input_reference", "a student generates from text alone"),
        ({"prompt": " "}, 400, "prompt", "at least one word"),
        ({"model": "sora-2"}, 404, "model", "The model 'sora-2' is not served"),
        ({"extra_body": {"colour": "red"}}, 400, "colour", "is not a field of this request"),
    ],
)
def test_what_a_student_cannot_do_is_refused_with_the_reason(
    client: openai.OpenAI, fields: dict[str, Any], status: int, param: str, message: str
) -> None:
    with pytest.raises(openai.APIStatusError) as caught:
        client.videos.create(**{"prompt": "waves", **fields})
    assert caught.value.status_code == status and message in caught.value.message
    assert caught.value.body["param"] == param  # type: ignore[index]


def test_what_needs_a_video_is_refused_with_the_reason(client: openai.OpenAI) -> None:
    video = client.videos.create_and_poll(prompt="waves", poll_interval_ms=20)
    with pytest.raises(openai.APIStatusError, match="remix is not supported: a student generates from text alone"):
        client.videos.remix(video.id, prompt="more")
    with pytest.raises(openai.APIStatusError, match="variant thumbnail is not kept"):
        client.videos.download_content(video.id, variant="thumbnail")


def test_videos_are_listed_page_by_page_in_both_orders(tmp_path: Path) -> None:
    with running_service(tmp_path / "data", RUNTIME="fake-video") as service, client_of(service) as client:
        assert client.videos.list().data == [] and client.videos.list().has_more is False
        ids = [client.videos.create_and_poll(prompt=f"waves {k}", poll_interval_ms=20).id for k in range(5)]
        newest = client.videos.list(limit=2)
        assert [video.id for video in newest.data] == [ids[4], ids[3]] and newest.has_more
        assert newest.last_id == ids[3] and newest.data[0].prompt == "waves 4"
        assert [video.id for video in client.videos.list(limit=2)] == ids[::-1], "its client fetches the further pages"
        assert [video.id for video in client.videos.list(limit=2, order="asc")] == ids
        assert [video.id for video in client.videos.list(after=ids[1], order="asc")] == ids[2:]
        last = client.videos.list(after=ids[1])
        assert [video.id for video in last.data] == ids[:1] and not last.has_more
        with pytest.raises(openai.NotFoundError):
            client.videos.list(after="video_none")
        for wrong in ({"limit": 0}, {"limit": 101}, {"order": "up"}):
            with pytest.raises(openai.BadRequestError):
                client.videos.list(**wrong)  # type: ignore[arg-type]


def test_a_video_is_deleted_with_its_file(client: openai.OpenAI, videos: Service) -> None:
    kept, gone = (client.videos.create_and_poll(prompt="waves", poll_interval_ms=20).id for _ in range(2))
    job = gone.removeprefix("video_")
    [folder] = videos.data_dir.glob(f"results/{job[:2]}/{job}")
    assert [path.suffix for path in folder.rglob("*.*")] == [".mp4"]
    deleted = client.videos.delete(gone)
    assert (deleted.id, deleted.deleted, deleted.object) == (gone, True, "video.deleted")
    assert not list(folder.rglob("*.mp4"))
    for ask in (client.videos.retrieve, client.videos.download_content, client.videos.delete):
        with pytest.raises(openai.NotFoundError):
            ask(gone)
    listed = [video.id for video in client.videos.list()]
    assert kept in listed and gone not in listed
    assert client.videos.download_content(kept).read()


def test_a_video_on_its_way_is_not_deleted(client: openai.OpenAI) -> None:
    slow = client.videos.create(prompt="fake:sleep=1", extra_body={"seed": 1})
    with pytest.raises(openai.ConflictError, match="it can be deleted once it has ended"):
        client.videos.delete(slow.id)
    assert client.videos.poll(slow.id, poll_interval_ms=20).status == "completed"
    assert client.videos.delete(slow.id).deleted


def test_a_key_lists_and_deletes_its_own_videos_only(tmp_path: Path) -> None:
    keys = KeyStore(tmp_path / "data")
    texts = [keys.create(name)[1] for name in ("ann", "bob")]
    reader = keys.create("reader", ["read"])[1]
    with running_service(tmp_path / "data", RUNTIME="fake-video") as service:
        clients = [client_of(service, text) for text in (*texts, reader)]
        ann, bob, reading = clients
        video = ann.videos.create_and_poll(prompt="waves", poll_interval_ms=20)
        assert [one.id for one in ann.videos.list()] == [video.id] and not list(bob.videos.list())
        with pytest.raises(openai.NotFoundError):
            bob.videos.delete(video.id)
        with pytest.raises(openai.NotFoundError):
            bob.videos.list(after=video.id)
        with pytest.raises(openai.PermissionDeniedError, match="lacks the scope generate"):
            reading.videos.delete(video.id)
        assert ann.videos.delete(video.id).deleted and not list(ann.videos.list())
        for client in clients:
            client.close()


def test_json_is_read_as_well_as_a_form(videos: Service) -> None:
    url = f"{videos.url}/v1/videos"
    asked = call("POST", url, json={"prompt": "waves", "seconds": 1, "seed": 0}).json()
    assert asked["seconds"] == "1.125"
    assert call("GET", f"{videos.url}/jobs/{asked['id'].removeprefix('video_')}").json()["seeds"] == [0]
    assert call("POST", url, content=b"x", headers={"Content-Type": "multipart/form-data"}).status_code == 400
    twice = {"prompt": (None, "a")}
    answer = call("POST", url, files=[*twice.items(), *twice.items()])
    assert answer.status_code == 400 and "a name of its own" in answer.json()["error"]["message"]
    assert call("POST", url, content=b"prompt=a", headers={"Content-Type": "text/plain"}).status_code == 415


def test_pictures_and_videos_each_have_their_own_address(client: openai.OpenAI, live: Service) -> None:
    with pytest.raises(openai.BadRequestError, match="fake-video generates videos: ask for them at /v1/videos"):
        client.images.generate(prompt="waves")
    with client_of(live) as pictures, pytest.raises(openai.BadRequestError, match="ask for them at /v1/images/gen"):
        pictures.videos.create(prompt="waves")
    job = call("POST", f"{live.url}/generate", json={"prompt": "p"}).json()["id"]
    assert call("GET", f"{live.url}/v1/videos/video_{job}").status_code == 404

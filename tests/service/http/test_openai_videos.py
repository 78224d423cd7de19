"""The official ``openai`` package's videos against a whole service: nothing here but the refusals is made by hand."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest

from student.runtimes.fake import fake_video
from tests.service.support import PATIENCE_S, Service, call, running_service
from tests.service.video_files import as_bytes, decode_mp4, psnr

pytestmark = pytest.mark.filterwarnings("ignore:The Sora API is scheduled:DeprecationWarning")


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    with running_service(tmp_path_factory.mktemp("videos") / "data", RUNTIME="fake-video") as service:
        yield service


def client_of(service: Service) -> openai.OpenAI:
    direct = httpx.Client(trust_env=False, timeout=PATIENCE_S)
    return openai.OpenAI(base_url=f"{service.url}/v1", api_key="none", max_retries=0, http_client=direct)


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
        ({"size": "720x1280"}, 400, "size", "draws 64x64 pixels and no other size"),
        ({"input_reference": ("a.png", b"123")}, 400, "input_reference", "a student draws from text alone"),
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
    with pytest.raises(openai.APIStatusError, match="remix is not supported: a student draws from text alone"):
        client.videos.remix(video.id, prompt="more")
    with pytest.raises(openai.APIStatusError, match="variant thumbnail is not kept"):
        client.videos.download_content(video.id, variant="thumbnail")


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
    with pytest.raises(openai.BadRequestError, match="fake-video draws videos: ask for them at /v1/videos"):
        client.images.generate(prompt="waves")
    with client_of(live) as pictures, pytest.raises(openai.BadRequestError, match="ask for them at /v1/images/gen"):
        pictures.videos.create(prompt="waves")
    job = call("POST", f"{live.url}/generate", json={"prompt": "p"}).json()["id"]
    assert call("GET", f"{live.url}/v1/videos/video_{job}").status_code == 404

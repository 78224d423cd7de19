"""The official ``openai`` package against a whole service: nothing here is a hand-made request."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest

from student.runtimes.fake import fake_preview
from tests.service.support import PATIENCE_S, Service, call, eventually, expected_pixels, pixels, running_service


@contextmanager
def connected(service: Service) -> Iterator[openai.OpenAI]:
    direct = httpx.Client(trust_env=False, timeout=PATIENCE_S)
    with openai.OpenAI(base_url=f"{service.url}/v1", api_key="none", max_retries=0, http_client=direct) as client:
        yield client


@pytest.fixture(scope="module")
def client(live: Service) -> Iterator[openai.OpenAI]:
    with connected(live) as client:
        yield client


def drawn(image: Any) -> np.ndarray[Any, np.dtype[np.uint8]]:
    return pixels(base64.b64decode(image.b64_json))


def refused(client: openai.OpenAI, **fields: Any) -> openai.APIStatusError:
    with pytest.raises(openai.APIStatusError) as caught:
        client.images.generate(**{"prompt": "p", **fields})
    assert set(caught.value.body) == {"message", "type", "param", "code"}  # type: ignore[arg-type]
    return caught.value


def test_images_come_in_base64_each_with_its_own_seed(client: openai.OpenAI) -> None:
    answer = client.images.generate(prompt="a red heart", model="fake", n=2, size="64x64", extra_body={"seed": 5})
    assert answer.data is not None and len(answer.data) == 2
    for image, seed in zip(answer.data, (5, 6), strict=True):
        assert np.array_equal(drawn(image), expected_pixels("a red heart", seed)) and image.url is None
    assert (answer.size, answer.quality, answer.output_format, answer.background) == ("64x64", "high", "png", "opaque")
    assert answer.created > 1_700_000_000
    assert answer.usage is not None and answer.usage.input_tokens == 3
    assert answer.usage.output_tokens == 2 * 16, "8 x 8 latents in patches of 2 x 2, twice"


@pytest.mark.parametrize(
    ("quality", "steps", "called"),
    [("low", 1, "low"), ("medium", 2, "medium"), ("high", 4, "high"), ("auto", 4, "high"), ("hd", 4, "high")],
)
def test_quality_is_a_step_count_of_the_student(client: openai.OpenAI, quality: Any, steps: int, called: str) -> None:
    answer = client.images.generate(prompt="q", quality=quality, extra_body={"seed": 1})
    assert answer.data is not None and answer.quality == called
    assert np.array_equal(drawn(answer.data[0]), expected_pixels("q", 1, steps))


def test_an_image_can_be_fetched_from_its_url(client: openai.OpenAI) -> None:
    answer = client.images.generate(prompt="u", response_format="url", extra_body={"seed": 2})
    assert answer.data is not None and answer.data[0].url is not None
    data = httpx.get(answer.data[0].url, trust_env=False, timeout=PATIENCE_S).content
    assert np.array_equal(pixels(data), expected_pixels("u", 2))


def test_partial_images_are_streamed_and_then_the_image(client: openai.OpenAI) -> None:
    stream = client.images.generate(prompt="s", stream=True, partial_images=2, extra_body={"seed": 3})
    events = list(stream)
    assert [event.type for event in events] == [
        "image_generation.partial_image", "image_generation.partial_image", "image_generation.completed",
    ]  # fmt: skip
    for event in events:
        assert (event.size, event.output_format, event.background, event.quality) == ("64x64", "png", "opaque", "high")
    assert np.array_equal(drawn(events[-1]), expected_pixels("s", 3))
    for k, step in enumerate((0, 2)):
        assert events[k].partial_image_index == k  # type: ignore[union-attr]
        key = np.rint(fake_preview("s", 3, 4, step) * 255).astype(np.uint8).transpose(1, 2, 0)
        assert np.array_equal(drawn(events[k]), key)
    assert events[-1].usage.total_tokens == 1 + 16  # type: ignore[union-attr]


def test_a_failure_in_the_stream_is_an_error_of_the_package(client: openai.OpenAI) -> None:
    with pytest.raises(openai.APIError, match="could not be generated") as caught:
        list(client.images.generate(prompt="fake:raise", stream=True))
    assert caught.value.code == "generation_failed"
    with pytest.raises(openai.InternalServerError, match="could not be generated"):
        client.images.generate(prompt="fake:raise")


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"size": "1024x1024"}, "size"),
        ({"size": "large"}, "size"),
        ({"n": 11}, "n"),
        ({"n": 0}, "n"),
        ({"quality": "best"}, "quality"),
        ({"quality": "low", "extra_body": {"num_inference_steps": 2}}, "quality"),
        ({"extra_body": {"num_inference_steps": 3}}, "num_inference_steps"),
        ({"style": "vivid"}, "style"),
        ({"background": "transparent"}, "background"),
        ({"output_format": "gif"}, "output_format"),
        ({"output_compression": 50}, "output_compression"),
        ({"partial_images": 2}, "partial_images"),
        ({"partial_images": 4, "stream": True}, "partial_images"),
        ({"frame_count": 3}, "frame_count"),
        ({"prompt": " "}, "prompt"),
        ({"prompt": "word " * 40}, "prompt"),
        ({"extra_body": {"qualty": "low"}}, "qualty"),
    ],
)
def test_what_cannot_be_done_is_refused_and_the_field_is_named(
    client: openai.OpenAI, fields: dict[str, Any], param: str
) -> None:
    error = refused(client, **fields)
    assert isinstance(error, openai.BadRequestError) and error.status_code == 400
    assert (error.type, error.param) == ("invalid_request_error", param)


def test_a_wrong_field_names_the_nearest_of_openais(client: openai.OpenAI) -> None:
    assert "did you mean safety_identifier?" in str(refused(client, extra_body={"safety_id": "x"}))


def test_a_model_that_is_not_served_is_not_found(client: openai.OpenAI) -> None:
    error = refused(client, model="gpt-image-2")
    assert isinstance(error, openai.NotFoundError)
    assert (error.code, error.param) == ("model_not_found", "model")
    assert isinstance(refused(client, model="fake@2"), openai.NotFoundError)


def test_models_are_listed_and_retrieved(client: openai.OpenAI) -> None:
    [model] = list(client.models.list())
    assert (model.id, model.object, model.owned_by) == ("fake", "model", "fewstep")
    assert client.models.retrieve("fake@1").id == "fake"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt-image-2")


def test_nulls_are_as_if_left_out(client: openai.OpenAI) -> None:
    answer = client.images.generate(prompt="p", n=None, size=None, model=None, stream=None)
    assert answer.data is not None and len(answer.data) == 1  # type: ignore[union-attr]


def test_pictures_can_be_chosen_by_extra_fields(live: Service) -> None:
    """As with /generate: the same seeds, scores and floor; tokens count all that was drawn."""
    body = {"prompt": "a red heart", "seed": 7, "best_of": 4}
    own = call("POST", f"{live.url}/generate", json=body).json()
    answer = call("POST", f"{live.url}/v1/images/generations", json=body).json()
    (image,), (expected,) = answer["data"], own["data"]
    names = ("b64_json", "seed", "reward", "steps", "reported", "candidates")
    assert {name: image[name] for name in names} == {name: expected[name] for name in names}
    plain = call("POST", f"{live.url}/v1/images/generations", json={"prompt": "a red heart", "seed": 7}).json()
    assert answer["usage"]["output_tokens"] == 4 * plain["usage"]["output_tokens"] and "steps" not in plain["data"][0]
    floored = {"prompt": "a red heart", "seed": 7, "min_reward": 9.0, "cascade": [1, 2]}
    answer = call("POST", f"{live.url}/v1/images/generations", json=floored).json()
    assert answer["data"][0]["below_floor"] and answer["floor"]["min_reward"] == 9.0
    assert [one["steps"] for one in answer["data"][0]["candidates"]] == [1, 2]
    refused = call("POST", f"{live.url}/v1/images/generations", json={**floored, "quality": "low"})
    assert refused.status_code == 400 and refused.json()["error"]["param"] == "quality"
    streamed = call("POST", f"{live.url}/v1/images/generations", json={**body, "stream": True}).text
    (completed,) = [json.loads(line[6:]) for line in streamed.splitlines() if line.startswith("data: {")]
    assert completed["seed"] == image["seed"] and len(completed["candidates"]) == 4
    assert completed["reward"] == image["reward"] and completed["reward_percentile"] == image["reward_percentile"]


def test_scores_that_come_later_are_announced_with_the_job_that_will_have_them(tmp_path: Path) -> None:
    with running_service(tmp_path / "data", SCORE="after") as late, connected(late) as client:
        extra = {"extra_body": {"seed": 3}}
        answer = client.images.generate(prompt="heart fake:score=1", **extra)  # type: ignore[call-overload]
        assert answer.scoring == "pending" and answer.data[0].reward == {}
        job = lambda: call("GET", f"{late.url}/jobs/{answer.id}").json()  # noqa: E731
        eventually(lambda: job()["scoring"] == "done", "they come")
        assert set(job()["data"][0]["reward"]) == {"trained", "heldout"}
        *_, completed = client.images.generate(prompt="fake:score=1", stream=True, **extra)  # type: ignore[call-overload]
        assert completed.scoring == "pending" and completed.id != answer.id


def test_scores_that_are_there_are_not_announced(client: openai.OpenAI, live: Service) -> None:
    answer = client.images.generate(prompt="heart", extra_body={"seed": 3})
    assert "scoring" not in (answer.model_extra or {})
    assert call("GET", f"{live.url}/jobs/{answer.id}").json()["prompt"] == "heart"  # type: ignore[attr-defined]

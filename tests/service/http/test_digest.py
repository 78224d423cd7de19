"""The digest that a repeated request is known by: of what is asked for, and the same in every release."""

from __future__ import annotations

from typing import Any

import pytest

from service.http.preferences import LATER, digest
from service.http.schema import GenerateRequest

# The fields of the first release whose digests are compared, in their order.
FIRST = (
    "prompt", "negative_prompt", "num_inference_steps", "guidance_scale", "width", "height", "size", "seed",
    "num_images_per_prompt", "n", "model", "model_version", "output_format", "output_compression", "response_format",
    "priority", "timeout_s", "stream", "partial_images", "user", "metadata", "webhook_url", "webhook_events",
)  # fmt: skip
FULL: dict[str, Any] = {
    "prompt": "é", "seed": [1, 2], "n": 2, "output_format": "jpeg", "output_compression": 80, "timeout_s": 30,
    "metadata": {"a": "b"}, "priority": 1,
}  # fmt: skip


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ({"prompt": "a red heart"}, "5e2485cb4f4ad86a3d77a6b3ef5305d08fef49a560ad557a785d7ebd01863f31"),
        (FULL, "e78eae8df0527463818c9d95631a84f98f3bf1f3f6410396856d09c24b83a4bf"),
    ],
)
def test_a_request_that_an_earlier_release_understands_has_its_digest_there(
    body: dict[str, Any], expected: str
) -> None:
    """What the release before candidates and videos computed: a retry may reach either in a rolling upgrade."""
    assert digest(GenerateRequest(**body)) == expected


def test_a_field_that_is_added_says_that_it_came_later() -> None:
    assert tuple(name for name in GenerateRequest.model_fields if name not in LATER) == FIRST


@pytest.mark.parametrize("more", [{"best_of": 2}, {"num_frames": 5}, {"allow_training": True}, {"priority": -1}])
def test_another_request_has_another_digest(more: dict[str, Any]) -> None:
    assert digest(GenerateRequest(prompt="p", **more)) != digest(GenerateRequest(prompt="p"))


def test_what_is_written_in_another_way_is_the_same_request() -> None:
    assert digest(GenerateRequest(prompt="p", best_of=1, output_format="png")) == digest(GenerateRequest(prompt="p"))

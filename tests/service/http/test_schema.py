"""The outermost values that each field of a request takes, and the first ones beyond."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from service.http.schema import GenerateRequest

LONG = "x" * 32_000
SEVENTEEN = {str(k): "" for k in range(17)}
HOOKS = ["job.done", "job.failed", "job.cancelled", "job.expired"]
# By field: values that are taken, and values that are refused.
EDGES: dict[str, tuple[list[Any], list[Any]]] = {
    "prompt": (["p", LONG], ["", " \n\t ", LONG + "x", None, 1]),
    "negative_prompt": (["", LONG, None], [LONG + "x"]),
    "num_inference_steps": ([1, 1000, None], [0, 1001, 4.0, "4", True]),
    "guidance_scale": ([0.0, -1, 3.5, None], ["3"]),
    "width": ([1, 16384, None], [0, 16385, 64.0]),
    "height": ([1, 16384, None], [0, 16385, 64.0]),
    "size": (
        ["1x1", "99999x99999", None],
        ["0x1", "1x0", "064x64", "64x064", "100000x1", "1x100000", "64", "64X64", "64x"],
    ),
    "seed": ([0, 2**32 - 1, [0], [2**32 - 1] * 10, None], [-1, 2**32, [], [0] * 11, [-1], [2**32], 1.0, "1", True]),
    "num_images_per_prompt": ([1, 10], [0, 11, None, 1.0]),
    "n": ([1, 10], [0, 11, None, 1.0]),
    "best_of": ([1, 16], [0, 17, 2.0]),
    "rank_by": (["", "x" * 64, None], ["x" * 65]),
    "min_reward": (
        [-1e9, 0, 0.5, "p1", "p9", "p10", "p99", None],
        ["p0", "p100", "p01", "P20", "20", "p", float("inf"), float("nan"), True],
    ),
    "cascade": ([[1, 2], [1] * 8, [1000, 1], None], [[1], [1] * 9, [0, 1], [1, 1001], "1,2", []]),
    "model": (["", "x" * 128, None], ["x" * 129]),
    "model_version": (["", "x" * 128, None], ["x" * 129]),
    "num_frames": ([1, 1024, None], [0, 1025]),
    "fps": ([1, 60, None], [0, 61, 24.0]),
    "output_format": (["png", "jpeg", "webp", "mp4", None], ["gif", "PNG", "jpg"]),
    "output_compression": ([0, 100, None], [-1, 101, 80.0]),
    "response_format": (["b64_json", "url", "file"], ["b64", None]),
    "priority": ([-5, 5], [-6, 6, None]),
    "timeout_s": ([0.001, 1, 3600, None], [0, -1, 3600.1, "1"]),
    "stream": ([True, False], [None, 1, "true"]),
    "partial_images": ([0, 3], [-1, 4, None]),
    "allow_training": ([True, False, None], [1, "yes"]),
    "user": (["", "x" * 128, None], ["x" * 129, 3]),
    "metadata": (
        [{}, {"x" * 64: "y" * 512}, {str(k): "" for k in range(16)}, None],
        [{"": "a"}, {"x" * 65: ""}, {"a": "y" * 513}, SEVENTEEN, {"a": 1}],
    ),
    "webhook_url": (["", "x" * 2048, None], ["x" * 2049]),
    "webhook_events": ([["job.done"], HOOKS, None], [[], [*HOOKS, "job.done"], ["job.started"], "job.done"]),
}  # fmt: skip


def test_every_field_has_its_edges_here() -> None:
    assert set(EDGES) == set(GenerateRequest.model_fields)


@pytest.mark.parametrize("name", EDGES)
def test_the_outermost_values_are_taken_and_the_next_ones_refused(name: str) -> None:
    def taken(value: Any) -> bool:
        try:
            return getattr(GenerateRequest(**{"prompt": "p", name: value}), name) == value
        except ValidationError as error:
            assert {fault["loc"][0] for fault in error.errors()} == {name}
            return False

    accepted, refused = EDGES[name]
    assert [value for value in accepted if not taken(value)] == []
    assert [value for value in refused if taken(value)] == []


def test_what_is_unset_has_these_defaults() -> None:
    body = GenerateRequest(prompt="p")
    assert {name: getattr(body, name) for name in EDGES if getattr(body, name) is not None} == {
        "prompt": "p", "num_images_per_prompt": 1, "n": 1, "best_of": 1, "response_format": "b64_json", "priority": 0,
        "stream": False, "partial_images": 0,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("fields", "count"),
    [
        ({}, 1),
        ({"seed": 7}, 1),
        ({"seed": [7, 8, 9]}, 3),
        ({"n": 2}, 2),
        ({"num_images_per_prompt": 4}, 4),
        ({"n": 2, "num_images_per_prompt": 4}, 4),
        ({"n": 1, "seed": [7, 8]}, 1),
    ],
)
def test_the_number_of_images_is_that_of_the_field_that_says_it(fields: dict[str, Any], count: int) -> None:
    assert GenerateRequest(prompt="p", **fields).count == count

"""A result of any release, and of none, is read in one form."""

from __future__ import annotations

import json

import pytest

from service.queue.result import RESULT_VERSION, read_result, write_result

IMAGE = {"file": "f", "seed": 1, "width": 64, "height": 64, "sha256": "0" * 64, "reward": {"s": 0.5}}
TIMINGS = {"queue_s": 1.0, "inference_s": 2.0, "score_s": 0.5, "encode_s": 0.25}
RESULT = {
    "runtime": "r", "batch_size": 2, "images": [IMAGE], "timings": TIMINGS,
    "calls": [{"images": 2, "inference_s": 0.5, "splits": 1}], "scoring": "skipped",
}  # fmt: skip


def test_a_result_is_read_as_it_was_written() -> None:
    assert read_result(write_result(RESULT)) == {"version": RESULT_VERSION, **RESULT}
    assert read_result("") == {} == read_result(None)


def test_a_later_release_may_say_more() -> None:
    more = {
        **RESULT,
        "version": 9,
        "mood": "calm",
        "images": [{**IMAGE, "rank": 2}],
        "timings": {**TIMINGS, "new_s": 3},
    }
    read = read_result(json.dumps(more))
    assert read["images"] == [{**IMAGE, "rank": 2}] and read["timings"]["new_s"] == 3 and "mood" not in read


@pytest.mark.parametrize("text", ['{"images": [], "runtime": "r"}', "{}", "[]", "null", "7", "no json", '{"images": 3}',
                                  '{"images": [null], "timings": 7, "calls": {"a": 1}}', '{"error": null}',
                                  '{"error": {"code": 7}, "images": [{"reward": [1], "seed": true}]}'])  # fmt: skip
def test_whatever_it_is_every_reader_finds_what_it_expects(text: str) -> None:
    read = read_result(text)
    assert {"images", "timings", "calls", "runtime", "batch_size"} <= set(read)
    assert {"queue_s", "inference_s", "score_s", "encode_s"} <= set(read["timings"])
    for image in read["images"]:
        assert {"file", "seed", "width", "height", "sha256", "reward"} <= set(image) and isinstance(
            image["reward"], dict
        )
    for call in read["calls"]:
        assert set(call) == {"images", "inference_s", "splits"}
    if "error" in read:
        assert isinstance(read["error"]["code"], str) and isinstance(read["error"]["message"], str)

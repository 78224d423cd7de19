"""A result of any release, and of none, is read in one form."""

from __future__ import annotations

import json

import pytest

from service.observe.metrics import Metrics
from service.queue.job import Record
from service.queue.result import RESULT_VERSION, read_result, with_scores, write_result
from service.queue.states import State
from tests.service.support import a_job

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


def test_whatever_is_said_of_scores_and_candidates_the_metrics_can_count_it() -> None:
    """Each as a release might say it that means something else by that name."""
    odd = [
        {"candidates": 7}, {"candidates": [5, {"reward": None}, {"reward": {"s": "high", "t": 1.5}}]},
        {"reward_failed": 3}, {"reward_failed": [["s"], "t"]}, {"reward": {"s": float("nan"), "t": 1.5}},
        {"reward_percentile": "high"},
    ]  # fmt: skip
    read = read_result(json.dumps({**RESULT, "images": [{**IMAGE, **entry} for entry in odd]}))
    assert read["images"] == [
        {**IMAGE, "candidates": []},
        {**IMAGE, "candidates": [{"reward": {}}, {"reward": {}}, {"reward": {"t": 1.5}}]},
        {**IMAGE, "reward_failed": []}, {**IMAGE, "reward_failed": ["t"]}, {**IMAGE, "reward": {"t": 1.5}},
        {**IMAGE, "reward_percentile": {}},
    ]  # fmt: skip
    payload = a_job(rank_by="s").to_payload()
    Metrics("m", "1", {}).record(Record("i", State.DONE, read, payload=payload))


def test_scores_that_come_later_are_each_images_own() -> None:
    images = [{**IMAGE, "reward": {}}, {**IMAGE, "seed": 2, "reward": {}}, {**IMAGE, "seed": 3, "reward": {}}]
    result = read_result(write_result({**RESULT, "images": images, "timings": {**TIMINGS, "score_s": 0.0}}))
    later = [
        {"reward": {"s": 0.5}, "reward_percentile": {"s": 60.0}},
        {"reward": {"s": -1.0}, "reward_failed": ["h"]},
    ]
    found = with_scores(result, json.dumps({"images": later, "score_s": 0.75}))
    assert [image["reward"] for image in found["images"]] == [{"s": 0.5}, {"s": -1.0}, {}]
    assert [image["reward_percentile"] for image in found["images"]] == [{"s": 60.0}, {}, {}]
    assert [image.get("reward_failed") for image in found["images"]] == [None, ["h"], None]
    assert [image["seed"] for image in found["images"]] == [1, 2, 3]
    assert found["timings"] == {**TIMINGS, "score_s": 0.75}
    assert with_scores(found, json.dumps({"images": later}))["timings"]["score_s"] == 0.0
    for nothing in (None, "", "{"):
        assert with_scores(result, nothing) is result
    assert with_scores({}, json.dumps({"images": later})) == {}


@pytest.mark.parametrize(
    ("name", "wrong", "usual"),
    [
        ("batch_size", True, 1), ("batch_size", "2", 1), ("batch_size", 2.5, 1), ("runtime", 7, ""),
        ("runtime", True, ""), ("scoring", None, ""), ("images", {}, []), ("calls", {"a": 1}, []),
        ("version", False, 0),
    ],
)  # fmt: skip
def test_what_has_a_wrong_type_counts_as_missing(name: str, wrong: object, usual: object) -> None:
    assert read_result(write_result({**RESULT, name: wrong}))[name] == usual


def test_numbers_of_a_wrong_type_are_left_out() -> None:
    found = read_result(write_result({**RESULT, "timings": {"queue_s": True, "score_s": "1", "encode_s": 2}}))
    assert found["timings"] == {"queue_s": 0.0, "inference_s": 0.0, "score_s": 0.0, "encode_s": 2}
    image = {**IMAGE, "seed": True, "width": 64.5, "reward": {"s": 1, "t": True, "u": None}}
    [read] = read_result(write_result({**RESULT, "images": [image]}))["images"]
    assert (read["seed"], read["width"], read["reward"]) == (0, 0, {"s": 1})

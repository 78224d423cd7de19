"""What workers say of themselves, and what is counted for each key, as it is read."""

from __future__ import annotations

from typing import Any

import pytest

from service.queue.status import Usage, Worker, WorkerState, read_usages, read_worker

OLD = {"runtime": "onnx", "host": "h", "max_batch": 8}
GPU = {"busy": 0.5}


def test_a_worker_is_read_as_it_describes_itself() -> None:
    said = {
        **OLD, "shows_steps": True, "models": {"m/1": {"shows_steps": False}}, "refused": {"n/1": {"reason": "r"}},
        "load_s": 3.0, "warm_up_s": 1.0, "gpus": {"GPU-1": GPU}, "state": "loading", "jobs": 2, "of_a_later_release": 1,
    }  # fmt: skip
    assert read_worker("w", said) == Worker(
        id="w", runtime="onnx", host="h", max_batch=8, shows_steps=True,
        models={"m/1": {"runtime": "", "shows_steps": False}},
        refused={"n/1": {"reason": "r"}}, load_s=3.0, warm_up_s=1.0, gpus={"GPU-1": GPU}, state=WorkerState.LOADING,
        jobs=2,
    )  # fmt: skip


def test_what_another_release_leaves_out_makes_no_reader_fail() -> None:
    assert read_worker("w", {}) == Worker("w", "", "", 1, False)
    held = {"runtime": "r", "max_batch": 4, "shows_steps": True}
    worker = read_worker("w", {**OLD, "models": {"m/1": held, "n/1": {}}})
    assert worker.models == {"m/1": held, "n/1": {"runtime": "", "shows_steps": False}}


def test_what_an_older_release_does_not_say_is_as_it_was_there() -> None:
    assert read_worker("w", OLD) == Worker("w", "onnx", "h", 8, False, {}, {}, 0.0, 0.0, {}, WorkerState.READY, 0)
    assert Worker("w", "onnx", "h", 8, False) == read_worker("w", OLD)


@pytest.mark.parametrize(
    ("said", "order", "state"),
    [
        ("ready", "", WorkerState.READY),
        ("ready", "paused", WorkerState.PAUSED),
        ("loading", "draining", WorkerState.DRAINING),
        ("paused", "", WorkerState.PAUSED),
        ("of a later release", "", WorkerState.READY),
        ("ready", "of a later release", WorkerState.READY),
    ],
)
def test_an_order_holds_before_the_worker_knows_of_it(said: str, order: str, state: WorkerState) -> None:
    worker = read_worker("w", {**OLD, "state": said}, order)
    assert worker.state is state and worker.claims == (state is WorkerState.READY)


@pytest.mark.parametrize(
    ("said", "shows"),
    [
        ({"shows_steps": True}, True),
        ({"shows_steps": False}, False),
        ({"shows_steps": True, "models": {"m/1": {"shows_steps": False}}}, False),
        ({"shows_steps": False, "models": {"m/1": {"shows_steps": True}}}, True),
        ({"shows_steps": True, "models": {"n/1": {"shows_steps": True}}}, False),
    ],
)
def test_previews_are_those_of_the_model_and_of_an_older_release_those_of_its_only_one(
    said: dict[str, Any], shows: bool
) -> None:
    assert read_worker("w", {**OLD, **said}).shows("m/1") is shows


def test_sides_are_those_of_the_model() -> None:
    worker = read_worker("w", {**OLD, "models": {"m/1": {"sides_px": {"multiple": 16}}, "n/1": {}}})
    assert [worker.sides_px(model) for model in ("m/1", "n/1", "o/1")] == [{"multiple": 16}, None, None]


def test_usage_is_read_key_by_key_whatever_their_names_are() -> None:
    counts = {"b|jobs": "1", "b|images": "2", "b|work": "32", "a|x|jobs": "3", "a|x|work": "5"}
    assert list(read_usages(86400, counts)) == [Usage("a|x", 86400, 3, 0, 5), Usage("b", 86400, 1, 2, 32)]
    assert list(read_usages(0, {})) == []

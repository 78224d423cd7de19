"""Results past their time go away: by one process at a time, as often as was said, or never."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

from service.queue.producer import Producer
from tests.service.support import Api, Queue, eventually

OLD_S = 1000.0


def old_result(data_dir: Path) -> Path:
    folder = data_dir / "results" / "ab" / ("ab" * 16)
    folder.mkdir(parents=True)
    (folder / "0.png").write_bytes(b"x")
    os.utime(folder, (time.time() - OLD_S, time.time() - OLD_S))
    return folder


def test_a_running_service_sweeps_unless_it_is_told_not_to(make_api: Callable[..., Api], tmp_path: Path) -> None:
    swept, kept = old_result(tmp_path / "data"), old_result(tmp_path / "other")
    make_api(SWEEP_S="0", RESULT_TTL_S="60", DATA_DIR=str(tmp_path / "other"))
    make_api(SWEEP_S="0.2", RESULT_TTL_S="60")
    eventually(lambda: not swept.exists(), "it is swept")
    assert kept.exists()


def test_one_process_of_several_does_a_duty_and_another_one_when_its_turn_is_over(queue: Queue) -> None:
    other = Producer(queue.async_client, queue.model, "other", **queue.limits)
    run = queue.runner.run
    assert run(queue.producer.take_turn("sweep", 0.3)) is True
    assert run(other.take_turn("sweep", 0.3)) is False and run(queue.producer.take_turn("sweep", 0.3)) is False
    assert run(other.take_turn("another duty", 0.3)) is True
    eventually(lambda: run(other.take_turn("sweep", 60)), "the turn is over")
    assert run(queue.producer.take_turn("sweep", 60)) is False

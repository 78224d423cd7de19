"""Tests on a device that is not there, each file in a process of its own: torch knows the device from then on, and
other tests would find it."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.alone import ALONE
from tests.service.support import REPOSITORY

FILES = (
    "tests/test_serving_memory.py",
    "tests/test_serving_on_card.py",
    "tests/test_step_counts.py",
    "tests/test_train_memory.py",
    "tests/student/families/test_video_memory.py",
    "tests/training/test_offload.py",
)


@pytest.mark.parametrize("file", FILES)
def test_in_a_process_of_its_own(file: str) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", file]
    environment = {**os.environ, ALONE: "1"}
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=900)
    # The interpreter may abort when it ends, with all said.
    assert " passed" in done.stdout and " failed" not in done.stdout and "error" not in done.stdout, (
        done.stdout[-4000:] + done.stderr[-2000:]
    )

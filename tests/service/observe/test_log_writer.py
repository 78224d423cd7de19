"""A reader of the log that does not read: nothing waits for it, and what it missed is counted."""

from __future__ import annotations

import fcntl
import json
import logging
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from service.observe import log_writer
from service.observe.log_writer import LogWriter
from tests.service.support import PATIENCE_S, REPOSITORY, call, clean_environment, eventually, post

SMALLEST_PIPE_BYTES = 4096
F_SETPIPE_SZ = 1031  # fcntl has the name only since Python 3.10 on Linux, and not elsewhere


def narrow_pipe() -> tuple[int, int]:
    reading, writing = os.pipe()
    if sys.platform.startswith("linux"):
        fcntl.fcntl(writing, F_SETPIPE_SZ, SMALLEST_PIPE_BYTES)
    return reading, writing


def test_lines_that_nobody_reads_are_dropped_counted_and_told_of() -> None:
    reading, writing = narrow_pipe()
    writer, log = LogWriter(writing, most_lines=10), logging.Logger("alone")
    log.addHandler(writer)
    for number in range(2000):
        log.warning("line %d %s", number, "x" * 80)
    assert writer.dropped > 0
    text = ""
    while "dropped" not in text.rpartition("\n")[0]:
        text += os.read(reading, 65536).decode()
    writer.flush()
    log.warning("the last one")
    while "the last one\n" not in text:
        text += os.read(reading, 65536).decode()
    numbers = [int(number) for number in re.findall(r"^line (\d+) x{80}$", text, re.M)]
    report = [int(number) for number in re.findall(r"^(\d+) log lines were dropped", text, re.M)]
    assert numbers == sorted(set(numbers)) and len(numbers) + sum(report) == 2000 and sum(report) == writer.dropped
    for end in (reading, writing):
        os.close(end)


def test_lines_that_come_together_leave_together_and_no_write_splits_one(monkeypatch: pytest.MonkeyPatch) -> None:
    reading, writing = os.pipe()
    written: list[bytes] = []
    write = os.write

    def noted(descriptor: int, data: bytes) -> int:
        if descriptor == writing:
            written.append(bytes(data))
        return write(descriptor, data)

    monkeypatch.setattr(os, "write", noted)
    writer, log = LogWriter(writing), logging.Logger("alone")
    log.addHandler(writer)
    sizes = [50] * 100 + [5000] + [50] * 100
    for number, size in enumerate(sizes):
        log.warning("%s", str(number).rjust(size, "-"))
    monkeypatch.setattr(log_writer, "FLUSH_S", 2 * PATIENCE_S)
    began = time.monotonic()
    writer.flush()
    assert time.monotonic() - began < PATIENCE_S, "it returns with the last line, not with its patience"
    lines = b"".join(written).decode().splitlines()
    assert [int(line.strip("-")) for line in lines] == list(range(201)) and [len(line) for line in lines] == sizes
    assert len(written) <= 20, "not one write for each line"
    assert all(piece.endswith(b"\n") for piece in written)
    assert all(len(piece) <= SMALLEST_PIPE_BYTES or piece.count(b"\n") == 1 for piece in written)
    for end in (reading, writing):
        os.close(end)


def test_lines_whose_reader_is_gone_are_all_counted_and_the_next_reader_is_told(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A reader that is started again has the same descriptor."""
    written, gone, write = list[bytes](), [True], os.write
    reading, writing = os.pipe()

    def noted(descriptor: int, data: bytes) -> int:
        if descriptor != writing:
            return write(descriptor, data)
        if gone[0]:
            raise BrokenPipeError
        written.append(bytes(data[:100]))
        return len(written[-1])  # a pipe may take a part

    monkeypatch.setattr(os, "write", noted)
    writer, log = LogWriter(writing), logging.Logger("alone")
    log.addHandler(writer)
    for number in range(70):
        log.warning("line %d %s", number, "x" * 100)
    eventually(lambda: writer.dropped == 70, "each is counted")
    writer.flush()
    gone[0] = False
    log.warning("the first one %s", "y" * 300)
    text = eventually(lambda: (found := b"".join(written)).count(b"\n") == 2 and found.decode(), "two lines")
    assert text.splitlines()[0] == f"the first one {'y' * 300}"
    assert text.splitlines()[1].startswith("70 log lines were dropped") and writer.dropped == 70
    for end in (reading, writing):
        os.close(end)


def test_a_signal_may_come_in_the_middle_of_a_line() -> None:
    """Its handler logs, too, in the thread that it interrupts: over and over, so that it meets every place."""
    code = (
        "import logging, signal, sys\n"
        "from service.observe.log_writer import LogWriter\n"
        "log = logging.Logger('alone')\n"
        "log.addHandler(LogWriter(sys.stderr.fileno()))\n"
        "heard = 0\n"
        "def hear(*_):\n"
        "    global heard\n"
        "    heard += 1\n"
        "    log.warning('heard')\n"
        "signal.signal(signal.SIGALRM, hear)\n"
        "signal.setitimer(signal.ITIMER_REAL, 0.0002, 0.0002)\n"
        "while heard < 2000:\n"
        "    log.warning('line')\n"
        "signal.setitimer(signal.ITIMER_REAL, 0)\n"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=4 * PATIENCE_S)
    assert done.returncode == 0 and "heard\n" in done.stderr and "line\n" in done.stderr


def test_a_service_whose_output_nobody_reads_goes_on_and_ends(tmp_path: Path) -> None:
    reading, writing = narrow_pipe()
    settings = {"RUNTIME": "fake", "PORT": "0", "DATA_DIR": str(tmp_path / "data"), "LOG_LEVEL": "debug"}
    process = subprocess.Popen(
        [sys.executable, "-m", "service.run"],
        cwd=REPOSITORY, env=clean_environment(settings), stdout=writing, stderr=writing,
    )  # fmt: skip
    try:
        run_file = tmp_path / "data" / "run.json"
        eventually(run_file.exists, "it has begun", patience_s=60)
        url = str(json.loads(run_file.read_text())["url"])
        eventually(lambda: call("GET", f"{url}/readyz").status_code == 200, "ready", patience_s=60)
        assert {post(url, prompt="p", seed=k).status_code for k in range(60)} == {200}
        process.send_signal(signal.SIGTERM)
        assert process.wait(PATIENCE_S) == 0 and not run_file.exists()
    finally:
        process.kill()
        process.wait()
        for end in (reading, writing):
            os.close(end)

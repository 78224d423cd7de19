"""Counting in files that all HTTP processes of one service share, so that whichever is scraped tells of all of them.

The files are the library's multi-process mode. A process that is started again has the part of the one before it, and
counts on: nothing that was counted is lost with a process, and nothing grows with the number of restarts.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from prometheus_client import values

COUNTS = "counts"  # the files' folder in the data directory
VARIABLE = "PROMETHEUS_MULTIPROC_DIR"


def share_counts(folder: Path, part: int) -> None:
    """From now on what this process counts lies in files of ``folder``; of the processes that run at a time, no other
    may have the same ``part``. To be called before anything is counted."""
    for of_the_dead in folder.glob(f"gauge_*_{part}.db"):  # what was under way there is so no more
        of_the_dead.unlink()
    os.environ[VARIABLE] = str(folder)
    values.ValueClass = values.MultiProcessValue(lambda: part)  # type: ignore[no-untyped-call]


def fresh_folder(data_dir: Path) -> None:
    """An empty folder for the files of a service that starts."""
    shutil.rmtree(data_dir / COUNTS, ignore_errors=True)
    (data_dir / COUNTS).mkdir(parents=True)


def shared_folder() -> Path | None:
    """Where the counts of all processes lie, if they are shared."""
    return Path(os.environ[VARIABLE]) if VARIABLE in os.environ else None

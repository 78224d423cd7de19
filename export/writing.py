"""Atomic writing of folders."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """A new empty folder to fill, which replaces ``folder`` at the end and is removed after an exception."""
    unfinished = folder.with_name(f".{folder.name}.part")
    former = folder.with_name(f".{folder.name}.old")
    for left_over in (unfinished, former):
        shutil.rmtree(left_over, ignore_errors=True)
    unfinished.mkdir(parents=True)
    try:
        yield unfinished
        if folder.exists():
            folder.rename(former)
        unfinished.rename(folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
        shutil.rmtree(former, ignore_errors=True)

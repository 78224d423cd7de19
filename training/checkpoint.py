"""Checkpoints that survive a crash: written beside the target, flushed, then renamed."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch


class CheckpointError(OSError):
    """A checkpoint could not be written; the message is one sentence."""


def save(path: Path, state: dict[str, Any]) -> None:
    """Write ``state`` so that ``path`` always holds either the whole old file or the whole new one.

    Raises:
        CheckpointError: the disk is full or refuses the file; no partial file is left.
    """
    part = path.with_suffix(path.suffix + ".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with part.open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except (OSError, RuntimeError) as error:
        # torch tries to finish the file that it could not write, and that error hides the disk's.
        disk = error if isinstance(error, OSError) else error.__context__
        if not isinstance(disk, OSError):
            raise
        before = (
            "the one before is whole, and the same command goes on from it" if path.exists() else "there is none yet"
        )
        raise CheckpointError(f"{path} cannot be written ({disk.strerror or disk}): {before}") from error
    finally:
        part.unlink(missing_ok=True)


def load(path: Path) -> dict[str, Any] | None:
    """The saved state (tensors and plain values only, no code), or None if there is none."""
    if not path.exists():
        return None
    state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    return state

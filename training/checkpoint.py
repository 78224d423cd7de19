"""Checkpoints that survive a crash: written beside the target, flushed, then renamed.

A sharded run's is a folder of torch's distributed format, into which every process writes its own slices, and which any
number of processes reads; any other run's is one file.
"""

from __future__ import annotations

import json
import os
import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.api import CheckpointException

from training.processes import Processes

PLAIN = "plain"


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
        raise _unwritten(path, disk) from error
    finally:
        part.unlink(missing_ok=True)


def load(path: Path) -> dict[str, Any] | None:
    """The saved state (tensors and plain values only, no code), or None if there is none."""
    if not path.exists():
        return None
    state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    return state


def save_slices(path: Path, tensors: Mapping[str, Mapping[str, Tensor]], plain: Mapping[str, Any]) -> None:
    """Write named groups of tensors, sharded or not, and plain values beside them; every process must call it.

    Raises:
        CheckpointError: as ``save``.
    """
    processes, part, before = Processes(), _beside(path, "part"), _beside(path, "before")
    if processes.is_first:
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(part, ignore_errors=True)
    processes.wait()
    try:
        with _quiet():
            state_dict_saver.save(
                {**tensors, PLAIN: json.dumps(plain)}, checkpoint_id=part, no_dist=processes.size == 1
            )
    except CheckpointException as error:
        disk = next((one for one, _ in error.failures.values() if isinstance(one, OSError)), None)
        if disk is None:
            raise
        raise _unwritten(path, disk) from error
    processes.wait()
    if processes.is_first:
        shutil.rmtree(before, ignore_errors=True)
        if path.exists():
            path.rename(before)
        part.rename(path)
        shutil.rmtree(before, ignore_errors=True)
    processes.wait()


def load_slices(path: Path, tensors: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Any] | None:
    """Fill ``tensors`` from what ``save_slices`` wrote, however they are sharded now; the plain values, or None."""
    processes = Processes()
    found = path if path.exists() else _beside(path, "before")  # it was killed between two renamings
    if not found.exists():
        return None
    state: dict[str, Any] = {**tensors, PLAIN: ""}
    with _quiet():
        state_dict_loader.load(state, checkpoint_id=found, no_dist=processes.size == 1)
    plain: dict[str, Any] = json.loads(state[PLAIN])
    return plain


def remove(path: Path) -> None:
    """At a run's end."""
    path.unlink(missing_ok=True)
    for folder in (path.with_suffix(""), *(_beside(path.with_suffix(""), name) for name in ("part", "before"))):
        shutil.rmtree(folder, ignore_errors=True)


def _beside(path: Path, name: str) -> Path:
    return path.with_name(f"{path.name}.{name}")


@contextmanager
def _quiet() -> Iterator[None]:
    """Without torch's remarks on a single process, and on storages that it is about to change."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _unwritten(path: Path, disk: OSError) -> CheckpointError:
    before = (
        "the previous one is complete, and the same command resumes from it" if path.exists() else "there is none yet"
    )
    return CheckpointError(f"{path} cannot be written ({disk.strerror or disk}): {before}")

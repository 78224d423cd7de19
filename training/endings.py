"""Ends a program with one sentence and no traceback when the cause is something that its user can fix."""

from __future__ import annotations

import errno
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

import torch
import typer
from rich.markup import escape

from rewards.interface import RewardError
from student.bundle import BundleError
from student.families.family import SizeError
from training.checkpoint import CheckpointError
from training.config import ConfigError
from training.disk import NO_ROOM
from training.progress import console
from training.rundir import RunDirError, RunDiverged, RunStopped
from training.termination import Terminated

MISTAKES = (ConfigError, RunDirError, RunDiverged, CheckpointError, BundleError, RewardError, SizeError)
OUTSIDE = (*NO_ROOM, errno.EACCES, errno.EPERM, errno.EROFS)
LESS_MEMORY = (
    "compute.checkpointing=true, gradient.mode=detached, lora.rank=32, or a smaller optim.batch or validation.batch "
    "needs less, and over several GPUs so does compute.shard=true"
)


@contextmanager
def one_sentence(
    code: int = 2,
    less_memory: str = "",
    interrupted: str = "stopped: the same command resumes from the last checkpoint",
) -> Iterator[None]:
    """End the program with exit status ``code`` and one sentence; what only a developer can fix stays a traceback.

    ``less_memory`` says what would need less memory, for when the GPU's is full.
    """
    try:
        yield
    except MISTAKES as error:
        _end(str(error), code)
    except torch.OutOfMemoryError as error:
        _end(": ".join(filter(None, ["the GPU is out of memory", less_memory, _first_line(error)])), code)
    except OSError as error:
        if error.errno not in OUTSIDE:
            raise
        _end(f"{error.filename or 'a file'} cannot be read or written: {error.strerror}", code)
    except (RunStopped, Terminated) as error:
        console.print(str(error), highlight=False)
        raise typer.Exit(128 + signal.SIGTERM) from None
    except KeyboardInterrupt:
        console.print(interrupted)
        raise typer.Exit(130) from None


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [""])[0].partition(". ")[0]


def _end(sentence: str, code: int) -> NoReturn:
    console.print(f"[red]{escape(sentence)}[/red]", highlight=False)
    raise typer.Exit(code) from None

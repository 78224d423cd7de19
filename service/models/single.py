"""The student that is served: its manifest (for the API, which loads no network) and its runtime (for a worker)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from service.errors import StartupError
from service.models.folder import Folder
from service.settings import Settings
from student.bundle import BundleError, Student, read_student
from student.prompts import token_counter
from student.runtimes.runtime import Runtime

if TYPE_CHECKING:
    from student.runtimes.scoring import ScoreFn

SEVERAL = "@models"  # no student can have this id


def open_student(settings: Settings) -> Student:
    """The manifest.

    Raises:
        StartupError: there is no student at ``settings.model``, or its manifest is wrong.
    """
    if settings.is_fake:
        from student.runtimes.fake import fake_student, fake_video_student  # brings numpy, which nothing else needs

        return fake_student() if settings.runtime == "fake" else fake_video_student()
    try:
        return read_student(settings.model)
    except BundleError as error:
        raise StartupError(f"{error}; FEWSTEP_MODEL sets the student to serve.") from error


def queue_name(settings: Settings) -> str:
    """The name of the queue: the student's where one is served.

    Raises:
        StartupError: see ``open_student``.
    """
    return SEVERAL if settings.models else open_student(settings).id


def check_models(settings: Settings) -> None:
    """Return if FEWSTEP_MODELS is not set, or holds a student.

    Raises:
        StartupError: it holds none whose manifest can be read.
    """
    if settings.models is None:
        return
    folder = Folder(settings.models)
    reasons = []
    for name in folder.names():
        try:
            folder.student(name)
        except BundleError as error:
            reasons.append(str(error))
        else:
            return
    why = f"; {reasons[0]}" if reasons else ": each student must be in a folder ID/VERSION of it"
    raise StartupError(f"FEWSTEP_MODELS {settings.models} holds no student{why}.")


def load_runtime(bundle: Path, settings: Settings) -> Runtime:
    """A student's runtime, verified and warmed up.

    Raises:
        BundleError: it cannot be loaded; one sentence that says why.
    """
    from student.runtimes.load import load  # may bring a network library with it
    from student.runtimes.options import Options

    open_reward = None if settings.score == "off" else _open_reward
    options = Options(open_reward, settings.offload, settings.torch_compile, settings.crowded_threads)
    return load(bundle, settings.runtime, settings.thread_count, options)


def _open_reward(name: str) -> ScoreFn:
    """A reward that the bundle names but does not hold compiled: only such a one brings torch into the worker."""
    from rewards.serving import open_reward

    return open_reward(name)


def open_runtime(settings: Settings) -> Runtime:
    """The one student, ready to draw.

    Raises:
        StartupError: it cannot be loaded, with the reason.
    """
    try:
        return load_runtime(settings.model, settings)
    except BundleError as error:
        raise StartupError(f"{error}.") from error


def counter_of(bundle: Path, student: Student, settings: Settings) -> Callable[[str], int]:
    """A function that counts a prompt's tokens; those of the fake student are words.

    Raises:
        BundleError: the student has no tokenizer.
    """
    return (lambda prompt: len(prompt.split())) if settings.is_fake else token_counter(bundle, student.family)

"""The student that is served: its manifest (for the API, which loads no network) and its runtime (for a worker)."""

from __future__ import annotations

from collections.abc import Callable

from tokenizers import Tokenizer

from service.errors import StartupError
from service.settings import Settings
from student.bundle import BundleError, Student, read_student
from student.runtimes.runtime import Runtime


def open_student(settings: Settings) -> Student:
    """The manifest.

    Raises:
        StartupError: there is no student at ``settings.model``, or its manifest is wrong.
    """
    if settings.runtime == "fake":
        from student.runtimes.fake import fake_student  # brings numpy, which no other student needs here

        return fake_student()
    try:
        return read_student(settings.model)
    except BundleError as error:
        raise StartupError(f"{error}; FEWSTEP_MODEL says which one is served.") from error


def open_runtime(settings: Settings) -> Runtime:
    """The student, ready to draw.

    Raises:
        StartupError: it cannot be loaded, with the reason.
    """
    from student.runtimes.load import load  # may bring a network library with it

    try:
        return load(settings.model, settings.runtime, settings.thread_count)
    except BundleError as error:
        raise StartupError(f"{error}.") from error


def token_counter(settings: Settings) -> Callable[[str], int]:
    """A function that counts a prompt's tokens as the encoder that reads all of it would see them.

    That is the second one; the first reads a fixed length of its own and cuts the rest off.

    Raises:
        StartupError: the student has no such tokenizer.
    """
    if settings.runtime == "fake":
        return lambda prompt: len(prompt.split())
    paths = [settings.model / name / "tokenizer.json" for name in ("tokenizer_2", "tokenizer")]
    path = next((path for path in paths if path.is_file()), paths[0])
    if not path.is_file():
        raise StartupError(f"{path} is missing; FEWSTEP_MODEL says which student is served.")
    tokenizer = Tokenizer.from_file(str(path))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return lambda prompt: len(tokenizer.encode(prompt).ids)

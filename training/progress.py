"""The progress of a long run on the terminal."""

from __future__ import annotations

import warnings
from collections.abc import Iterator

from diffusers.utils import logging as diffusers_logging
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers.utils import logging as transformers_logging

console = Console(stderr=True)


def quiet() -> None:
    """Silence libraries' messages that a user cannot act on; real warnings stay."""
    # fp32 norm weights under bf16 autocast are what we want; torch only says that it runs its unfused form.
    warnings.filterwarnings("ignore", "Mismatch dtype between input and weight", UserWarning)
    # FLUX's blocks return views and diffusers changes none in place: gradients equal those of a whole network (tested).
    warnings.filterwarnings("ignore", "FSDP2-wrapped module", UserWarning)
    diffusers_logging.set_verbosity_error()
    transformers_logging.set_verbosity_error()
    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()


def steps(label: str, first: int, last: int, passing: bool = False, shown: bool = True) -> Iterator[int]:
    """Count from ``first`` to ``last - 1`` with a bar that shows the remaining time.

    A ``passing`` bar is erased at its end. Of several processes only one has it ``shown``.
    """
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=passing, disable=not shown) as bar:
        task = bar.add_task(label, total=last, completed=first)
        for step in range(first, last):
            yield step
            bar.advance(task)

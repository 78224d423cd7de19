"""How many workers draw side by side on a machine without a GPU."""

from __future__ import annotations

from service.settings import Settings
from student.runtimes.manifest import OPENED_TWICE, RUNTIMES

MOST_ON_CPU = 4  # workers of a small student; each takes memory and some of the processor also when nothing is asked


def workers_on_cpu(settings: Settings) -> int:
    """One for each of a few cores where the student is small and compiled, else one.

    Calls of one thread side by side draw more pictures than calls of several threads one after the other, and each
    worker holds the student in its own memory.
    """
    graphs = list((settings.model / RUNTIMES).glob("onnx-*/*.onnx"))
    if settings.models is not None or not settings.runtime.startswith(("auto", "onnx")) or not graphs:
        return 1
    small = sum(graph.stat().st_size for graph in graphs) <= OPENED_TWICE
    return min(settings.cores, MOST_ON_CPU) if small else 1

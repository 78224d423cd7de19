"""``python -m training.run`` itself, but a process that ends with its group still open exits with 9.

Left open, gloo aborts one in a few such ends, at random (see ``training.processes.process_group``): no answer key.
"""

from __future__ import annotations

import atexit
import os
import runpy

from torch import distributed

OPEN = 9


def look() -> None:
    if distributed.is_initialized():
        os._exit(OPEN)


if __name__ == "__main__":
    atexit.register(look)
    runpy.run_module("training.run", run_name="__main__")

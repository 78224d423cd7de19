"""The command line of every server of the comparison. Imports only the standard library."""

from __future__ import annotations

import argparse
from dataclasses import dataclass


@dataclass(frozen=True)
class Options:
    """``deadline_s``: after how long a request may be given up, where a server can; 0: never."""

    port: int
    workers: int
    threads: int
    deadline_s: float


def options() -> Options:
    """From the command line."""
    parser = argparse.ArgumentParser()
    for name in ("port", "workers", "threads"):
        parser.add_argument(f"--{name}", type=int, required=True)
    parser.add_argument("--deadline-s", type=float, default=0.0)
    return Options(**vars(parser.parse_args()))

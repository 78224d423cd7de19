"""A run's figures beside its own log: in TensorBoard's files, or by accelerate in Weights & Biases or MLflow.

If a tracker cannot be reached, the run says so once and continues; the figures are in its log.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from accelerate import tracking

PACKAGES = {"wandb": "wandb", "mlflow": "mlflow"}
TRACKERS = ("tensorboard", *PACKAGES)


class Tracker(Protocol):
    """Receives the figures; steps are counted when finished, and figures from before the first one are at 0."""

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Log the figures of one step."""
        ...

    def close(self) -> None:
        """Write what is still buffered."""
        ...


class TensorBoard:
    """Files beside the log; a resumed run drops what it will redo."""

    def __init__(self, log: Path, first_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        folder = log.parent / "tensorboard" / log.stem
        self._board = SummaryWriter(str(folder), purge_step=first_step + 1 if first_step else 0, flush_secs=10)

    def log(self, values: Mapping[str, float], step: int) -> None:
        """See Tracker."""
        for name, value in values.items():
            self._board.add_scalar(name, value, step)

    def close(self) -> None:
        """See Tracker."""
        self._board.close()


class Remote:
    """One of accelerate's trackers; its first failure is reported, and the run continues."""

    def __init__(self, name: str, run: str, config: Mapping[str, Any], say: Callable[[str], None]) -> None:
        self._name, self._say, self._tracker = name, say, None
        kind = {"wandb": tracking.WandBTracker, "mlflow": tracking.MLflowTracker}[name]
        try:
            tracker = kind("fewstep" if name == "wandb" else run)
            tracker.start()
            tracker.store_init_configuration(dict(config))
            self._tracker = tracker
        except Exception as error:  # it talks to somebody else's server
            self._lost(error)

    def log(self, values: Mapping[str, float], step: int) -> None:
        """See Tracker."""
        finite = {name: value for name, value in values.items() if math.isfinite(value)}
        self._ask("log", finite, step=step)

    def close(self) -> None:
        """See Tracker."""
        self._ask("finish")

    def _ask(self, what: str, *args: Any, **kwargs: Any) -> None:
        if self._tracker is None:
            return
        try:
            getattr(self._tracker, what)(*args, **kwargs)
        except Exception as error:
            self._lost(error)

    def _lost(self, error: Exception) -> None:
        self._tracker = None
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        self._say(f"tracker {self._name} cannot be reached, and the run continues without it: {first}")


def remote(name: str, log: Path, config: Mapping[str, Any], say: Callable[[str], None]) -> Tracker | None:
    """The tracker called ``name`` of the run whose log is ``log``; None for TensorBoard, which every log has."""
    return None if name == "tensorboard" else Remote(name, log.parent.parent.name, config, say)

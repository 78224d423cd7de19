"""Options for loading a runtime, beside its name and its threads; without any neural network library."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from student.runtimes.scoring import OpenReward

COMPILES = ("off", "on", "graphs")


@dataclass(frozen=True)
class Options:
    """``open_reward`` opens, by its reward's name, a scorer that the bundle names but has not compiled
    (``rewards.serving.open_reward``); without it such a scorer is left out.

    For the torch runtime on a GPU: ``offload`` says where prompt encoders are kept (see ``placement``), ``compile``
    whether the transformer is compiled, and recorded as CUDA graphs.

    For ONNX Runtime on a CPU: ``crowded_threads`` is the number of threads of a call while other workers of the machine
    are busy too (see ``runtime.CpuSharing``); 0 means no change.
    """

    open_reward: OpenReward | None = None
    offload: str = "auto"
    compile: str = "off"
    crowded_threads: int = 0

"""What a service may ask of the runtimes that it loads, beside their name and their threads; no network library."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from student.runtimes.scoring import OpenReward

COMPILES = ("off", "on", "graphs")


@dataclass(frozen=True)
class Options:
    """``open_reward`` opens, by its reward's name, a scorer that the bundle names but does not hold compiled
    (``rewards.serving.open_reward``); without it such a scorer is left out.

    Of the torch runtime on a GPU: ``offload`` says where prompt encoders wait (see ``placement``), ``compile`` whether
    the transformer is compiled, and recorded as CUDA graphs.

    Of ONNX Runtime on a CPU: ``crowded_threads`` a call has while other workers of the machine draw too (see
    ``session.Company``); 0: as many as at any other time.
    """

    open_reward: OpenReward | None = None
    offload: str = "auto"
    compile: str = "off"
    crowded_threads: int = 0

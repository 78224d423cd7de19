"""The step graph in eight bits: int8 for CPUs, fp8 (E4M3) for GPUs from Ada and Hopper on.

All products of tokens with weights are quantised, except for those that harm the picture, which is measured. Text
encoders and decoder keep the surrounding precision (float32, or bfloat16 for a GPU).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from export.calibrate import Array, Seen, observe
from export.graph import save
from export.narrow import weights_to_float32
from export.qdq import layers, quantised
from export.verify import TOLERANCES
from student.runtimes.session import open_session

PRECISIONS = ("int8", "fp8")
JUDGED = 16  # feeds that the choice is made by; calibration takes all
# Per cent of an input's values that are cut off on each side, so that a few large ones do not make all others coarse.
# Which is best is measured at the answer: the starter student's large values matter, and cutting any off harms it.
CUTS = (0.0, 0.001, 0.01, 0.1)
MARGIN = 0.8  # of the gate's tolerance, which is measured on more images than the choice
NOT_QUANTISED = {
    "the text stage": "it runs once, and every step reads its result",
    "the decoder stage": "its errors are visible in the pixels",
    "products of two activations": "attention weights are small where they matter",
    "Gemm": "times and modulation are a small part of the work, and every token depends on them",
}
LEFT_OUT = "quantised alone, it changes the result by {:.2g}"


@dataclass(frozen=True)
class Choice:
    """The result: the worst relative error with every layer quantised, and with those of ``left_out`` in float32.

    ``sensitivity`` is the error of quantising each layer alone; None if no layer had to be left out.
    """

    count: int
    all_error: float
    error: float
    left_out: tuple[str, ...] = ()
    sensitivity: Mapping[str, float] | None = None

    def reasons(self) -> dict[str, str]:
        """The layers that are not quantised and why, for the manifest."""
        return {name: LEFT_OUT.format((self.sensitivity or {})[name]) for name in self.left_out}

    def __str__(self) -> str:
        kept = f", {len(self.left_out)} left out: relative error {self.error:.2g}" if self.left_out else ""
        return f"{self.count} layers in eight bits: relative error {self.all_error:.2g}{kept}"


def quantise(graph: Path, target: Path, feeds: Iterable[Mapping[str, Any]], precision: str = "int8") -> Choice:
    """Write the quantised form of ``graph``; ``feeds`` are typical inputs for calibration."""
    calibration = list(feeds)
    work = target.with_name(f".{target.stem}.work.onnx")
    model = _float32(graph)
    inputs = sorted({f"{node.inputs[0].name}" for node in layers(model.graph).values() if node.inputs[0]})
    seen = observe(model, inputs, calibration, work)
    judge = _Judge(graph, seen, _spread(calibration), precision, work)
    cut = min(CUTS, key=lambda cut: judge.error((), cut))
    most = MARGIN * TOLERANCES[precision].stage
    choice = choose(list(layers(model.graph)), lambda left_out: judge.error(left_out, cut), most)
    save(quantised(_float32(graph), seen, precision, choice.left_out, cut), target)
    return choice


def choose(names: Sequence[str], error: Callable[[Sequence[str]], float], most: float) -> Choice:
    """Leave out the fewest of the most sensitive layers that keep the error at or below ``most``.

    ``error(left_out)`` measures. Layers are ranked by the error of quantising each alone; the number to leave out is
    found by bisection, so a graph of n layers needs n + log n measurements, or one if all can be quantised.
    """
    everything = error(())
    if everything <= most:
        return Choice(len(names), everything, everything)
    alone = {name: error([other for other in names if other != name]) for name in names}
    ranked = sorted(names, key=lambda name: (-alone[name], name))
    low, high, found = 0, len(names), 0.0
    while low + 1 < high:
        middle = (low + high) // 2
        measured = error(ranked[:middle])
        if measured <= most:
            high, found = middle, measured
        else:
            low = middle
    return Choice(len(names), everything, found, tuple(ranked[:high]), alone)


def _spread(feeds: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """A sample: one more than evenly spaced, so that each of a schedule's sigmas occurs."""
    stride = -(-len(feeds) // JUDGED)
    return [feeds[k * (stride + 1) % len(feeds)] for k in range(min(JUDGED, len(feeds)))]


class _Judge:
    """Measures the result of a graph with some layers quantised against the unquantised one."""

    def __init__(
        self, graph: Path, seen: Mapping[str, Seen], feeds: Sequence[Mapping[str, Any]], precision: str, work: Path
    ) -> None:
        self._graph, self._seen, self._feeds, self._precision, self._work = graph, seen, feeds, precision, work
        self._right = self._answers(_float32(graph))

    def error(self, left_out: Sequence[str], cut: float) -> float:
        """The worst relative norm over the feeds."""
        ours = self._answers(quantised(_float32(self._graph), self._seen, self._precision, left_out, cut))
        gaps = [
            float(np.linalg.norm(mine - right) / np.linalg.norm(right))
            for mine, right in zip(ours, self._right, strict=True)
        ]
        return max(gaps) if np.isfinite(gaps).all() else float("inf")

    def _answers(self, model: ir.Model) -> list[Array]:
        outputs = [f"{value.name}" for value in model.graph.outputs]
        save(model, self._work)
        try:
            session = open_session(self._work, 1)
            return [session.run(outputs[:1], feed)[0] for feed in self._feeds]
        finally:
            for left_over in (self._work, self._work.with_name(f"{self._work.name}.data")):
                left_over.unlink(missing_ok=True)


def _float32(graph: Path) -> ir.Model:
    model = ir.load(graph)
    weights_to_float32(model.graph)
    return model

"""The step graph in eight bits: int8 for CPUs, fp8 (E4M3) for GPUs from Ada and Hopper on.

All products of tokens with weights are quantised, except for those that harm the picture, which is measured. Text
encoders and decoder keep the surrounding precision (float32, or bfloat16 for a GPU).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from export.calibrate import Array, observe, opened
from export.graph import save
from export.narrow import weights_to_float32
from export.qdq import gemms_to_products, layers, quantised
from export.switched import CUT, EIGHT, switched, switches
from export.verify import TOLERANCES, relative_norm

PRECISIONS = ("int8", "fp8")
JUDGED = 16  # feeds that the choice is made by; calibration takes all
RANKED = 2  # of these, the hardest, by which the layers are ranked, each in runs of its own
# Per cent of an input's values that are cut off on each side, so that a few large ones do not make all others coarse.
# Which is best is measured at the answer: the starter student's large values matter, and cutting any off harms it.
CUTS = (0.0, 0.001, 0.01, 0.1)
MARGIN = 0.8  # of the gate's tolerance, which is measured on more images than the choice
NOT_QUANTISED = {
    "the text stage": "it runs once, and every step reads its result",
    "the decoder stage": "its errors are visible in the pixels",
    "products of two activations": "attention weights are small where they matter",
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
    """Write the quantised form of ``graph``; ``feeds`` are typical inputs for calibration.

    However many layers there are, two work copies are written and opened: one to observe and one to choose by.
    """
    calibration = list(feeds)
    work = target.with_name(f".{target.stem}.work.onnx")
    model = _float32(graph)
    names = list(layers(model.graph))
    inputs = sorted({f"{node.inputs[0].name}" for node in layers(model.graph).values() if node.inputs[0]})
    seen = observe(model, inputs, calibration, work)
    judge = _Judge(switched(_float32(graph), seen, precision, CUTS), names, _spread(calibration), work)
    cut = min(CUTS, key=lambda cut: judge.error((), cut))
    hardest = judge.hardest(cut)
    choice = choose(
        names,
        lambda left_out: judge.error(left_out, cut),
        lambda name: judge.error([other for other in names if other != name], cut, hardest),
        most=MARGIN * TOLERANCES[precision].stage,
    )
    save(quantised(_float32(graph), seen, precision, choice.left_out, cut), target)
    return choice


def choose(
    names: Sequence[str], error: Callable[[Sequence[str]], float], alone: Callable[[str], float], most: float
) -> Choice:
    """Leave out the fewest of the most sensitive layers that keep the error at or below ``most``.

    ``error(left_out)`` measures the result, ``alone(name)`` that of quantising one layer, by which they are ranked. (By
    the error of its own product alone, four times as many layers of the starter student would have to be left out.) How
    many is found by bisection, so a graph of n layers needs n + log n measurements, or one if all can be quantised.
    """
    everything = error(())
    if everything <= most:
        return Choice(len(names), everything, everything)
    errors = {name: alone(name) for name in names}
    ranked = sorted(names, key=lambda name: (-errors[name], name))
    low, high, found = 0, len(names), 0.0
    while low + 1 < high:
        middle = (low + high) // 2
        measured = error(ranked[:middle])
        if measured <= most:
            high, found = middle, measured
        else:
            low = middle
    return Choice(len(names), everything, found, tuple(ranked[:high]), errors)


def _spread(feeds: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """A sample in which each of the schedules' sigmas occurs, if it is large enough: they come in cycles, and the
    distance in the sample has no divisor in common with a cycle."""
    count = len(feeds)
    stride = next(stride for stride in range(-(-count // JUDGED), count + 2) if math.gcd(stride, count) == 1)
    return [feeds[k * stride % count] for k in range(min(JUDGED, count))]


class _Judge:
    """Measures the result of a graph with some layers quantised against the unquantised one."""

    def __init__(self, model: ir.Model, names: Sequence[str], feeds: Sequence[Mapping[str, Any]], work: Path) -> None:
        self._names, self._feeds = names, feeds
        self._output = f"{model.graph.outputs[0].name}"
        self._session = opened(model, work)
        self._right = self._answers(names, CUTS[0], range(len(feeds)))

    def error(self, left_out: Sequence[str], cut: float, feeds: Sequence[int] | None = None) -> float:
        """The worst relative norm over all feeds, or these."""
        return max(self._errors(left_out, cut, feeds))

    def hardest(self, cut: float) -> list[int]:
        """The feeds with the largest errors where every layer is quantised."""
        errors = self._errors((), cut)
        return sorted(range(len(errors)), key=lambda index: -errors[index])[:RANKED]

    def _errors(self, left_out: Sequence[str], cut: float, feeds: Sequence[int] | None = None) -> list[float]:
        feeds = range(len(self._feeds)) if feeds is None else feeds
        pairs = zip(self._answers(left_out, cut, feeds), (self._right[index] for index in feeds), strict=True)
        return [relative_norm(ours, right) for ours, right in pairs]

    def _answers(self, left_out: Sequence[str], cut: float, feeds: Sequence[int]) -> list[Array]:
        how = {EIGHT: switches(self._names, left_out), CUT: np.asarray(CUTS.index(cut), np.int64)}
        return [self._session.run([self._output], {**self._feeds[index], **how})[0] for index in feeds]


def _float32(graph: Path) -> ir.Model:
    model = ir.load(graph)
    weights_to_float32(model.graph)
    gemms_to_products(model.graph)
    return model

"""What the inputs of a graph's products are like: measured by running it on inputs like those that it will get."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from export.graph import save
from student.runtimes.session import open_session

Array = NDArray[np.float32]
SAMPLES = 2**14  # values kept of one tensor at one feed


@dataclass
class Seen:
    """Values of one tensor: the least, the most, and evenly spaced samples of each feed."""

    low: float = 0.0
    high: float = 0.0
    samples: list[Array] = field(default_factory=list)

    def look(self, values: Array) -> None:
        """Add the tensor at one feed."""
        flat = values.ravel()
        self.low, self.high = min(self.low, float(flat.min())), max(self.high, float(flat.max()))
        self.samples.append(flat[:: -(-flat.size // SAMPLES)].copy())

    def bounds(self, cut: float) -> tuple[float, float]:
        """Between which values all but ``cut`` per cent on each side lie, zero among them."""
        if cut == 0:
            return self.low, self.high
        low, high = np.percentile(np.concatenate(self.samples), (cut, 100 - cut))
        return min(0.0, float(low)), max(0.0, float(high))


def observe(model: ir.Model, names: Sequence[str], feeds: Iterable[Mapping[str, Any]], work: Path) -> dict[str, Seen]:
    """The values of these tensors of ``model`` over all feeds; ``work`` is a file that is gone afterwards."""
    outputs = list(model.graph.outputs)
    there = {value.name: value for node in model.graph for value in node.outputs}
    model.graph.outputs.extend(there[name] for name in names if name in there and there[name] not in outputs)
    try:
        save(model, work)
        session, computed = open_session(work, 1), [name for name in names if name in there]
        seen = {name: Seen() for name in names}
        for feed in feeds:
            answers = dict(zip(computed, session.run(computed, feed) if computed else (), strict=True))
            for name in names:
                seen[name].look(np.asarray(answers[name] if name in answers else feed[name], np.float32))
    finally:
        del model.graph.outputs[len(outputs) :]
        for left_over in (work, work.with_name(f"{work.name}.data")):
            left_over.unlink(missing_ok=True)
    return seen

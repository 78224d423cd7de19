"""Calibration of eight-bit scales: typical inputs of the step graph, and the values that its products get from them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray

from export.graph import save
from export.request import Request
from student.families.family import Family
from student.noise import noise
from student.runtimes.session import OrtSession, open_session
from student.runtimes.stages import text_outputs
from student.sampler import denoise
from student.tokens import PromptTokens

Array = NDArray[np.float32]
FEED_BATCH = 4
SAMPLES = 2**14  # values kept of one tensor at one feed


@torch.no_grad()
def calibration_feeds(model: Family, request: Request, tokens: PromptTokens) -> Iterator[dict[str, Any]]:
    """Inputs of the step stage along torch's own path from the noise of seeds, at every trained step count."""
    student, names = request.student, text_outputs(request.student.family)
    for first in range(0, len(request.prompts), FEED_BATCH):
        prompts = request.prompts[first : first + FEED_BATCH]
        condition = model.encode_ids(*(torch.from_numpy(ids) for ids in tokens.encode(prompts)))
        parts = [part for part in (condition.tokens_BLE, condition.pooled_BP) if part is not None]
        text = {name: part.numpy() for name, part in zip(names, parts, strict=True)}
        start = torch.from_numpy(noise(range(1000 + first, 1000 + first + len(prompts)), student.latents.shape))
        for steps in student.steps:
            seen: list[dict[str, Any]] = []
            denoise(
                lambda x, sigma, condition=condition: model.velocity(x, sigma, condition),  # type: ignore[misc]
                start,
                student.sigmas[steps],
                _recorder(seen, text),
            )
            yield from seen


def _recorder(seen: list[dict[str, Any]], text: Mapping[str, Any]) -> Callable[[int, float, Any, Any], None]:
    def remember(_: int, sigma: float, x: Any, v: Any) -> None:
        seen.append({"latents": x.numpy(), "sigma": torch.full((len(x),), sigma).numpy(), **text})

    return remember


@dataclass
class Seen:
    """Values of one tensor: the least, the most, and evenly spaced samples of each feed."""

    low: float = 0.0
    high: float = 0.0
    samples: list[Array] = field(default_factory=list)

    def add(self, values: Array) -> None:
        """Add the tensor at one feed."""
        flat = values.ravel()
        self.low, self.high = min(self.low, float(flat.min())), max(self.high, float(flat.max()))
        self.samples.append(flat[:: -(-flat.size // SAMPLES)].copy())

    def bounds(self, cut: float) -> tuple[float, float]:
        """The range of the values without ``cut`` per cent on each side, extended to include zero."""
        if cut == 0:
            return self.low, self.high
        low, high = np.percentile(np.concatenate(self.samples), (cut, 100 - cut))
        return min(0.0, float(low)), max(0.0, float(high))


def observe(model: ir.Model, names: Sequence[str], feeds: Iterable[Mapping[str, Any]], work: Path) -> dict[str, Seen]:
    """The values of these tensors of ``model`` over all feeds; ``work`` is a temporary file."""
    outputs = list(model.graph.outputs)
    there = {value.name: value for node in model.graph for value in node.outputs}
    model.graph.outputs.extend(there[name] for name in names if name in there and there[name] not in outputs)
    session, computed = opened(model, work), [name for name in names if name in there]
    del model.graph.outputs[len(outputs) :]
    seen = {name: Seen() for name in names}
    for feed in feeds:
        answers = dict(zip(computed, session.run(computed, feed) if computed else (), strict=True))
        for name in names:
            seen[name].add(np.asarray(answers[name] if name in answers else feed[name], np.float32))
    return seen


def opened(model: ir.Model, work: Path) -> OrtSession:
    """The model as a session on one thread; ``work`` is a temporary file."""
    try:
        save(model, work)
        return open_session(work, 1)
    finally:
        for left_over in (work, work.with_name(f"{work.name}.data")):
            left_over.unlink(missing_ok=True)

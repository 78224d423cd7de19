"""``python -m benchmarks.serving_memory``: what the torch runtime holds on a GPU, by stage, at full published size.

The runtime's own model (``student.runtimes.torch.TorchModel``) draws on a device that is not there, over networks of
the published sizes whose tensors have shapes and no memory (benchmarks/make_believe.py). A tensor that lies elsewhere,
or has another type than its weights, raises as on a real one. Every allocation is counted while it lives; what a
driver, CUDA's libraries and a fragmented heap take is not: about 1 GB more. ``--write`` puts it into docs/models.md.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import (
    CLIPModel,
)

from benchmarks.full_size import without_weights
from benchmarks.make_believe import DEVICE, Peak, fake_device, kernels, num_bytes, put, unread
from benchmarks.published import CASES, Case
from benchmarks.serving.report import write_between
from benchmarks.train_step import words
from rewards.clip import ClipReward
from rewards.hps import vit_h_14
from rewards.interface import scored
from student.families.family import Family
from student.runtimes.placement import OFFLOADS, TRANSFORMERS, Placement
from student.runtimes.torch import TorchModel

GB = 1e9
DOCUMENT = Path(__file__).resolve().parents[1] / "docs" / "models.md"
BEGIN, END = "<!-- serving memory: begin -->", "<!-- serving memory: end -->"
STAGES = ("encode", "draw", "decode")
DTYPE = torch.bfloat16


@dataclass(frozen=True)
class Row:
    """Bytes: each part's weights, and by offload and stage the most that was alive on the device; of one picture, and
    by their number of several in one call with the last offload."""

    case: Case
    weights: Mapping[str, int]
    peak: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    together: Mapping[int, Mapping[str, int]] = field(default_factory=dict)

    def most(self, offload: str) -> int:
        return max(self.peak[offload].values())


def measure(case: Case, offloads: Sequence[str] = OFFLOADS[1:], batches: Sequence[int] = (), steps: int = 2) -> Row:
    """Draw one picture with each offload, and with the last one ``batches`` of several; what comes out is held to its
    shape and type."""
    row = Row(case, {})
    for offload in offloads:
        with fake_device() as mode, unread(), kernels(), Peak() as peak:
            model = opened(case, offload, mode)
            row.weights.update(_weights(model.family))  # type: ignore[attr-defined]
            for part in (*_transformers(model.family), model.family.vae, *_encoders(model.family)):
                peak.hold(part)
            row.peak[offload] = _drawn(case, model, peak, 1, steps)  # type: ignore[index]
            for batch in batches if offload == offloads[-1] else ():
                row.together[batch] = _drawn(case, model, peak, batch, steps)  # type: ignore[index]
    return row


def opened(case: Case, offload: str, mode: FakeTensorMode) -> TorchModel:
    """The model as ``TorchRuntime`` opens it: types as the placement says, encoders where they wait."""
    return TorchModel(placed(case, offload, mode), Placement(DEVICE, "bfloat16", offload))


def whole(case: Case) -> Family:
    """The family with its encoders, on the meta device."""
    family = without_weights(case.model)
    for name, make in zip(family.encoders, case.encoders, strict=True):
        with torch.device("meta"):
            setattr(family, name, make().requires_grad_(False).eval())
    return family


def placed(case: Case, offload: str, mode: FakeTensorMode) -> Family:
    """The family's parts on the fake device, or where the offload lets them wait."""
    family, place = whole(case), DEVICE if offload == "off" else "cpu"
    experts = [name for name in TRANSFORMERS if getattr(family, name, None) is not None]
    for name in (*experts, "vae", *family.encoders):
        dtype = torch.float32 if name in family.in_float32 else DTYPE
        _put(getattr(family, name), mode, dtype, place if name in family.encoders else DEVICE)
    return family


def _put(part: nn.Module, mode: FakeTensorMode, dtype: torch.dtype, device: str) -> None:
    """Place a part; weights that it holds under two names stay one."""
    places: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in part.modules():
        for name, value in module._parameters.items():
            places.setdefault(id(value), []).append((module, name))
    shared = [found for key, found in places.items() if len(found) > 1 and key != id(None)]
    put(part, mode, dtype, device)
    for (owner, own), *others in shared:
        for module, name in others:
            module._parameters[name] = owner._parameters[own]


def _encoders(family: Family) -> tuple[nn.Module, ...]:
    return tuple(getattr(family, name) for name in family.encoders)


def _transformers(family: Family) -> tuple[nn.Module, ...]:
    return tuple(expert.transformer for expert in family.experts())


def _weights(family: Family) -> dict[str, int]:
    return {
        "encoders": sum(num_bytes(encoder) for encoder in _encoders(family)),
        "transformer": sum(map(num_bytes, _transformers(family))),
        "autoencoder": num_bytes(family.vae),
    }


def _drawn(case: Case, model: TorchModel, peak: Peak, batch: int, steps: int) -> dict[str, int]:
    family, found = model.family, dict.fromkeys(STAGES, 0)

    def watched(stage: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            peak.restart()
            answer = call(*args)
            found[stage] = max(found[stage], peak.most)
            return answer

        return run

    ids_BL = [torch.ones(batch, length, dtype=torch.int64) for length in case.ids]
    x = torch.ones(batch, *family.latent_shape(case.height, case.width, case.frames))
    names = {"encode": model, "draw": family, "decode": family}
    calls = {"encode": "encode", "draw": "velocity", "decode": "decode"}
    with contextlib.ExitStack() as stack:
        for stage, owner in names.items():
            call = getattr(owner, calls[stage])
            stack.enter_context(patch.object(owner, calls[stage], watched(stage, call)))
        images = model.draw(ids_BL, x, tuple(1 - k / steps for k in range(steps)))
        for expert in family.experts()[1:]:  # a fake sigma has no number to choose by: each is called once more
            with torch.no_grad():
                watched("draw", expert.velocity)(x.to(DEVICE), 0.5, model.encode(ids_BL))
    frames = (case.frames,) if case.frames > 1 or family.name == "wan" else ()
    expected = (batch, *frames, 3, case.height, case.width)
    if tuple(images.shape) != expected or images.dtype != torch.float32 or images.device.type != DEVICE:
        raise AssertionError(f"{case.name}: {tuple(images.shape)} {images.dtype} on {images.device}, not {expected}")
    return found


def scored_with(side: int = 1024, batch: int = 1) -> dict[str, int]:
    """Weights and peak of a published reward of CLIP ViT-H/14 (HPS v2.1, PickScore) beside nothing else."""
    with fake_device() as mode, unread(), kernels(), Peak() as peak:
        with torch.device("meta"):
            clip = CLIPModel(vit_h_14()).requires_grad_(False).eval()
        put(clip, mode, torch.float32)
        reward = ClipReward(clip, words, fit="pad")
        peak.hold(clip)
        with torch.inference_mode(False), torch.no_grad():
            score_B = scored("hpsv2.1", reward, torch.ones(batch, 3, side, side), ["a prompt"] * batch, DEVICE)
        if tuple(score_B.shape) != (batch,) or score_B.dtype != torch.float32:
            raise AssertionError(f"scores are {tuple(score_B.shape)} {score_B.dtype}")
        return {"weights": num_bytes(clip), "peak": peak.most}


def table(rows: Sequence[Row], reward: Mapping[str, int]) -> str:
    """The rows as a table of docs/models.md, in GB."""
    head = (
        "| model, one picture | encoders | transformer | autoencoder | all on the GPU: encode, draw, decode "
        "| encoders visit | encoders on the CPU |\n| --- | --: | --: | --: | --: | --: | --: |"
    )
    lines = [head, *(line(row) for row in rows)]
    said = f"A reward of ViT-H/14 in float32 (HPS v2.1, PickScore) adds {reward['weights'] / GB:.1f} GB and takes "
    lines += [
        "",
        said + f"{(reward['peak'] - reward['weights']) / GB:.2f} more while it looks at a picture of 1024 px.",
    ]
    return "\n".join(lines)


def line(row: Row) -> str:
    """One row of the table."""
    weights = " | ".join(f"{row.weights[part] / GB:.1f}" for part in ("encoders", "transformer", "autoencoder"))
    stages = ", ".join(f"{row.peak['off'][stage] / GB:.1f}" for stage in STAGES)
    rest = " | ".join(f"**{row.most(offload) / GB:.1f}**" for offload in OFFLOADS[2:])
    return f"| {row.case.name}, {row.case.size} | {weights} | {stages}: **{row.most('off') / GB:.1f}** | {rest} |"


def main(arguments: Sequence[str]) -> None:
    """Measure every case, print the table, and with ``--write`` put it into the document."""
    rows = []
    for case in CASES:
        rows.append(measure(case))
        print(line(rows[-1]), flush=True)
    text = table(rows, scored_with())
    print(text)
    if "--write" in arguments:
        write_between(DOCUMENT, text, BEGIN, END)


if __name__ == "__main__":
    main(sys.argv[1:])
    sys.stdout.flush()
    os._exit(0)  # see benchmarks/make_believe.py

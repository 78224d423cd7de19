"""A stage without a compiled form, run in torch between compiled stages."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from student.bundle import Student
from student.families.find import family_of_student
from student.families.stages import Step, stage_modules
from student.pipeline import open_pipeline
from student.runtimes.experts import STEPS
from student.runtimes.manifest import DECODER, TEXT
from student.runtimes.stages import text_outputs


class TorchStage:
    """One module with the interface of ``Session``: numpy in, numpy out."""

    def __init__(self, module: nn.Module, outputs: Sequence[str], device: str) -> None:
        self._module, self._outputs, self._device = module, tuple(outputs), device

    @torch.inference_mode()
    def run(self, output_names: Sequence[str], feed: Mapping[str, Any], /) -> list[Any]:
        """See ``Session``; the inputs are in the module's order."""
        inputs = [torch.from_numpy(np.ascontiguousarray(array)).to(self._device) for array in feed.values()]
        answer = self._module(*inputs)
        answers = dict(zip(self._outputs, answer if isinstance(answer, tuple) else (answer,), strict=True))
        return [answers[name].float().cpu().numpy() for name in output_names]


def torch_stages(
    bundle: Path, student: Student, names: Collection[str], threads: int, device: str = "cpu"
) -> dict[str, TorchStage]:
    """These stages of the bundle's own pipeline; a torch stage works at every size, so buckets share it."""
    if not names:
        return {}
    torch.set_num_threads(threads)
    model = family_of_student(open_pipeline(bundle), student).to(device)
    modules = {**stage_modules(model), **dict.fromkeys(STEPS, Step(model))}  # which calls the right expert itself
    outputs = {TEXT: text_outputs(student.family), **dict.fromkeys(STEPS, ("velocity",)), DECODER: ("images",)}
    stages = {name.partition("-")[0] for name in names}
    return {stage: TorchStage(modules[stage], outputs[stage], device) for stage in sorted(stages)}

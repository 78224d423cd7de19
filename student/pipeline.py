"""A student's diffusers pipeline on disk, and how diffusers itself draws what the service draws (needs torch)."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline
from diffusers.utils import logging as diffusers_log
from numpy.typing import NDArray
from transformers.utils import logging as transformers_log

from student.bundle import Student
from student.noise import noise
from student.sampler import pack


def open_pipeline(bundle: Path) -> Any:
    """The bundle's pipeline in float32, ready to infer, without a progress bar."""
    with _quiet():
        pipe = DiffusionPipeline.from_pretrained(  # type: ignore[no-untyped-call]
            bundle, dtype=torch.float32, local_files_only=True
        )
    pipe.set_progress_bar_config(disable=True)
    for module in (part for part in pipe.components.values() if isinstance(part, torch.nn.Module)):
        module.requires_grad_(False).eval()
    return pipe


def save_pipeline(pipe: Any, bundle: Path) -> None:
    """Write the pipeline with its weights rounded to float16 (in ``pipe`` too), to be opened in float32.

    transformers would open text encoders in the type that it saved them in while diffusers opens the rest in float32,
    and the two do not meet; so their config says float32, whatever the file holds.

    Raises:
        ValueError: a weight that is not finite in float16.
    """
    modules = {name: part for name, part in pipe.components.items() if isinstance(part, torch.nn.Module)}
    for name, module in modules.items():
        _halve(module, name)
    pipe.save_pretrained(bundle)
    readable = (bundle / "model_index.json").stat().st_mode
    for weights in bundle.rglob("*.safetensors"):
        weights.chmod(readable)  # they come out readable by their owner alone, who need not be the one that serves
    for module in modules.values():
        torch.nn.Module.float(module)
    for path in [bundle / "model_index.json", *(bundle / name / "config.json" for name in modules)]:
        config = json.loads(path.read_text("utf-8"))
        config.pop("_name_or_path", None)  # where it was opened from is a path of the machine that saved it
        if "dtype" in config:
            config["dtype"] = "float32"
        path.write_text(json.dumps(config, indent=2) + "\n", "utf-8")


def reproduce(
    pipe: Any, student: Student, prompts: Sequence[str], seeds: Sequence[int], steps: int
) -> NDArray[np.float32]:
    """images_BCHW in [0, 1], drawn by the diffusers pipeline's own loop from the seeds' noise."""
    latents = torch.from_numpy(noise(seeds, student.latents.shape))
    images_BHWC = pipe(
        list(prompts),
        num_inference_steps=steps,
        sigmas=list(student.sigmas[steps]),
        latents=pack(latents).to(pipe.device, pipe.transformer.dtype),
        height=student.image.height,
        width=student.image.width,
        max_sequence_length=student.max_tokens,
        output_type="np",
        **student.baked,
    ).images
    return np.ascontiguousarray(images_BHWC.transpose(0, 3, 1, 2))


def _halve(module: torch.nn.Module, name: str) -> None:
    for key, value in module.state_dict().items():
        if value.is_floating_point() and not value.half().isfinite().all():
            raise ValueError(f"{name}.{key} holds values that are not finite in float16")
    torch.nn.Module.half(module)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """No progress bars of a second's work, and no remarks on packages and classes that are not used here."""
    logs = (diffusers_log, transformers_log)
    levels = [log.get_verbosity() for log in logs]
    for log in logs:
        log.set_verbosity_error()
    diffusers_log.disable_progress_bar()
    transformers_log.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        for log, level in zip(logs, levels, strict=True):
            log.set_verbosity(level)
        diffusers_log.enable_progress_bar()
        transformers_log.enable_progress_bar()  # type: ignore[no-untyped-call]

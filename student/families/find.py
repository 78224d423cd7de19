"""Finds the family of a diffusers pipeline."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from student.bundle import BundleError, Student
from student.families.family import Family
from student.families.flux import Flux
from student.families.flux2 import Flux2
from student.families.qwen_image import QwenImage
from student.families.sd3 import SD3
from student.families.wan import Wan
from student.families.z_image import ZImage
from student.pipeline import open_pipeline, read_index

FAMILIES: Mapping[str, type[Family]] = {
    "FluxPipeline": Flux,
    "Flux2KleinPipeline": Flux2,
    "QwenImagePipeline": QwenImage,
    "StableDiffusion3Pipeline": SD3,
    "WanPipeline": Wan,
    "ZImagePipeline": ZImage,
}


def open_family(
    source: str | Path,
    dtype: torch.dtype = torch.float32,
    *,
    local_files_only: bool = False,
    parts: Mapping[str, Any] | None = None,
    **options: Any,
) -> Family:
    """Open the pipeline of a folder or hub id; its class is checked before any weights are read.

    ``parts`` replaces components (``{"text_encoder_3": None, "tokenizer_3": None}`` opens SD3 without T5);
    ``options`` go to the family: ``max_tokens``, and ``guidance`` for FLUX.1-dev. A family may keep a part of the
    pipeline in float32 whatever ``dtype`` says.

    Raises:
        BundleError: no pipeline there, or one of a class that is not supported.
    """
    family = _family_of_class(str(read_index(source, local_files_only).get("_class_name")), source)
    types = {"default": dtype, **dict.fromkeys(family.in_float32, torch.float32)}
    pipe = open_pipeline(source, types if family.in_float32 else dtype, local_files_only, **(parts or {}))
    return family(pipe, **options)


def family_of(pipe: Any, **options: Any) -> Family:
    """The family of an opened pipeline; ``options`` as for ``open_family``.

    Raises:
        BundleError: its class is not supported.
    """
    return _family_of_class(type(pipe).__name__, "this")(pipe, **options)


def family_of_student(pipe: Any, student: Student) -> Family:
    """The family of a student's own pipeline, with the ``baked`` arguments of its manifest.

    Raises:
        BundleError: the student needs something that its family cannot do in one call per step.
    """
    options: dict[str, Any] = {"max_tokens": student.max_tokens}
    if student.family == Flux.name:
        return family_of(pipe, guidance=student.baked.get("guidance_scale"), **options)
    family = family_of(pipe, **options)
    for name, value in student.baked.items():
        if value != (without := family.baked.get(name, 1.0)):
            raise BundleError(
                f"baked.{name} is {value}: accepted for the family {student.family} is {without:g}, no guidance"
            )
    return family


def _family_of_class(name: str, source: str | Path) -> type[Family]:
    if name in FAMILIES:
        return FAMILIES[name]
    supported = ", ".join(FAMILIES)
    near = max((one for one in FAMILIES if name.startswith(_kind(one))), key=len, default=None)
    if near is not None:
        raise BundleError(
            f"{source} is a {name}: of its kind only {near}, text to image or video, is supported; in all, {supported}"
        )
    raise BundleError(f"{source} is a {name}: supported are {supported}")


def _kind(name: str) -> str:
    """What the names of a family's pipelines begin with; klein is the small FLUX.2."""
    return name.removesuffix("Pipeline").removesuffix("Klein")

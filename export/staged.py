"""A student in three graphs (text encoders, one step, decoder); the loop over the steps stays outside.

A family of two experts has a step of each, as far as the student's sigmas reach them.

So one set of files serves every step count, and a call can be watched and stopped between steps.
Legend: B images or videos, C latent channels, H x W latent cells, L tokens, E token features, P pooled features.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from export.errors import ExportError
from export.graph import Part, Signature
from student.bundle import Student
from student.families.family import Family, SizeError
from student.families.resized import resized
from student.families.stages import stage_modules
from student.runtimes.experts import stages_of
from student.runtimes.manifest import DECODER, TEXT, Sigmas
from student.runtimes.sizes import Size, size_name, stage_name
from student.runtimes.stages import text_outputs
from student.tokens import PromptTokens


def bucket(model: Family, student: Student, size: Size) -> Student:
    """The student at another size, with that size's sigmas.

    Raises:
        ExportError: the family does not support it.
    """
    try:
        return resized(model, student, size)
    except SizeError as error:
        raise ExportError(f"{size_name(size)} is not a size of the family {student.family}: {error}") from error


def bucket_sigmas(model: Family, student: Student, sizes: Sequence[Size]) -> dict[str, Sigmas]:
    """By the name of each size, its sigmas; empty if they do not depend on the size."""
    return {} if student.schedule is None else {size_name(size): bucket(model, student, size).sigmas for size in sizes}


def staged_parts(model: Family, student: Student, tokens: PromptTokens, sizes: Sequence[Size] = ()) -> dict[str, Part]:
    """The parts to export, by stage; ``model`` is the student's in float32, ``sizes`` are those beside its own."""
    t5 = getattr(model, model.encoders[-1])
    if t5 is not None:
        t5.set_attn_implementation("eager")  # T5's sdpa has not always decomposed
    ids = {name: torch.from_numpy(rows) for name, rows in zip(tokens.names, tokens.encode(["a", "b c"]), strict=True)}
    sigma_B = torch.ones(2)
    names, modules = text_outputs(student.family), stage_modules(model)
    with torch.no_grad():
        text = dict(zip(names, modules[TEXT](*ids.values()), strict=True))
    wanted: dict[str, tuple[str, Mapping[str, Tensor], tuple[str, ...]]] = {TEXT: (TEXT, ids, names)}
    for size in (None, *sizes):
        at = student if size is None else bucket(model, student, size)
        x = torch.zeros(2, *at.latents.shape)
        for stage in stages_of(at, model.boundary)[1:-1]:
            wanted[stage_name(stage, size)] = (stage, {"latents": x, "sigma": sigma_B, **text}, ("velocity",))
        wanted[stage_name(DECODER, size)] = (DECODER, {"latents": x}, ("images",))
    metadata = {"student": f"{student.id} {student.version}", "source_sha256": student.fingerprint()}
    return {
        name: Part(modules[stage], Signature(f"{student.id}-{name}", inputs, outputs), metadata | {"stage": name})
        for name, (stage, inputs, outputs) in wanted.items()
    }

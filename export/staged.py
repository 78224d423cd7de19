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
from student.runtimes.buckets import Bucket, stage_name
from student.runtimes.experts import stages_of
from student.runtimes.manifest import DECODER, TEXT, Sigmas
from student.runtimes.stages import text_outputs
from student.tokens import PromptTokens


def in_bucket(model: Family, student: Student, bucket: Bucket) -> Student:
    """The student at another size or length, with the sigmas that it has there.

    Raises:
        ExportError: the family does not support it.
    """
    try:
        return resized(model, student, *bucket)
    except SizeError as error:
        raise ExportError(f"{bucket.name} is not a size of the family {student.family}: {error}") from error


def bucket_sigmas(model: Family, student: Student, buckets: Sequence[Bucket]) -> dict[str, Sigmas]:
    """By the name of each bucket, its sigmas; empty if they do not depend on the size."""
    if student.schedule is None:
        return {}
    return {bucket.name: in_bucket(model, student, bucket).sigmas for bucket in buckets}


def staged_parts(
    model: Family, student: Student, tokens: PromptTokens, buckets: Sequence[Bucket] = ()
) -> dict[str, Part]:
    """The parts to export, by stage; ``model`` is the student's in float32."""
    t5 = getattr(model, model.encoders[-1])
    if t5 is not None:
        t5.set_attn_implementation("eager")  # T5's sdpa has not always decomposed
    ids = {name: torch.from_numpy(rows) for name, rows in zip(tokens.names, tokens.encode(["a", "b c"]), strict=True)}
    sigma_B = torch.ones(2)
    names, modules = text_outputs(student.family), stage_modules(model)
    with torch.no_grad():
        text = dict(zip(names, modules[TEXT](*ids.values()), strict=True))
    wanted: dict[str, tuple[str, Mapping[str, Tensor], tuple[str, ...]]] = {TEXT: (TEXT, ids, names)}
    for bucket in (None, *buckets):
        at = student if bucket is None else in_bucket(model, student, bucket)
        x = torch.zeros(2, *at.latents.shape)
        for stage in stages_of(at, model.boundary)[1:-1]:
            wanted[stage_name(stage, bucket)] = (stage, {"latents": x, "sigma": sigma_B, **text}, ("velocity",))
        wanted[stage_name(DECODER, bucket)] = (DECODER, {"latents": x}, ("images",))
    metadata = {"student": f"{student.id} {student.version}", "source_sha256": student.fingerprint()}
    return {
        name: Part(modules[stage], Signature(f"{student.id}-{name}", inputs, outputs), metadata | {"stage": name})
        for name, (stage, inputs, outputs) in wanted.items()
    }

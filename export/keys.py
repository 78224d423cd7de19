"""What an export depends on: the key of each graph and of a whole runtime, by which they are found again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict

from export.graph import OPSET
from export.preflight import boundary_of
from export.quantise import PRECISIONS as QUANTISED
from export.request import Request
from export.store import CONVERTED, Store, key_of
from export.targets import Target
from student.runtimes.buckets import stage_name
from student.runtimes.manifest import STAGE_NAMES, STEP_2


def stage_keys(request: Request) -> dict[str, str]:
    """The key of each graph: all that its float32 form is made from."""
    student = request.student
    names = _stages(request) if request.form == "staged" else [f"{steps}-steps" for steps in student.steps]
    return {
        name: key_of({"student": student.fingerprint(), "id": f"{student.id} {student.version}", "graph": name})
        for name in names
    }


def _stages(request: Request) -> list[str]:
    single = boundary_of(request.bundle) is None
    stages = [stage for stage in STAGE_NAMES if not (single and stage == STEP_2)]
    return list(dict.fromkeys(stage_name(stage, bucket) for bucket in (None, *request.buckets) for stage in stages))


def cache_key(request: Request, target: Target, keys: Mapping[str, str]) -> str:
    """sha256 of all that a runtime depends on: graphs, precision, profiles, options, libraries, machine, and in eight
    bits the prompts, whose values its scales follow from."""
    options = {name: value for name, value in asdict(request.engine).items() if name != "memory_bytes"}
    parts = [dict(keys), target.name, request.form, request.precision, OPSET, options, target.requires(request)]
    if request.precision in QUANTISED:
        parts.append(request.prompts)
    return key_of(parts, CONVERTED)


def finished(request: Request) -> Sequence[str]:
    """The graphs that a run would reuse."""
    store = Store(request.bundle)
    return [name for name, key in stage_keys(request).items() if store.find(key)]

"""The API that clients were written for: every operation with its parameters, their bounds and defaults, the statuses
that it answers with; the bounds of every field of a body; the fields of every answer (?: one that may be missing).

They are written down in contract.txt. A change there is one that users notice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from service.http.app import build_app
from service.settings import Settings

CONTRACT = Path(__file__).with_name("contract.txt")
BODIES = ("FeedbackRequest", "ImagesRequest")
EDGES = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<", "minLength": "length >=",
         "maxLength": "length <=", "minItems": "items >=", "maxItems": "items <=", "pattern": "~"}  # fmt: skip


def description() -> dict[str, Any]:
    return build_app(Settings(runtime="fake", data_dir=Path("/nowhere"))).openapi()


def bounds(schema: Mapping[str, Any]) -> list[str]:
    """What a schema takes, in words; of several alternatives, all."""
    if "anyOf" in schema:
        return [word for one in schema["anyOf"] if one.get("type") != "null" for word in bounds(one)]
    words = [f"{sign} {schema[name]:g}" if isinstance(schema[name], float | int) else f"{sign} {schema[name]}"
             for name, sign in EDGES.items() if name in schema]  # fmt: skip
    words += ["|".join(schema["enum"])] if "enum" in schema else []
    return words + (bounds(schema["items"]) if "items" in schema else [])


def parameter(name: str, schema: Mapping[str, Any], required: bool) -> str:
    default = "" if required else f"={schema['default']}" if schema.get("default") is not None else "?"
    return f"{name}{default} {' '.join(bounds(schema))}".strip()


def operations(api: Mapping[str, Any]) -> Iterator[str]:
    for path, methods in api["paths"].items():
        for method, operation in methods.items():
            wanted = operation.get("parameters", ())
            asked = "; ".join(parameter(each["name"], each["schema"], each["required"]) for each in wanted)
            yield f"{method.upper()} {path} ({asked}) {' '.join(sorted(operation['responses']))}"


def fields(api: Mapping[str, Any]) -> Iterator[str]:
    bodies = {body: api["components"]["schemas"][body] for body in BODIES}
    video = api["paths"]["/v1/videos"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    for body, schema in {**bodies, "/v1/videos": video}.items():
        for name, field in schema["properties"].items():
            yield f"{body}.{parameter(name, field, name in schema.get('required', ()))}"


def answers(api: Mapping[str, Any]) -> Iterator[str]:
    for name, schema in sorted(api["components"]["schemas"].items()):
        if not name.endswith("Request") and "properties" in schema:
            always = schema.get("required", ())
            words = [field if field in always else f"{field}?" for field in schema["properties"]]
            yield f"{name}: {' '.join(words)}"


@pytest.mark.parametrize(("part", "lines"), list(enumerate((operations, fields, answers))))
def test_the_api_is_as_clients_know_it(part: int, lines: Callable[[Mapping[str, Any]], Iterator[str]]) -> None:
    """Bounds of /generate's fields are tried one by one in test_schema.py."""
    agreed = CONTRACT.read_text("utf-8").split("\n\n")[part].strip().splitlines()
    assert list(lines(description())) == agreed, f"if that is meant, {CONTRACT.name} and CHANGELOG.md say so"

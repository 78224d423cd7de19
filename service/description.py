"""The description of the API at /openapi.json, where FastAPI's own guess is wrong."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

OPENAI_PATHS = ("/v1/images/generations",)


def describe(app: FastAPI) -> None:
    """Have the app describe itself as it is."""

    def description() -> dict[str, Any]:
        if app.openapi_schema is None:
            found = get_openapi(title=app.title, version=app.version, description=app.description, routes=app.routes)
            app.openapi_schema = _corrected(found)
        return app.openapi_schema

    app.openapi = description  # type: ignore[method-assign]


def _corrected(schema: dict[str, Any]) -> dict[str, Any]:
    """A wrong field is answered 400 where OpenAI's clients ask, and everywhere in our own form of an error."""
    for path in OPENAI_PATHS:
        for operation in schema["paths"][path].values():
            operation["responses"].pop("422", None)
    for operations in schema["paths"].values():
        for operation in operations.values():
            for response in operation["responses"].values():
                for content in response.get("content", {}).values():
                    if "error" in content.get("example", {}):
                        content["example"]["error"].setdefault("param", None)  # FastAPI drops it
    for name in ("HTTPValidationError", "ValidationError"):
        schema["components"]["schemas"].pop(name, None)
    return schema

"""The OpenAPI description: FastAPI's, corrected, with the scope that ``service.http.access`` requires of each route."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI

from service.http.access import needed_scope
from service.http.responses import error_responses

VIDEOS_PATH = "/v1/videos"
OPENAI_PATHS = ("/v1/images/generations", VIDEOS_PATH)
SCHEME = {
    "type": "http",
    "scheme": "bearer",
    "description": "Created with fewstep keys create; required once one exists. Each operation names its scope.",
}


class DescribedApp(FastAPI):
    """An application whose OpenAPI description says which routes need a key, and what they really return."""

    def openapi(self) -> dict[str, Any]:
        if self.openapi_schema is None:
            schema = super().openapi()
            schema.setdefault("components", {})["securitySchemes"] = {"ApiKey": SCHEME}
            for path, operations in schema["paths"].items():
                for method, operation in operations.items():
                    _secure(operation, needed_scope(method.upper(), path))
            _correct(schema)
        return super().openapi()


def _secure(operation: dict[str, Any], scope: str | None) -> None:
    if scope is None:
        operation["security"] = []
        return
    # The empty one: while the service has no keys, none is needed.
    operation["security"] = [{}, {"ApiKey": []}]
    operation["description"] = f"{operation.get('description', '')}\n\nScope of the key: {scope}.".strip()
    for status, response in error_responses(401, 403).items():
        schema = {"$ref": f"#/components/schemas/{response['model'].__name__}"}
        content = {"application/json": {"schema": schema, **response["content"]["application/json"]}}
        operation["responses"][str(status)] = {"description": response["description"], "content": content}


def _correct(schema: dict[str, Any]) -> None:
    """A wrong field gets a 400 on OpenAI's routes, and everywhere our own error body."""
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

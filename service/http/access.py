"""Authorisation: every route needs a key with the right scope, unless it is listed as public."""

from __future__ import annotations

import re
from functools import cache

from starlette.datastructures import Headers, QueryParams
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import compile_path
from starlette.types import ASGIApp, Receive, Scope, Send

from service.errors import Forbidden, ServiceError, Unauthorized, error_body
from service.http.trust import check_keyless, is_local
from service.keys import SCOPES, Key, KeyStore, usual_priority
from service.observe.context import ANONYMOUS, current_request
from service.settings import Settings

PUBLIC = ("/", "/page/{name}", "/favicon.ico", "/docs", "/healthz", "/readyz")
# (method, path) → scope. A route that is not listed needs admin, so that one forgotten here is closed, not open.
SCOPE_OF = {
    ("POST", "/generate"): "generate",
    ("POST", "/v1/images/generations"): "generate",
    ("POST", "/v1/videos"): "generate",
    ("POST", "/v1/videos/{id}/{action}"): "generate",
    ("GET", "/v1/videos"): "read",
    ("GET", "/v1/videos/{id}"): "read",
    ("DELETE", "/v1/videos/{id}"): "generate",
    ("GET", "/v1/videos/{id}/content"): "read",
    ("POST", "/jobs/{id}/cancel"): "generate",
    ("POST", "/jobs/{id}/feedback"): "generate",
    ("GET", "/jobs"): "read",
    ("GET", "/jobs/{id}"): "read",
    ("GET", "/jobs/{id}/events"): "read",
    ("GET", "/jobs/{id}/images/{k}"): "read",
    ("GET", "/v1/models"): "read",
    ("GET", "/v1/models/{model}"): "read",
    ("GET", "/info"): "read",
    ("GET", "/openapi.json"): "read",
    ("GET", "/metrics"): "metrics",
    ("GET", "/admin/models"): "admin",
    ("POST", "/admin/models/{model}/{version}/load"): "admin",
    ("POST", "/admin/models/{model}/{version}/promote"): "admin",
    ("POST", "/admin/models/{model}/{version}/unload"): "admin",
    ("GET", "/admin/usage"): "admin",
    ("GET", "/admin/feedback"): "admin",
    ("POST", "/admin/feedback/erase"): "admin",
    ("GET", "/admin/canaries"): "admin",
    ("POST", "/admin/canaries/{model}/{version}/start"): "admin",
    ("POST", "/admin/canaries/{model}/{version}/stop"): "admin",
    ("GET", "/admin/drift"): "admin",
    ("GET", "/admin/workers"): "admin",
    ("POST", "/admin/workers/{id}/pause"): "admin",
    ("POST", "/admin/workers/{id}/resume"): "admin",
    ("POST", "/admin/workers/{id}/drain"): "admin",
    ("GET", "/admin/dlq"): "admin",
    ("POST", "/admin/dlq/{id}/retry"): "admin",
    ("POST", "/admin/dlq/{id}/drop"): "admin",
}
OTHERWISE = "admin"
OPEN_SCOPES = ("generate", "read", "metrics")  # of a service without keys, for other machines
CHALLENGE = 'Bearer realm="fewstep"'


def needed_scope(method: str, path: str) -> str | None:
    """The scope that a request needs; None if it needs no key."""
    asked = "GET" if method == "HEAD" else method
    if asked == "GET" and any(_matches(template, path) for template in PUBLIC):
        return None
    found = [scope for (listed, template), scope in SCOPE_OF.items() if listed == asked and _matches(template, path)]
    return found[0] if found else OTHERWISE


async def operator(request: Request) -> None:
    """A dependency of the operator's routes: they need a key with the scope admin; without keys, a local request.

    Raises:
        Forbidden: there is no key in the service, and the request comes from elsewhere or through a proxy.
    """
    if "admin" not in request.state.scopes:
        raise Forbidden(
            "This address is for the operator: call it on the service's own machine, or with a key of scope admin."
        )


class Access:
    """Lets a request pass that is allowed, and notes whose it is: ``state.key`` (an id), ``state.scopes``, and what it
    may ask for, ``state.highest_priority``.

    Without a file of keys this machine may do everything; others reach the service only if the operator said
    --insecure, and then they may draw and read.
    """

    def __init__(self, app: ASGIApp, keys: KeyStore, settings: Settings) -> None:
        self._app = app
        self._keys = keys
        self._settings = settings

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            return await self._app(scope, receive, send)
        try:
            key = self._admit(scope)
        except ServiceError as error:
            body = error_body(error, scope["state"]["request_id"])
            return await JSONResponse(body, error.status, headers=error.headers)(scope, receive, send)
        scopes = key.scopes if key else () if self._keys.required else SCOPES if is_local(scope) else OPEN_SCOPES
        highest = key.highest_priority if key else usual_priority(scopes)
        scope["state"].update(
            key=key.id if key else ANONYMOUS, scopes=scopes, keyed=self._keys.required, highest_priority=highest
        )
        if key and (info := current_request.get()):
            info.key, info.quota, info.allow_training = key.id, key.quota, key.allow_training
        await self._app(scope, receive, send)

    def _admit(self, scope: Scope) -> Key | None:
        """The key of the request, if it has one.

        Raises:
            Unauthorized, Forbidden
        """
        needed = None if _is_link(scope) else needed_scope(scope.get("method", ""), scope["path"])
        if not self._keys.required:
            if needed is not None:
                check_keyless(scope, self._settings)
            return None
        header = Headers(scope=scope).get("authorization", "")
        kind, _, presented = header.partition(" ")
        key = self._keys.find(presented.strip()) if kind.lower() == "bearer" else None
        if needed is None or (key and needed in key.scopes):
            return key
        if key:
            raise Forbidden(
                f"This API key may not do that: it lacks the scope {needed}.",
                headers={"WWW-Authenticate": f'{CHALLENGE}, error="insufficient_scope", scope="{needed}"'},
            )
        if header:
            message = "This API key is not valid: it is unknown, revoked or malformed."
            raise Unauthorized(message, headers={"WWW-Authenticate": f'{CHALLENGE}, error="invalid_token"'})
        message = "An API key is needed: send the header Authorization: Bearer KEY."
        raise Unauthorized(message, code="missing_api_key", headers={"WWW-Authenticate": CHALLENGE})


def _is_link(scope: Scope) -> bool:
    """Whether a request came by a signed link to a picture, which the route checks."""
    if scope.get("method") not in ("GET", "HEAD") or not _matches("/jobs/{id}/images/{k}", scope["path"]):
        return False
    return "signature" in QueryParams(scope.get("query_string", b""))


def _matches(template: str, path: str) -> bool:
    return _regex(template).match(path) is not None


@cache
def _regex(template: str) -> re.Pattern[str]:
    return compile_path(template)[0]

"""The web page, the API documentation, and their files."""

from __future__ import annotations

from pathlib import Path

from fastapi import APIRouter
from starlette.responses import FileResponse

from service.errors import NotFound

FOLDER = Path(__file__).resolve().parents[2] / "page"
ASSETS = {
    "style.css": "text/css",
    "draw.css": "text/css",
    "key.css": "text/css",
    "key.js": "text/javascript",
    "page.js": "text/javascript",
    "api.js": "text/javascript",
    "dom.js": "text/javascript",
    "gallery.js": "text/javascript",
    "health.js": "text/javascript",
    "panel.js": "text/javascript",
    "quality.js": "text/javascript",
    "snippets.js": "text/javascript",
    "viewer.js": "text/javascript",
    "docs.js": "text/javascript",
    "icon.svg": "image/svg+xml",
}
HEADERS = {
    "Cache-Control": "no-cache",
    "Content-Security-Policy": "default-src 'self'; img-src 'self' data: blob:; media-src 'self' data: blob:; "
    "frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}

router = APIRouter(include_in_schema=False)


@router.api_route("/", methods=["GET", "HEAD"])
async def index() -> FileResponse:
    return FileResponse(FOLDER / "index.html", headers=HEADERS)


@router.api_route("/docs", methods=["GET", "HEAD"])
async def docs() -> FileResponse:
    return FileResponse(FOLDER / "docs.html", headers=HEADERS)


@router.api_route("/favicon.ico", methods=["GET", "HEAD"])
async def favicon() -> FileResponse:
    return FileResponse(FOLDER / "icon.svg", media_type=ASSETS["icon.svg"], headers=HEADERS)


@router.api_route("/page/{name}", methods=["GET", "HEAD"])
async def asset(name: str) -> FileResponse:
    if name not in ASSETS:
        raise NotFound("There is no such page.")
    return FileResponse(FOLDER / name, media_type=ASSETS[name], headers=HEADERS)

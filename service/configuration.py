"""The effective configuration without secrets, and a check whether a service could start with it."""

from __future__ import annotations

import os
from typing import Any

from service.errors import StartupError
from service.exposure import check_exposure
from service.keys import KeyStore
from service.listener import resolve
from service.models.single import check_models, open_student
from service.observe.logs import without_secrets
from service.queue.connection import check_server
from service.settings import Settings

SECRET_WORDS = ("secret", "password", "token")
HIDDEN = "***"


def effective(settings: Settings) -> dict[str, Any]:
    """Every setting and its value, including defaults; without passwords and other secrets."""
    shown = settings.model_dump(mode="json")
    return {name: _shown(name, value) for name, value in shown.items()}


def check_configuration(settings: Settings) -> dict[str, Any]:
    """The configuration that a service would start with; nothing is started.

    Raises:
        StartupError: it could not start, with the reason.
    """
    keys = KeyStore(settings.data_dir)
    check_exposure(settings, resolve(settings.host, settings.port)[4][0], keys)
    _check_data_dir(settings)
    check_models(settings)
    student = open_student(settings) if settings.models is None else None
    if settings.redis_url is not None:
        check_server(settings.redis_url)
    return {
        "config": effective(settings),
        "model": student.id if student else None,
        "model_version": student.version if student else None,
        "keys": sum(key.active for key in keys.keys()),
        "queue": "embedded" if settings.redis_url is None else "named",
    }


def _check_data_dir(settings: Settings) -> None:
    folder = settings.data_dir
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise StartupError(f"FEWSTEP_DATA_DIR {settings.data_dir} cannot be used: {folder} is not writable.")


def _shown(name: str, value: Any) -> Any:
    if value and any(word in name for word in SECRET_WORDS):
        return HIDDEN
    return without_secrets(value) if isinstance(value, str) else value

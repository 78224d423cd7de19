"""What a stack of containers needs before it starts for the first time: keys and passwords that nobody had to choose.

Each container mounts only the folder of ``secrets`` that it needs, hence files that any user of it may read.
"""

from __future__ import annotations

import secrets as random
from dataclasses import dataclass
from pathlib import Path

from service.errors import StartupError
from service.keys import SCOPES, KeyStore

FIRST_KEY, METRICS_KEY = "first", "prometheus"
SECRET_BYTES = 24
READABLE = 0o444


@dataclass(frozen=True)
class Made:
    """What was made by this call and is to be shown once; None: it was there already."""

    api_key: str | None
    grafana_password: str | None


def prepare(data_dir: Path, secrets: Path, queue_host: str) -> Made:
    """Make what is missing: the queue's password, the first API key, a key for metrics, Grafana's password.

    Writes below ``secrets``: queue/server.conf, queue/password and queue/fewstep_redis_url; metrics/token;
    grafana/password. A second call changes nothing.

    Raises:
        StartupError: a file cannot be written or read.
    """
    try:
        _queue(secrets / "queue", queue_host)
        store = KeyStore(data_dir)
        _metrics(secrets / "metrics" / "token", store)
        password = secrets / "grafana" / "password"
        shown = None if password.exists() else _random()
        if shown:
            _write(password, shown)
        known = {key.name for key in store.keys()}
        key = None if FIRST_KEY in known else store.create(FIRST_KEY, [s for s in SCOPES if s != "metrics"])[1]
    except OSError as error:
        raise StartupError(f"{error.filename} cannot be used: {error.strerror}.") from error
    return Made(key, shown)


def _queue(folder: Path, host: str) -> None:
    """The password first and the others out of it, so that a call that was cut off is completed by the next one."""
    if not (folder / "password").exists():
        _write(folder / "password", _random())
    password = (folder / "password").read_text("ascii")
    _write(folder / "server.conf", f"requirepass {password}\n")
    _write(folder / "fewstep_redis_url", f"redis://:{password}@{host}:6379")


def _metrics(token: Path, store: KeyStore) -> None:
    if token.exists() and store.find(token.read_text("ascii")):
        return
    _write(token, store.create(METRICS_KEY, ["metrics"])[1])


def _random() -> str:
    return random.token_hex(SECRET_BYTES)


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".part")
    unfinished.unlink(missing_ok=True)
    unfinished.write_text(text, "ascii")
    unfinished.chmod(READABLE)
    unfinished.replace(path)

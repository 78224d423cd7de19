"""API keys, in a file of the data directory: hashed, so that whoever reads the file cannot use them.

A key is ``fewstep_<id>_<secret>``. The id names it (in the queue, in logs, in ``revoke``); the secret has 192 random
bits, so that one round of SHA-256 is enough. A revoked key stays in the file, so the service keeps asking for keys.
"""

from __future__ import annotations

import fcntl
import hashlib
import hmac
import json
import logging
import os
import re
import secrets
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from service.errors import StartupError
from service.queue.job import PRIORITIES

SCOPES = ("generate", "read", "metrics", "admin")
USUAL_SCOPES = ("generate", "read")
FORM = re.compile(r"fewstep_([0-9a-f]{12})_([0-9a-f]{48})")
FILE_NAME = "keys.json"
FORMAT_VERSION = 1
MAX_NAME_CHARS = 100

log = logging.getLogger(__name__)


class KeysError(StartupError):
    """The key file is unusable, or a request to change it is wrong; the message is one sentence."""


@dataclass(frozen=True)
class Key:
    """What is kept of a key. Times are Unix times in seconds; ``quota`` is in megapixel-steps a minute (None: as set
    for all); ``max_priority`` is the highest priority that it may ask for (None: by its scopes). ``allow_training``:
    unless a request says otherwise, its prompt may train later students."""

    id: str
    name: str
    scopes: tuple[str, ...]
    sha256: str
    created: int
    revoked: int | None = None
    quota: float | None = None
    max_priority: int | None = None
    allow_training: bool = False

    @property
    def active(self) -> bool:
        return self.revoked is None

    @property
    def highest_priority(self) -> int:
        """The highest priority that it may ask for: without a setting of its own, any for an admin, and else 0."""
        return usual_priority(self.scopes) if self.max_priority is None else self.max_priority


def usual_priority(scopes: Sequence[str]) -> int:
    """The highest priority that a caller with these scopes may ask for."""
    return max(PRIORITIES) if "admin" in scopes else 0


class KeyStore:
    """The keys of one data directory, as they are now: the file is read again whenever it has changed."""

    def __init__(self, data_dir: Path) -> None:
        self._path = data_dir / FILE_NAME
        self._keys: dict[str, Key] = {}
        self._stamp: tuple[int, ...] | None = None
        self._required = False

    @property
    def required(self) -> bool:
        """Whether requests need a key: a key file exists, or has existed since this process started."""
        self._refresh()
        return self._required

    def find(self, presented: str) -> Key | None:
        """The active key that was presented, or None."""
        self._refresh()
        match = FORM.fullmatch(presented)
        key = self._keys.get(match[1]) if match else None
        if match is None or key is None or not hmac.compare_digest(key.sha256, _digest(match[2])):
            return None
        return key if key.active else None

    def keys(self) -> list[Key]:
        """All keys, revoked ones among them, in the order of their creation.

        Raises:
            KeysError: the file cannot be read.
        """
        return list(_read(self._path).values())

    def create(
        self, name: str, scopes: Sequence[str] = USUAL_SCOPES, quota: float | None = None,
        max_priority: int | None = None, allow_training: bool = False,
    ) -> tuple[Key, str]:  # fmt: skip
        """A new key and its text, which is not stored.

        Raises:
            KeysError: no such scope, a wrong name, quota or priority, or the file cannot be written.
        """
        _check(name, scopes, quota, max_priority)
        id, secret = secrets.token_hex(6), secrets.token_hex(24)
        ordered = tuple(scope for scope in SCOPES if scope in scopes)
        now = int(time.time())
        key = Key(id, name, ordered, _digest(secret), now, None, quota, max_priority, allow_training)
        with self._changing() as keys:
            keys[id] = key
        return key, f"fewstep_{id}_{secret}"

    def revoke(self, id: str) -> Key:
        """Revoke a key, at once and for good; a second time changes nothing.

        Raises:
            KeysError: there is no such key, or the file cannot be written.
        """
        with self._changing() as keys:
            if id not in keys:
                raise KeysError(f"There is no key {id!r}; fewstep keys list shows the ids.")
            if keys[id].active:
                keys[id] = replace(keys[id], revoked=int(time.time()))
            return keys[id]

    @contextmanager
    def _changing(self) -> Iterator[dict[str, Key]]:
        """The keys, for one process at a time to change; they are written at the end."""
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(self._path.with_suffix(".lock"), os.O_RDWR | os.O_CREAT, 0o600)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX)
                keys = {key.id: key for key in self.keys()}
                yield keys
                _write(self._path, keys)
            finally:
                os.close(descriptor)
        except OSError as error:
            raise KeysError(f"{self._path} cannot be written: {error.strerror}.") from error

    def _refresh(self) -> None:
        stamp: tuple[int, ...]
        try:
            status = self._path.stat()
            stamp = (status.st_mtime_ns, status.st_ino, status.st_size)
        except (FileNotFoundError, NotADirectoryError):
            self._keys, self._stamp = {}, None  # a key that was required before still is
            return
        except OSError as error:
            stamp = (error.errno or 0,)
        if stamp == self._stamp:
            return
        self._stamp, self._required = stamp, True
        try:
            self._keys = _read(self._path)
        except KeysError as error:
            log.error("the key file cannot be read, so the former keys stay valid: %s", error)


def _digest(secret: str) -> str:
    return hashlib.sha256(secret.encode("ascii")).hexdigest()


def _check(name: str, scopes: Sequence[str], quota: float | None, max_priority: int | None) -> None:
    if not 0 < len(name) <= MAX_NAME_CHARS or not name.isprintable():
        raise KeysError(f"A key's name must have 1 to {MAX_NAME_CHARS} printable characters.")
    if not scopes or (unknown := set(scopes) - set(SCOPES)):
        shown = f" {sorted(unknown)[0]!r}" if scopes else ""
        raise KeysError(f"There is no scope{shown}: accepted are {', '.join(SCOPES)}.")
    if quota is not None and not 0 < quota < 1e12:
        raise KeysError("A quota must be a number of megapixel-steps a minute above 0.")
    if max_priority is not None and max_priority not in PRIORITIES:
        raise KeysError(f"A key's highest priority is a whole number from {min(PRIORITIES)} to {max(PRIORITIES)}.")


def _read(path: Path) -> dict[str, Key]:
    """The keys by id; none without a file."""
    try:
        data: dict[str, Any] = json.loads(path.read_text("utf-8"))
        if data["format_version"] != FORMAT_VERSION:
            raise KeysError(f"{path} was written by another version of fewstep.")
        keys = [_key(entry) for entry in data["keys"]]
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except OSError as error:
        raise KeysError(f"{path} cannot be read: {error.strerror}.") from error
    except (ValueError, TypeError, KeyError) as error:
        raise KeysError(f"{path} is not a key file.") from error
    return {key.id: key for key in keys}


def _key(entry: dict[str, Any]) -> Key:
    """A key of the file; what only a later release knows is left out."""
    known = {field.name: entry[field.name] for field in fields(Key) if field.name in entry}
    return Key(**{**known, "scopes": tuple(entry["scopes"])})


def _entry(key: Key) -> dict[str, Any]:
    """A key as it is written. A later field is left out where it says nothing: older releases read no other fields."""
    later = {"max_priority": None, "allow_training": False}
    return {name: value for name, value in asdict(key).items() if name not in later or value != later[name]}


def _write(path: Path, keys: dict[str, Key]) -> None:
    """A reader sees either the old file or the new one, each complete."""
    text = json.dumps({"format_version": FORMAT_VERSION, "keys": [_entry(key) for key in keys.values()]}, indent=2)
    unfinished = path.with_suffix(".part")
    unfinished.unlink(missing_ok=True)
    descriptor = os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        file.write(text + "\n")
        file.flush()
        os.fsync(file.fileno())
    unfinished.replace(path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)

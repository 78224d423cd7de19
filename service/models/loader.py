"""Loads and drops a worker's students as the queue's notes say, beside the thread that draws."""

from __future__ import annotations

import logging
import threading
import time

from redis.exceptions import RedisError

from service.errors import StartupError
from service.models.folder import Folder, Name
from service.models.loaded import Rack
from service.models.memory import check_memory
from service.models.registry import Entry, ModelState, Notes, WorkersBoard
from service.models.single import SEVERAL, load_runtime, open_runtime
from service.queue.connection import connect
from service.queue.job import lane
from service.settings import Settings
from student.bundle import BundleError, verify_files
from student.runtimes.runtime import Runtime

LOOK_EVERY_S = 0.2
WANTED = (ModelState.LOADING, ModelState.SERVING)

log = logging.getLogger(__name__)


class Loader:
    """Brings a rack into line with the notes; whatever fails is told with its reason, and what is held stays."""

    def __init__(self, settings: Settings, folder: Folder, board: WorkersBoard, rack: Rack) -> None:
        self._settings = settings
        self._folder = folder
        self._board = board
        self._rack = rack
        self._held_bytes: dict[str, int] = {}

    def run(self, stopping: threading.Event) -> None:
        """Follow the notes until told to stop."""
        while not stopping.wait(LOOK_EVERY_S):
            try:
                self.follow(self._board.read())
            except (RedisError, OSError) as error:
                log.warning("the notes on models are out of reach: %s", error)

    def first(self, stopping: threading.Event) -> None:
        """Wait for the notes, and follow them once. The HTTP process writes the first ones."""
        while not stopping.is_set():
            try:
                notes = self._board.read()
            except RedisError as error:
                log.warning("the notes on models are out of reach: %s", error)
                notes = Notes()
            if notes.entries:
                return self.follow(notes)
            stopping.wait(LOOK_EVERY_S)

    def follow(self, notes: Notes) -> None:
        """Load what is wanted and not held; drop what is not wanted once nobody waits for it.

        An empty note says nothing: the server has lost its data and will be told again.
        """
        if not notes.entries:
            return
        for name in self._rack.names:
            entry = notes.entries.get(name)
            if not (entry and entry.state in WANTED) and self._board.idle(_lane(name)):
                self._rack.drop(name)
                self._held_bytes.pop(name, None)
                log.info("%s was dropped", name)
        for name, entry in notes.entries.items():
            if entry.state in WANTED and name not in self._rack.names:
                self._try(name, entry)

    def _try(self, name: str, entry: Entry) -> None:
        before = self._rack.refused(name)
        if before and before["attempt"] == entry.attempt:
            return
        started = time.perf_counter()
        try:
            runtime = self._load(Name.of(name))
        except BundleError as error:
            reason = str(error)
        except MemoryError:
            reason = "it does not fit into memory"
        except Exception as error:  # a network library may fail in any way; what is held goes on
            log.exception("%s cannot be loaded", name)
            reason = f"loading it failed ({type(error).__name__})"
        else:
            return self._rack.put(runtime, time.perf_counter() - started)
        self._held_bytes.pop(name, None)
        log.warning("%s is refused: %s", name, reason)
        self._rack.refuse(name, entry.attempt, reason)

    def _load(self, name: Name) -> Runtime:
        student, bundle, settings = self._folder.student(name), self._folder.bundle(name), self._settings
        held = sum(self._held_bytes.values())
        limit = settings.model_memory_mb * 2**20
        self._held_bytes[str(name)] = check_memory(bundle, student, settings.runtime, limit, held)
        if settings.runtime == "fake":
            verify_files(bundle, student)
            from student.runtimes.fake import FakeRuntime

            return FakeRuntime(student)
        return load_runtime(bundle, settings)


def open_rack(settings: Settings, stopping: threading.Event) -> Rack:
    """What a worker draws with: the one student, or those of FEWSTEP_MODELS that are wanted, now and later.

    Raises:
        StartupError: the student cannot be loaded, or none of those that are wanted, with the reason.
    """
    if settings.models is None:
        started, rack = time.perf_counter(), Rack()
        runtime = open_runtime(settings)
        rack.put(runtime, time.perf_counter() - started)
        return rack
    rack = Rack()
    board = WorkersBoard(connect(settings.required_redis_url), SEVERAL)
    loader = Loader(settings, Folder(settings.models), board, rack)
    loader.first(stopping)
    if not rack.lanes and rack.info["refused"]:
        name, refused = next(iter(rack.info["refused"].items()))
        raise StartupError(f"No student of FEWSTEP_MODELS can be loaded; {name}: {refused['reason']}.")
    threading.Thread(target=loader.run, args=(stopping,), name="loader", daemon=True).start()
    return rack


def _lane(name: str) -> str:
    found = Name.of(name)
    return lane(found.id, found.version)

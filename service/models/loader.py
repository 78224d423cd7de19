"""Loads and drops a worker's students as the model registry demands, in a thread of its own."""

from __future__ import annotations

import logging
import threading
import time
from pathlib import Path

from redis.exceptions import RedisError

from service.errors import StartupError
from service.models.folder import Folder, Name
from service.models.loaded import LoadedModels
from service.models.memory import check_memory
from service.models.registry import Entry, ModelState, ModelStates, WorkerRegistry
from service.models.single import SEVERAL, load_runtime, open_runtime
from service.observe.background import Background
from service.queue.connection import connect
from service.queue.job import lane
from service.settings import Settings
from student.bundle import BundleError
from student.files import verify_files
from student.probe import Probe, read_probe
from student.runtimes.runtime import Runtime

POLL_EVERY_S = 0.2
# A student that others serve and this worker could not load is tried again: its files may have been away for a moment.
AGAIN_AFTER_S, LONGEST_PAUSE_S = 60.0, 3600.0  # the first pause, which doubles, and the longest
WANTED = (ModelState.LOADING, ModelState.SERVING)

log = logging.getLogger(__name__)


class ModelLoader:
    """Makes the loaded models match the registry. A failure is reported; what is loaded stays."""

    def __init__(
        self, settings: Settings, folder: Folder, registry: WorkerRegistry, loaded: LoadedModels,
        background: Background,
    ) -> None:  # fmt: skip
        self._background = background
        self._settings = settings
        self._folder = folder
        self._registry = registry
        self._loaded = loaded
        self._held_bytes: dict[str, int] = {}
        self._again: dict[str, tuple[float, float]] = {}  # the moment of the next try, and the pause after that

    def run(self, stopping: threading.Event) -> None:
        """Follow the registry until the process stops."""

        def follow() -> None:
            self.follow(self._registry.read())

        self._background.forever_in_thread("loader", follow, POLL_EVERY_S, stopping)

    def first(self, stopping: threading.Event) -> None:
        """Wait for the states, and follow them once. The HTTP process writes the first ones."""
        while not stopping.is_set():
            try:
                states = self._registry.read()
            except RedisError as error:
                log.warning("the models' states cannot be read: %s", error)
                states = ModelStates()
            if states.entries:
                return self.follow(states)
            stopping.wait(POLL_EVERY_S)

    def follow(self, states: ModelStates) -> None:
        """Load what is registered and not loaded; drop what is unregistered once no job waits for it.

        An empty registry changes nothing: the server has lost its data, and it will be filled again.
        """
        if not states.entries:
            return
        for name in self._loaded.names:
            entry = states.entries.get(name)
            if not (entry and entry.state in WANTED) and self._registry.idle(_lane(name)):
                self._loaded.drop(name)
                self._held_bytes.pop(name, None)
                log.info("%s was dropped", name)
        for name, entry in states.entries.items():
            if entry.state in WANTED and name not in self._loaded.names:
                self._try(name, entry)

    def _try(self, name: str, entry: Entry) -> None:
        before = self._loaded.refused(name)
        again_at, pause_s = self._again.get(name, (0.0, AGAIN_AFTER_S))
        if before and before["attempt"] == entry.attempt:
            if entry.state is not ModelState.SERVING or time.monotonic() < again_at:
                return
        else:
            pause_s = AGAIN_AFTER_S
        started = time.perf_counter()
        try:
            runtime = self._load(Name.of(name))
        except BundleError as error:
            reason = str(error)
        except MemoryError:
            reason = "it does not fit into memory"
        except Exception as error:  # a network library may fail in any way; the loaded students go on
            log.exception("%s cannot be loaded", name)
            reason = f"loading it failed ({type(error).__name__})"
        else:
            probe = probe_of(self._folder.bundle(Name.of(name)), runtime)
            return self._loaded.put(runtime, time.perf_counter() - started, probe)
        self._held_bytes.pop(name, None)
        log.warning("%s is refused: %s", name, reason)
        self._loaded.refuse(name, entry.attempt, reason)
        self._again[name] = (time.monotonic() + pause_s, min(2 * pause_s, LONGEST_PAUSE_S))

    def _load(self, name: Name) -> Runtime:
        student, bundle, settings = self._folder.student(name), self._folder.bundle(name), self._settings
        held = sum(self._held_bytes.values())
        limit = settings.model_memory_mb * 2**20
        self._held_bytes[str(name)] = check_memory(bundle, student, settings.runtime, limit, held)
        if settings.is_fake:
            verify_files(bundle, student)
            from student.runtimes.fake import FakeRuntime

            return FakeRuntime(student)
        return load_runtime(bundle, settings)


def open_models(
    settings: Settings, loaded: LoadedModels, stopping: threading.Event, background: Background
) -> None:  # fmt: skip
    """Load what a worker draws with: the one student, or those of FEWSTEP_MODELS that are wanted, now and later.

    Raises:
        StartupError: the student cannot be loaded, or none of those that are wanted, with the reason.
    """
    if settings.models is None:
        started = time.perf_counter()
        runtime = open_runtime(settings)
        return loaded.put(runtime, time.perf_counter() - started, probe_of(settings.model, runtime))
    registry = WorkerRegistry(connect(settings.required_redis_url), SEVERAL)
    loader = ModelLoader(settings, Folder(settings.models), registry, loaded, background)
    loader.first(stopping)
    if not loaded.lanes and loaded.info["refused"]:
        name, refused = next(iter(loaded.info["refused"].items()))
        raise StartupError(f"No student of FEWSTEP_MODELS can be loaded; {name}: {refused['reason']}.")
    threading.Thread(target=loader.run, args=(stopping,), name="loader", daemon=True).start()


def probe_of(bundle: Path, runtime: Runtime) -> Probe | None:
    """The golden probe of a student that was loaded from there; one that cannot be used costs no student."""
    try:
        return read_probe(bundle, runtime.student)
    except BundleError as error:
        log.warning("%s", error)
        return None


def _lane(name: str) -> str:
    found = Name.of(name)
    return lane(found.id, found.version)

"""The worker's process: its parts put together, and its ways to end."""

from __future__ import annotations

import logging
import os
import signal
import threading
from types import FrameType

from redis.exceptions import RedisError

from service.models.loaded import LoadedModels
from service.models.loader import open_models
from service.models.single import queue_name
from service.observe.accelerators import Accelerators
from service.observe.background import Background
from service.observe.logs import flush_logs
from service.observe.tracer import Tracing
from service.observe.tracing import open_tracing
from service.quality.feedback import FeedbackPolicy
from service.queue.connection import connect
from service.queue.consumer import Consumer
from service.queue.status import DRAINED
from service.results.choose import open_store
from service.settings import Settings
from service.worker.claims import WAIT_S
from service.worker.execution import DeviceLost
from service.worker.heartbeat import Heartbeat
from service.worker.neighbours import Neighbours
from service.worker.scoring import ScorePolicy
from service.worker.signing import ImageSigner, open_signer
from service.worker.worker import Worker

STOP_MARGIN_S = 0.2  # whoever waits is answered first
SETTLE_BEFORE_LEAVING_S = 2.0
STOPPED, DEVICE_LOST, HUNG = 0, 4, 5  # exit codes

log = logging.getLogger(__name__)


def run_worker(settings: Settings, name: str) -> int:
    """Load the student, or those of FEWSTEP_MODELS that are wanted, and work until SIGTERM or SIGINT.

    Returns:
        The process's exit code: ``STOPPED``, ``DRAINED`` or ``DEVICE_LOST``.

    Raises:
        StartupError: the student cannot be served, or no server is known.
    """
    stopping = threading.Event()
    tracing, signer = open_tracing(settings, "worker"), open_signer(settings)
    background, loaded = Background(), LoadedModels()
    consumer, leaver, beater = (_consumer(settings, name) for _ in range(3))
    heartbeat = Heartbeat(
        beater, loaded.info, settings.lease_s / 3, Accelerators(), background=background, on_drain=stopping.set
    )
    _stop_on_signal(stopping, heartbeat, leaver, settings.grace_s + STOP_MARGIN_S)
    try:
        with heartbeat:  # while it loads, too: whoever waits for this worker sees that it lives
            open_models(settings, loaded, stopping, background)
            heartbeat.ask()  # that it is ready is news
            ended = _work(settings, loaded, consumer, heartbeat, leaver, stopping, tracing, signer)
    finally:
        _leave(leaver)
    tracing.close()
    log.info("stopped", extra={"handed_back": 0})
    return ended


def _work(
    settings: Settings, loaded: LoadedModels, consumer: Consumer, heartbeat: Heartbeat, leaver: Consumer,
    stopping: threading.Event, tracing: Tracing, signer: ImageSigner | None,
) -> int:  # fmt: skip
    """Draw until ``stopping`` is set; returns the exit code."""
    worker = Worker(
        loaded, consumer, heartbeat, open_store(settings), stopping, provenance=settings.provenance, tracing=tracing,
        signer=signer, call_timeout_s=settings.call_timeout_s, batch=settings.batch,
        neighbours=Neighbours(settings.data_dir) if settings.crowded_threads else None,
        policy=ScorePolicy.parse(settings.score), probe_s=settings.probe_s, feedback=FeedbackPolicy.of(settings),
        on_hang=lambda _: _end_hung(worker, heartbeat, leaver),
    )  # fmt: skip
    heartbeat.counts = worker.counts
    try:
        worker.run()
    except DeviceLost as error:
        log.critical("%s", error)
        return DEVICE_LOST
    return DRAINED if heartbeat.drains else STOPPED


def _leave(leaver: Consumer) -> None:
    """Count as a worker no more; where the queue is out of reach that ends by itself."""
    try:
        leaver.release([])
    except RedisError as error:
        log.warning("the end of this worker cannot be reported to the queue: %s", error)


def _consumer(settings: Settings, name: str) -> Consumer:
    client = connect(settings.required_redis_url, block_s=WAIT_S)
    return Consumer(client, queue_name(settings), name, lease_s=settings.lease_s, max_attempts=settings.max_attempts)


def _end_hung(worker: Worker, heartbeat: Heartbeat, leaver: Consumer) -> None:
    """A call hangs, and its thread cannot be stopped: settle finished jobs, give up those of the call, and exit.

    They are lost with this worker as if it had died: each is tried again alone, and the attempt counts.
    """
    try:
        heartbeat.stop()
        worker.claims.stop()
        worker.claims.hand_back()
        worker.drain(SETTLE_BEFORE_LEAVING_S)
        log.critical("the worker ends", extra={"given_up": leaver.lost(leaver.worker)})
    finally:
        flush_logs()
        os._exit(HUNG)


def _stop_on_signal(stopping: threading.Event, heartbeat: Heartbeat, leaver: Consumer, grace_s: float) -> None:
    """On a signal: end the batch; if that takes longer than ``grace_s``, hand it back and go. So does a worker that an
    operator drains already."""
    signalled = threading.Event()

    def leave() -> None:
        try:
            log.info("stopped", extra={"handed_back": leaver.release(heartbeat.held())})
        finally:
            flush_logs()
            os._exit(STOPPED)

    def on_signal(_number: int, _frame: FrameType | None) -> None:
        stopping.set()
        if not signalled.is_set():
            signalled.set()
            timer = threading.Timer(grace_s, leave)
            timer.daemon = True
            timer.start()

    signal.signal(signal.SIGTERM, on_signal)
    signal.signal(signal.SIGINT, on_signal)

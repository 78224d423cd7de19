"""Times and bounds that a document, another program or another bound counts on: to change one is a decision.

Each is stated once more, with the reason, since nothing else notices when it becomes ten times as large.
"""

from __future__ import annotations

import importlib
from typing import Any

import pytest

LIMITS: dict[str, tuple[Any, str]] = {
    # What a client or a proxy sees.
    "service.http.server.KEEP_ALIVE_S": (75, "load balancers have 60 s and must be the ones who close"),
    "service.http.server.STOP_MARGIN_S": (1, "Kubernetes and Compose kill 10 s after they ask for a stop"),
    "service.http.server.DESCRIPTORS_WANTED": (65536, "one for each client that waits"),
    "service.http.server.DESCRIPTORS_APART": (128, "the queue's connections, files and the store have some of them"),
    "service.http.protocol.MAX_HEAD_BYTES": (32768, "the refusal says so"),
    "service.http.app.MAX_BODY_BYTES": (2**18, "eight times the longest prompt, in UTF-8 and escaped"),
    "service.http.overload.IN_A_ROW": (8, "fewer refusals in a row are chance"),
    "service.http.overload.HOLD_S": (0.05, "ARCHITECTURE.md: 50 ms at a time"),
    "service.http.preferences.LONGEST_WAIT_S": (3600, "as timeout_s at most"),
    "service.http.schema.MAX_TIMEOUT_S": (3600, "the API says so"),
    "service.http.links.SECRET_KEPT_S": (60.0, "a lost secret is made anew within a minute"),
    "service.http.links.SIGNATURE_BYTES": (18, "144 bits cannot be guessed, and are base64 without padding"),
    "service.http.routes.jobs.MOST_LISTED": (100, "fewstep.protocol.PAGE asks for as many"),
    "service.http.routes.dlq.MOST_LISTED": (1000, "as many are kept"),
    "service.http.routes.usage.MOST_DAYS": (366, "a year; 400 days are kept"),
    "service.http.routes.models.LONGEST_WAIT_S": (600.0, "a large student takes minutes to load"),
    "service.http.routes.probes.ASK_S": (0.5, "Kubernetes gives a probe 1 s"),
    "service.http.services.REAP_EVERY_S": (1.0, "a job of a dead worker waits for its lease, and for no more"),
    "service.http.services.FIRST_LOOK_S": (2.0, "a server that is away does not keep a process from starting"),
    "service.http.events.END_MARGIN_S": (2.0, "a job ends at its deadline or at the poll after it"),
    "service.http.generate.CHANGES": (3, "versions that change at each try are a fault"),
    "service.http.drift_log.OLD_S": (7 * 86400, "a stream that had nothing for a week is another release's"),
    "service.http.videos.USUAL_FPS": (16, "Wan's"),
    "service.http.streams.RENEW_S": (10.0, "a third of what they are kept"),
    "service.http.streams.KEPT_S": (30.0, "streams of a process that died count for half a minute at most"),
    "service.http.mirroring.PRIORITY": (-5, "the lowest: behind everybody's work"),
    "service.http.mirroring.TIMEOUT_S": (900.0, "a pair that has waited for 15 minutes compares nothing"),
    "service.http.mirroring.MOST_WAITING": (64, "a queue that is behind is not made longer"),
    "service.errors.RETRY_AFTER_S": (1, "whoever is refused without an estimate comes back after a second"),
    "service.http.quality.MOST_DRAWN": (64, "a larger request would hold up everybody's"),
    "service.http.streams.RENEWED_AT_ONCE": (1000, "streams in one call of the queue"),
    "service.http.tasks.CANCEL_AGAIN_S": (0.1, "a task that swallows its end is asked again"),
    "service.listener.BACKLOG": (2048, "connections that wait while a process is busy"),
    "service.keys.MAX_NAME_CHARS": (100, "a name is a label of metrics"),
    # How fast whoever waits hears of it.
    "service.queue.replies.BLOCK_S": (2.0, "a read ends well before the client's time-out"),
    "service.queue.replies.POLL_S": (2.0, "what a lost notice costs"),
    "service.queue.replies.FOLLOW_S": (1.0, "what a lost notice costs a stream"),
    "service.queue.producer.REPLICATED_WITHIN_MS": (500, "a replica in another zone answers in milliseconds"),
    "service.queue.producer.SECRET_KEPT_S": (30 * 86400, "links of a service that rests for a week still open"),
    "service.queue.producer.MOST_OWNED": (1000, "as enqueue.lua"),
    "service.queue.producer.MOST_WORKERS": (1000, "an answer about workers is bounded"),
    "service.queue.consumer.PROBES_KEPT_MS": (400 * 86_400_000, "a machine that comes back next year is known"),
    "service.queue.status.DRAINED": (6, "the supervisor does not start it again"),
    "service.queue.connection.RETRIES": (12, "about 4 s in all: a restarted server is back by then"),
    "service.queue.connection.FIRST_PAUSE_S": (0.02, "a lost connection costs milliseconds"),
    "service.queue.connection.LONGEST_PAUSE_S": (0.5, "twelve tries are about 4 s"),
    "service.queue.connection.CONNECT_TIMEOUT_S": (2.0, "less than a call"),
    "service.queue.connection.CALL_TIMEOUT_S": (5.0, "a server that swaps answers late"),
    "service.queue.connection.LONGEST_CALL_S": (8.0, "a server that never answers must not block a client"),
    "service.queue.connection.MOST_CONNECTIONS": (32, "of one event loop, of 10,000 of the server's"),
    "service.queue.connection.CONNECTION_WAIT_S": (4.0, "less than a call with its retries"),
    "service.models.controller.POLL_EVERY_S": (0.5, "what another process changed is seen within half a second"),
    "service.models.controller.BUSY_POLL_S": (0.1, "while a model moves"),
    "service.models.loader.POLL_EVERY_S": (0.2, "a worker loads what it is asked to at once"),
    "service.models.memory.ROOM_BYTES": (64 * 2**20, "room to compute, measured on the starter student"),
    "service.models.memory.GROWTH": (2, "its files and the runtime's copies, measured on the starter student"),
    "service.webhooks.deliver.POLL_EVERY_S": (0.3, "a delivery that is due waits no longer"),
    "service.supervise.supervisor.POLL_EVERY_S": (0.1, "a process that dies is started again at once"),
    "service.supervise.processes.STOP_POLL_S": (0.02, "a stop takes no longer than its processes do"),
    "service.run.WORKER_NICENESS": (10, "the HTTP process and the queue need a CPU for moments only"),
    # The worker.
    "service.worker.watchdog.TIMES_USUAL": (20.0, "docs/operate.md, FEWSTEP_CALL_TIMEOUT_S"),
    "service.worker.watchdog.SHORTEST_BOUND_S": (30.0, "docs/operate.md, FEWSTEP_CALL_TIMEOUT_S"),
    "service.worker.watchdog.FIRST_BOUND_S": (600.0, "docs/operate.md, FEWSTEP_CALL_TIMEOUT_S"),
    "service.worker.settling.SETTLE_FOR_S": (60.0, "a server that is restarted is back by then"),
    "service.worker.settling.STORE_PAUSES_S": ((0.1, 0.4), "a store is tried three times in half a second"),
    "service.worker.settling.PAUSE_AFTER_ERROR_S": (0.2, "a server that is away is not asked all the time"),
    "service.worker.worker.NEXT_S": (0.2, "a worker that is stopped notices at once"),
    "service.worker.worker.WATCHED_OVER_S": (1.0, "a call of a second is not worth another graph"),
    "service.worker.claims.WAIT_S": (1.0, "a lost wake-up costs a second"),
    "service.worker.claims.PAUSE_AFTER_ERROR_S": (0.2, "a server that is away is not asked all the time"),
    "service.worker.claims.LOOK_EVERY_S": (0.25, "a worker that is resumed claims at once"),
    "service.worker.heartbeat.SOONEST_S": (0.1, "ten beats a second at most, however many jobs end"),
    "service.worker.device.NEWEST": (0.3, "three calls outweigh all before"),
    "service.worker.device.LATE_AFTER_S": (
        1.0,
        "a call that is late by a second and its own length is anybody's guess",
    ),
    "service.worker.backlog.MOST_BYTES": (2**29, "half a gibibyte of unsettled pictures"),
    "service.worker.backlog.MOST_BATCHES": (8, "unsettled batches"),
    "service.worker.late_scores.MOST_WAITING": (64, "batches whose pictures are kept for their scores"),
    "service.worker.finishing.MOST_ENCODERS": (4, "threads that encode"),
    "service.worker.probing.PATIENCE_S": (60.0, "a probe that is due waits a minute for an idle device"),
    "service.worker.probing.AGAIN_S": (60.0, "and comes again after one"),
    "service.worker.process.STOP_MARGIN_S": (0.2, "whoever waits is answered first"),
    "service.worker.process.SETTLE_BEFORE_LEAVING_S": (2.0, "less than the 10 s after which a stop becomes a kill"),
    "service.worker.pictures.DEFAULT_QUALITY": (95, "the API says so"),
    "service.worker.pictures.PNG_LEVEL": (1, "of noise, a higher level saves nothing and takes ten times as long"),
    "service.worker.videos.CRF": (17, "visually lossless"),
    "service.worker.videos.WEBP_QUALITY": (95, "as of pictures"),
    "service.worker.claims.SHORTEST_MARGIN_S": (0.005, "a batch is not claimed for a deadline that it cannot make"),
    "service.worker.floor.FAILS_AGAIN": (0.5, "measured on the starter's pictures: docs/reward-serving.md"),
    "service.worker.videos.THREADS": (4, "bytes depend on it, and shall not on the machine's cores"),
    "service.worker.videos.LOSSLESS": (100, "what a request's quality means"),
    # The supervisor.
    "service.supervise.supervisor.READY_TIMEOUT_S": (120.0, "a worker that says nothing for two minutes is broken"),
    "service.supervise.supervisor.STEADY_AFTER_S": (5.0, "what ran for so long is started again at once"),
    "service.supervise.supervisor.ASK_TIMEOUT_S": (2.0, "a process that does not answer is not waited for"),
    "service.supervise.redis_server.START_TIMEOUT_S": (20.0, "it reads what it has kept"),
    "service.supervise.redis_server.LOCK_TIMEOUT_S": (5.0, "the service before this one may still be stopping"),
    "service.supervise.redis_server.STOP_TIMEOUT_S": (2.0, "then it is killed: it keeps every write"),
    "service.supervise.redis_server.SOCKET_PATH_LIMIT_BYTES": (100, "below macOS' 103"),
    "service.supervise.workers_on_cpu.MOST_ON_CPU": (4, "docs/operate.md, FEWSTEP_WORKERS: up to four"),
    "service.supervise.first_start.SECRET_BYTES": (24, "the least that Standard Webhooks accepts"),
    # Webhooks.
    "service.webhooks.deliver.MAX_TRIES": (8, "docs/operate.md, FEWSTEP_WEBHOOK_RETRY_S"),
    "service.webhooks.deliver.SEND_S": (5.0, "a receiver that takes longer is slow"),
    "service.webhooks.deliver.LEASE_S": (30.0, "more than one try can take"),
    "service.webhooks.deliver.POSTPONE_S": (1.0, "a host with its most requests under way is left alone"),
    "service.webhooks.deliver.AT_ONCE": (64, "requests under way"),
    "service.webhooks.deliver.AT_ONE_HOST": (8, "an eighth of them: one slow receiver leaves the others theirs"),
    "service.webhooks.deliver.GROWTH": (3, "docs/operate.md, FEWSTEP_WEBHOOK_RETRY_S: it triples each time"),
    "service.webhooks.deliver.LONGEST_PAUSE_S": (600.0, "the last tries are ten minutes apart"),
    "service.webhooks.deliver.JITTER": (0.2, "receivers that come back are not asked all at once"),
    "service.webhooks.target.MAX_URL_CHARS": (2048, "as the API says"),
    "service.webhooks.target.RESOLVE_S": (3.0, "less than a try"),
    # Results and what is observed.
    "service.results.memory.LARGEST_BYTES": (2 * 2**20, "larger ones go to another store"),
    "service.observe.background.BROKEN_AFTER": (3, "fewer failures in a row may be chance"),
    "service.observe.background.LONGEST_PAUSE_S": (1.0, "a duty is done again within a second"),
    "service.observe.logs.SHORTEST_MASKED_CHARS": (4, "shorter prompts stand in every other word"),
    "service.observe.logs.HASH_CHARS": (16, "64 bits tell prompts apart"),
    "service.observe.log_writer.MOST_LINES": (10_000, "what waits for a slow reader is bounded"),
    "service.observe.log_writer.ATOMIC_BYTES": (4096, "PIPE_BUF of Linux: processes do not mix their lines"),
    "service.observe.log_writer.FLUSH_S": (0.5, "a reader that hangs does not keep a process from ending"),
    "service.observe.log_writer.GATHER_S": (0.01, "lines of one moment are written together"),
    # Rules of quality: error rates of the drift tests and of canaries were simulated with these (benchmarks).
    "service.quality.canary.FEWEST": (50, "pairs before anything is decided"),
    "service.quality.canary.TIGHTEST_AT": (500, "pairs"),
    "service.quality.drift.EVERY": (300_000, "observations to a false alarm"),
    "service.quality.drift.MARGIN_ERRORS": (3.0, "standard errors of the reference"),
    "service.quality.drift.UNKNOWN_COUNT": (100, "pictures"),
    "service.quality.drift.CAP": (10.0, "times the threshold"),
    "service.quality.drift.RECENT": (1000, "observations, as _common.lua"),
    "service.http.feedback.UNRANKED": (50.0, "the median: nothing is known"),
    # The client.
    "fewstep.client.TIMEOUT_S": (120.0, "beyond the 60 s that the service gives a request"),
    "fewstep.async_client.TIMEOUT_S": (120.0, "as the client's"),
    "fewstep.async_client.CONNECTIONS": (100, "httpx's own"),
    "fewstep.connection.CONNECT_S": (10.0, "a host that is away is not waited for"),
    "fewstep.events.SILENCE_S": (60.0, "four of the service's heartbeats"),
    "fewstep.protocol.MARGIN_S": (10.0, "an answer that is sent at the deadline arrives"),
    "fewstep.protocol.OPERATION_S": (30.0, "an operator's call"),
    "fewstep.protocol.PAGE": (100, "the most that the service lists"),
    "fewstep.cli.INTERRUPTED": (130, "shells know 128 + SIGINT"),
    "fewstep.events.RENEWED_S": (1.0, "a stream that broke off is opened again"),
    "fewstep.load.drive.MOST_IN_FLIGHT": (2000, "descriptors of one process"),
    "fewstep.load.report.SLICES": (60, "of a time series, at most"),
    "fewstep.protocol.SHOWN_CHARS": (200, "of an answer that is no JSON"),
    # Seeds: what is measured for one end is never what was chosen by, or measured for, another.
    "training.experiment.validation.VALIDATION_SEED": (1_000_000, "test pictures begin at 0 and at 100,000"),
    "export.within.FIRST_SEED": (1_000_000, "the student's own distributions begin at 0"),
    "export.reference.FIRST_SEED": (3_000_000, "none of those before"),
    "student.probe.FIRST_SEED": (2604, "its pictures are only compared with themselves"),
    # The student.
    "student.probe.SCORE_TOLERANCE": (0.05, "standard deviations of the teacher: docs/reward-serving.md"),
    "student.probe.PAIRS": (8, "pictures of a probe"),
    "student.within_prompt.MOST": (16, "as best_of at most"),
    "student.runtimes.compiled.CPU_BATCH": (8, "more are no faster on a CPU"),
    "student.runtimes.scoring.AT_ONCE": (16, "pictures in a call of a scorer"),
    "student.runtimes.batches.GAIN": (1.05, "a larger call must be worth its wait"),
    "student.runtimes.batches.MISSES": (2, "sizes that change bytes, after which no larger one is tried"),
    "student.runtimes.placement.USABLE": (0.92, "of a GPU's memory"),
    "student.runtimes.lengths.LONGEST": (1024, "as num_frames at most"),
    "student.noise.SEED_LIMIT": (2**32, "as the API's seeds"),
    "student.probe.SAME_SCORE": (1e-3, "of the same bits on the same kind of machine"),
    "student.runtimes.engine.WARM_UP": (3, "runs before a CUDA graph is recorded, as torch advises"),
    "student.runtimes.manifest.OPENED_TWICE": (256 * 2**20, "what a worker may hold twice"),
    "student.runtimes.placement.SMALL": (200_000_000, "numbers below which float32 costs nothing that matters"),
    "student.runtimes.placement.ACTIVATIONS": (2 * 2**30, "benchmarks/serving_memory.py"),
    "student.runtimes.resize.PIL_BITS": (22, "PIL's"),
    "student.schedule.KARRAS_RHO": (7.0, "diffusers', and the paper's (arXiv 2206.00364)"),
    "student.saved.POINTER_BYTES": (1024, "Git LFS: a pointer is smaller"),
    "student.families.flux2.MAX_TOKENS": (512, "diffusers'"),
    "student.families.qwen_image.MAX_TOKENS": (512, "diffusers'"),
    "student.families.sd3.MAX_TOKENS": (256, "diffusers'"),
    "student.families.wan.MAX_TOKENS": (512, "diffusers'"),
    "student.families.z_image.MAX_TOKENS": (512, "diffusers'"),
    # Rewards and exports.
    "rewards.detector.DETECTIONS": (100, "COCO's: the likeliest of a picture"),
    "rewards.geneval.NEAR": (0.1, "GenEval's"),
    "rewards.imagereward.MAX_TOKENS": (35, "ImageReward's"),
    "export.adoption.SCHNELL_TOKENS": (256, "FLUX.1-schnell was distilled with so many"),
    "export.adoption.SPARE_BYTES": (64 * 2**20, "configurations, tokenizers, the card"),
    "export.graph.MAX_BATCH": (63, "diffusers' upsampling branches at 64"),
    "export.graph.HALVE_FROM": (1024, "smaller tensors are not worth a Cast"),
    "export.graph.ONE_FILE_BYTES": (2**31 - 2**24, "protobuf ends at 2 GiB"),
    "export.measure.PROOF_PROMPTS": (32, "of a bundle, as after training"),
    "export.preflight.WORKING_COPIES": (3, "the module's, the program's, the file's"),
    "export.qdq.E4M3_MOST": (448.0, "the largest number of E4M3 (FN)"),
    "export.quantise.JUDGED": (16, "feeds that the choice is made by"),
    "export.quantise.MARGIN": (0.8, "of the gate's tolerance, which is measured on more images"),
    "export.calibrate.SAMPLES": (2**14, "values kept of one tensor at one feed"),
    "export.verify.LARGEST_PSNR_DB": (200.0, "stands for equality"),
    "export.builder.GRACE_S": (10.0, "a compiler that is told to stop is waited for"),
    # Training.
    "training.alarms.WINDOW": (3, "validations that a trend is read from"),
    "training.experiment.room.SPARE_GB": (1.5, "the driver and CUDA's libraries"),
    "training.offload.PART_BYTES": (256 * 2**20, "of parameters whose moments are on the device at once"),
    "training.processes.BUCKET_BYTES": (100 * 2**20, "of gradients in one call"),
    "training.prompts.MOST_COPIES": (10, "of a prompt in one pass"),
    "training.rats.gate.SMALLEST_GAP_STD": (0.01, "of the teacher's"),
    "training.rats.loss.STEERING": (10, "of the lab's runs"),
    "training.rats.peers.CRITIC_STEPS": (5, "DMD2's two time scales"),
    "training.rats.trainer.BAD_STEPS": (10, "in a row: fewer are chance"),
    "training.result.PROOF_PROMPTS": (32, "of a bundle, as of an adopted one"),
    "training.lab.outcome.RESAMPLES": (2_000, "of a bootstrap"),
}


def value_of(name: str) -> Any:
    module, _, constant = name.rpartition(".")
    return getattr(importlib.import_module(module), constant)


@pytest.mark.parametrize("name", LIMITS)
def test_a_limit_is_what_others_count_on(name: str) -> None:
    value, why = LIMITS[name]
    assert value_of(name) == value, why


def test_limits_that_depend_on_each_other() -> None:
    of = {name.partition(".")[2]: value_of(name) for name in LIMITS}
    assert of["http.routes.jobs.MOST_LISTED"] == value_of("fewstep.protocol.PAGE")
    assert 3 * of["http.streams.RENEW_S"] <= of["http.streams.KEPT_S"], "two renewals may fail"
    assert of["queue.replies.FOLLOW_S"] < of["http.events.END_MARGIN_S"], "a stream sees the end before it is over"
    assert of["webhooks.target.RESOLVE_S"] + of["webhooks.deliver.SEND_S"] < of["webhooks.deliver.LEASE_S"]
    assert of["queue.replies.BLOCK_S"] < value_of("service.queue.connection.CALL_TIMEOUT_S")
    assert of["http.routes.probes.ASK_S"] < 1.0
    silence_s = value_of("fewstep.events.SILENCE_S")
    assert silence_s == 4 * value_of("service.settings.Settings").model_fields["event_heartbeat_s"].default
    tries = of["webhooks.deliver.MAX_TRIES"]
    pauses_s = [min(600.0, 5.0 * 3**k) for k in range(tries - 1)]
    kept_s = 7200  # WEBHOOK_KEPT_MS of _common.lua
    assert 1800 < sum(pauses_s) * 1.2 + tries * of["webhooks.deliver.LEASE_S"] < kept_s
    connection = "service.queue.connection."
    assert value_of(connection + "CONNECT_TIMEOUT_S") < value_of(connection + "CALL_TIMEOUT_S")
    assert value_of(connection + "CALL_TIMEOUT_S") < value_of(connection + "LONGEST_CALL_S")
    assert value_of(connection + "CONNECTION_WAIT_S") < value_of(connection + "LONGEST_CALL_S")
    assert value_of("export.measure.PROOF_PROMPTS") == value_of("training.result.PROOF_PROMPTS")
    assert value_of("student.noise.SEED_LIMIT") == value_of("service.http.schema.SEED_LIMIT")

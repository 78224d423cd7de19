"""The service's configuration: read once, in ``main``, from environment variables that begin with ``FEWSTEP_``."""

from __future__ import annotations

import difflib
import ipaddress
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, SecretStr, ValidationError, field_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from service.errors import StartupError
from service.webhook_key import key_of

PREFIX = "FEWSTEP_"
SECRETS_DIR = "FEWSTEP_SECRETS_DIR"  # a directory with one file for each setting that must not be in the environment
OF_CLIENTS = {"FEWSTEP_URL", "FEWSTEP_API_KEY"}  # what the client and the command line read
REPOSITORY = Path(__file__).resolve().parent.parent
SECRETS = ("FEWSTEP_REDIS_URL", "FEWSTEP_RESULTS", "FEWSTEP_WEBHOOK_SECRET")  # a URL may hold a password

Network = ipaddress.IPv4Network | ipaddress.IPv6Network
AbsolutePath = Annotated[Path, AfterValidator(lambda path: path.expanduser().absolute())]
LogLevel = Literal["debug", "info", "warning", "error"]
KIND = "(auto|onnx|openvino|tensorrt|tensorrt_rtx|torch)"
# A kind, a runtime's folder ("onnx-staged-int8"), or several separated by commas: the first that is available serves.
RuntimeName = Annotated[str, Field(pattern=rf"^(fake(-video)?|{KIND}(-[\w.-]+)?(,{KIND}(-[\w.-]+)?)*)$")]


def default_data_dir() -> Path:
    """``fewstep`` in the user's data directory, by the XDG specification."""
    try:
        base = os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share"
    except RuntimeError as error:
        raise StartupError("FEWSTEP_DATA_DIR must be set: there is no home directory.") from error
    return Path(base).absolute() / "fewstep"


class Settings(BaseSettings):
    """Each field is an environment variable: its name with the prefix. The descriptions are the documentation."""

    model_config = SettingsConfigDict(env_prefix=PREFIX, frozen=True, extra="forbid")

    host: str = Field(default="127.0.0.1", description="Address that the HTTP process listens on.")
    cors: Annotated[tuple[str, ...], NoDecode] = Field(
        default=(), description="Web origins (https://app.example,...) whose pages may call the API; * for all."
    )
    insecure: bool = Field(
        default=False, description="Whether other machines may reach a service that has no API key (--insecure)."
    )
    port: int = Field(default=8000, ge=0, le=65535, description="Port that it listens on; 0 picks a free one.")
    redis_url: str | None = Field(
        default=None,
        pattern="^(redis|rediss|unix)://",
        description="Redis >= 7.0 or Valkey >= 7.2; unset: an embedded server.",
    )
    replicas: int = Field(
        default=0, ge=0, description="Replicas of the queue's server that must hold a job (WAIT); else 503."
    )
    data_dir: AbsolutePath = Field(
        default_factory=default_data_dir, description="Directory of the embedded server, results, keys and run.json."
    )
    model: AbsolutePath = Field(default=REPOSITORY / "models" / "shapes", description="Folder of the served student.")
    models: AbsolutePath | None = Field(
        default=None,
        description="A directory of ID/VERSION/ folders instead of one student; they are loaded while serving.",
    )
    model_memory_mb: int = Field(
        default=0, ge=0, description="Memory (MB) that all students of a worker may use; 0: what is free."
    )
    runtime: RuntimeName = Field(
        default="auto", description="The runtime: a kind, a runtime's folder, or a comma-separated list of them."
    )
    score: str = Field(
        default="always",
        pattern=r"^(always|after|off|0(\.\d+)?|\.\d+|1(\.0+)?)$",
        description="Which pictures are scored: always, a share of them (0.1, by the seed) or off; after: all, and "
        "no answer waits for it.",
    )
    probe_s: float = Field(default=3600.0, ge=0, description="How often workers generate the golden probe; 0: never.")
    feedback_percentile: float = Field(default=20.0, ge=0, le=100, description="Prompts that rank lower may train.")
    feedback_max: int = Field(default=10_000, ge=10, description="How many are kept, the newest; a tenth of one key.")
    feedback_days: float = Field(default=30.0, gt=0, description="How long they are kept.")
    offload: Literal["auto", "off", "encoders", "cpu"] = Field(
        default="auto",
        description="Where the torch runtime keeps text encoders: on the GPU (off), in main memory and on the GPU only "
        "while encoding (encoders), or on the CPU, which encodes (cpu); auto: the first of these that fits.",
    )
    torch_compile: Literal["off", "on", "graphs"] = Field(
        default="off", description="Whether the torch runtime compiles the network and records CUDA graphs."
    )
    threads: int = Field(
        default=0, ge=0, description="Threads of one worker; 0: all cores, or while other workers draw too, its share."
    )
    batch: int = Field(default=0, ge=0, description="Most images in a batch of jobs; 0: as the load asks for.")
    workers: Annotated[int, Field(ge=1, le=64)] | Literal["auto"] = Field(
        default="auto",
        description="Worker processes that serve starts, each with one of the GPUs in turn; auto: one for each GPU; "
        "without any, up to four of a small compiled student, else one.",
    )
    apis: int = Field(default=1, ge=1, le=64, description="HTTP processes that serve starts, on one socket.")
    max_pending: int = Field(default=1000, ge=1, description="Jobs that may wait; beyond, requests are answered 503.")
    max_pending_per_key: int = Field(
        default=0,
        ge=0,
        description="Most jobs of one API key that may wait; beyond, 429. 0: a quarter of FEWSTEP_MAX_PENDING.",
    )
    request_timeout_s: float = Field(
        default=60.0, gt=0, description="Deadline (s) of a request that sets no timeout_s; beyond, 504."
    )
    job_timeout_s: float = Field(
        default=3600.0, gt=0, description="The same for a job that is fetched later (Prefer: respond-async)."
    )
    priority_images: int = Field(
        default=50, ge=0, description="How many images of each other key one level of priority may overtake."
    )
    quota: float = Field(
        default=0.0, ge=0, description="Quota of each key in megapixel-steps a minute; beyond, 429. 0: no limit."
    )
    retry_grace_s: float = Field(
        default=30.0,
        ge=0,
        description="How long (s) a job with an Idempotency-Key outlives its last connection, for a retry to find.",
    )
    head_timeout_s: float = Field(
        default=20.0, gt=0, description="Time (s) for the head of a request to arrive; then the client is disconnected."
    )
    body_timeout_s: float = Field(default=20.0, gt=0, description="Longest pause (s) within a body; then 408.")
    max_streams: int = Field(default=100, ge=1, description="Most event streams that a key may have open; beyond, 429.")
    event_heartbeat_s: float = Field(
        default=15.0, gt=0, description="Interval (s) of the keep-alive comments in an event stream."
    )
    result_ttl_s: float = Field(default=3600.0, gt=0, description="How long images and job records are kept.")
    results: str | None = Field(
        default=None,
        pattern="^(s3|redis|rediss|unix)://",
        description="Where images are stored: s3://bucket/prefix (extra s3) or a second Redis; unset: files in the "
        "data directory.",
    )
    sweep_s: float = Field(
        default=60.0, ge=0, description="Interval (s) at which one process deletes expired results; 0: never."
    )
    results_quota_mb: int = Field(
        default=0, ge=0, description="Most MiB of images; beyond, the oldest are deleted. 0: no limit."
    )
    max_pixels: int = Field(default=2**24, ge=1, description="Pixels that one request may ask for; beyond, 413.")
    max_video_pixels: int = Field(
        default=2**28, ge=1, description="The same of videos, whose frames count each; beyond, 413."
    )
    provenance: bool = Field(default=True, description="Whether image files say in XMP that a model generated them.")
    c2pa_cert: AbsolutePath | None = Field(
        default=None, description="Certificate chain (PEM) with which workers sign images (C2PA); unset: unsigned."
    )
    c2pa_key: AbsolutePath | None = Field(default=None, description="The first certificate's private key (PEM).")
    public_url: str | None = Field(
        default=None,
        pattern="^https?://[^/?#]+(/[^?#]*[^/?#])?$",
        description="Public URL of the service, for the links in responses; unset: the one the client called.",
    )
    webhook_secret: SecretStr | None = Field(
        default=None,
        description="whsec_ and 24 to 64 random bytes in base64: signs webhooks. Unset: webhooks are not enabled.",
    )
    webhook_networks: Annotated[tuple[Network, ...], NoDecode] = Field(
        default=(), description="Networks (10.0.0.0/8,...) that webhooks may reach besides public addresses."
    )
    webhook_http: bool = Field(default=False, description="Whether webhooks may go without TLS.")
    webhook_retry_s: float = Field(
        default=5.0, gt=0, description="Pause (s) after a failed webhook; it triples each time, up to 8 attempts."
    )
    lease_s: float = Field(default=10.0, ge=0.2, description="A worker without a heartbeat for this long (s) is dead.")
    call_timeout_s: float = Field(
        default=0.0,
        ge=0,
        description="A runtime call that takes longer (s) counts as hung: its worker is restarted and its jobs are "
        "retried, each alone. 0: 20 times what such a call took before, at least 30 s; for the first of its kind, "
        "20 times the warm-up, at least 600 s.",
    )
    max_attempts: int = Field(default=5, ge=1, description="A job that this many workers died with is given up.")
    drain_s: float = Field(
        default=0.0, ge=0, description="On a stop: how long (s) requests are still accepted while /readyz returns 503."
    )
    grace_s: float = Field(
        default=1.0,
        ge=0,
        description="On a stop, after that: time (s) for running jobs and their clients; then jobs are handed back to "
        "the queue, and clients get the URL to fetch them from.",
    )
    log_level: LogLevel = Field(default="info", description="Lowest level that is logged.")
    log_format: Literal["auto", "json", "text"] = Field(
        default="auto", description="One JSON object a line, or text; auto: text if standard error is a terminal."
    )
    log_prompts: bool = Field(
        default=False, description="Whether prompts are logged in full; otherwise only their length and hash."
    )
    tracing: bool = Field(default=False, description="OpenTelemetry spans (extra otel); OTEL_* say where they go.")

    @field_validator("webhook_networks", "cors", mode="before")
    @classmethod
    def _split(cls, value: object) -> object:
        return [part for part in value.split(",") if part] if isinstance(value, str) else value

    @field_validator("webhook_secret")
    @classmethod
    def _check_secret(cls, value: SecretStr | None) -> SecretStr | None:
        if value is not None:
            key_of(value.get_secret_value())
        return value

    @property
    def webhook_key(self) -> bytes:
        """The key that signs webhooks; only where they are enabled."""
        assert self.webhook_secret is not None
        return key_of(self.webhook_secret.get_secret_value())

    @property
    def is_fake(self) -> bool:
        """Whether no student is there: pictures or videos are hashes."""
        return self.runtime.startswith("fake")

    @property
    def key_pending(self) -> int:
        """The most jobs of one key that may wait."""
        return self.max_pending_per_key or max(1, self.max_pending // 4)

    @property
    def thread_count(self) -> int:
        """Threads of a worker's call while no other worker of the machine draws."""
        return self.threads or self.cores

    @property
    def crowded_threads(self) -> int:
        """Threads of a worker's call while others of the machine draw too; 0: as many as ever."""
        workers = 1 if self.workers == "auto" else self.workers  # serve tells its workers how many they are
        share = max(1, self.cores // workers)
        return share if self.threads == 0 and share < self.cores else 0

    @property
    def cores(self) -> int:
        """Those of the machine that this process may use."""
        return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1

    @property
    def required_redis_url(self) -> str:
        """The URL of the queue's server, for a process that does not start one."""
        if self.redis_url is None:
            raise StartupError("FEWSTEP_REDIS_URL is not set: only the command serve starts a server of its own.")
        return self.redis_url

    @property
    def required_models(self) -> Path:
        """The directory of several students; only where FEWSTEP_MODELS is set."""
        assert self.models is not None
        return self.models

    @property
    def results_dir(self) -> Path:
        return self.data_dir / "results"


def read_settings() -> Settings:
    """The settings of this process.

    Raises:
        StartupError: a variable with the prefix is not a setting, or its value is out of range.
    """
    _refuse_unknown(os.environ)
    options: dict[str, Any] = {"_secrets_dir": _secrets_dir(os.environ)}  # mypy knows only the fields
    if PREFIX + "MODEL" in os.environ and PREFIX + "MODELS" in os.environ:
        raise StartupError("FEWSTEP_MODEL is one student and FEWSTEP_MODELS a directory of several: set only one.")
    try:
        return Settings(**options)
    except ValidationError as error:
        first = error.errors()[0]
        name = PREFIX + str(first["loc"][0]).upper() if first["loc"] else PREFIX
        shown = "wrong" if name in SECRETS else repr(first["input"])
        raise StartupError(f"{name} is {shown}: {first['msg']}.") from None


def _secrets_dir(environ: Mapping[str, str]) -> Path | None:
    """The directory whose files are settings, such as ``fewstep_redis_url``; the environment takes precedence."""
    if not environ.get(SECRETS_DIR):
        return None
    folder = Path(environ[SECRETS_DIR])
    try:
        _refuse_unknown({path.name: "" for path in folder.iterdir()})
    except OSError as error:
        raise StartupError(f"{SECRETS_DIR} {folder} cannot be read: {error.strerror}.") from None
    return folder


def _refuse_unknown(environ: Mapping[str, str]) -> None:
    known = [PREFIX + name.upper() for name in Settings.model_fields]
    for name in sorted(environ):
        if name.upper().startswith(PREFIX) and name.upper() not in {*known, *OF_CLIENTS, SECRETS_DIR}:
            nearest = difflib.get_close_matches(name.upper(), known, n=1, cutoff=0)[0]
            raise StartupError(f"{name} is not a setting: did you mean {nearest}?")

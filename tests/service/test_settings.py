"""The configuration: what is known, what is refused, and with which words."""

from __future__ import annotations

import ipaddress
import os
from pathlib import Path

import pytest

from service.errors import StartupError
from service.settings import PREFIX, Settings, read_settings


@pytest.fixture(autouse=True)
def nothing_set(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in Settings.model_fields:
        monkeypatch.delenv(PREFIX + name.upper(), raising=False)


def test_the_defaults(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", "/somewhere")
    settings = read_settings()
    assert (settings.host, settings.port, settings.redis_url, settings.runtime) == ("127.0.0.1", 8000, None, "auto")
    assert settings.data_dir == Path("/somewhere/fewstep") and settings.results_dir == Path(
        "/somewhere/fewstep/results"
    )
    assert settings.model.parts[-2:] == ("models", "shapes") and settings.model.is_absolute()
    assert settings.thread_count >= 1


def test_workers_share_the_cores_only_while_others_draw(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    found = {
        (workers, threads): (settings.thread_count, settings.crowded_threads)
        for workers, threads in ((1, 0), (2, 0), (3, 0), (16, 0), (4, 3))
        for settings in [Settings(workers=workers, threads=threads)]
    }
    assert found == {(1, 0): (8, 0), (2, 0): (8, 4), (3, 0): (8, 2), (16, 0): (8, 1), (4, 3): (3, 0)}


def test_every_setting_is_described() -> None:
    assert [name for name, field in Settings.model_fields.items() if not field.description] == []


@pytest.mark.parametrize(
    ("name", "nearest"), [("FEWSTEP_PROT", "FEWSTEP_PORT"), ("FEWSTEP_REDIS", "FEWSTEP_REDIS_URL"), ("FEWSTEP_", "")]
)
def test_an_unknown_variable_names_the_nearest(name: str, nearest: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "1")
    with pytest.raises(StartupError, match=f"{name} is not a setting: did you mean {nearest}"):
        read_settings()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("PORT", "70000"),
        ("PORT", "many"),
        ("RUNTIME", "cuda"),
        ("WORKERS", "0"),
        ("LEASE_S", "0"),
        ("RESULT_TTL_S", "-1"),
    ],
)
def test_a_wrong_value_names_the_variable_and_the_value(name: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(PREFIX + name, value)
    with pytest.raises(StartupError, match=f"^{PREFIX}{name} is '{value}': ") as caught:
        read_settings()
    assert "\n" not in str(caught.value)


# The outermost values that each setting takes, and the first that it refuses.
EDGES = {
    "PORT": ("0 65535", "-1 65536"),
    "REDIS_URL": ("redis://q rediss://q unix:///q.sock", "q http://q xredis://q"),
    "REPLICAS": ("0", "-1"),
    "MODEL_MEMORY_MB": ("0", "-1"),
    "RUNTIME": (
        "auto fake fake-video torch onnx-staged-int8 tensorrt_rtx,onnx,torch",
        "cuda fakes onnx, ,onnx onnx;torch fake,onnx",
    ),
    "SCORE": ("always after off 0 0.1 .5 1 1.0", "on 1.1 2 -0.1 .  0.1x"),
    "PROBE_S": ("0", "-0.1"),
    "FEEDBACK_PERCENTILE": ("0 100", "-0.1 100.1"),
    "FEEDBACK_MAX": ("10", "9"),
    "FEEDBACK_DAYS": ("0.001", "0"),
    "OFFLOAD": ("auto off encoders cpu", "on"),
    "TORCH_COMPILE": ("off on graphs", "auto"),
    "THREADS": ("0", "-1"),
    "BATCH": ("0 1", "-1"),
    "WORKERS": ("auto 1 64", "0 65"),
    "APIS": ("1 64", "0 65"),
    "MAX_PENDING": ("1", "0"),
    "MAX_PENDING_PER_KEY": ("0", "-1"),
    "REQUEST_TIMEOUT_S": ("0.001", "0"),
    "JOB_TIMEOUT_S": ("0.001", "0"),
    "PRIORITY_IMAGES": ("0", "-1"),
    "QUOTA": ("0", "-0.1"),
    "RETRY_GRACE_S": ("0", "-0.1"),
    "HEAD_TIMEOUT_S": ("0.001", "0"),
    "BODY_TIMEOUT_S": ("0.001", "0"),
    "MAX_STREAMS": ("1", "0"),
    "EVENT_HEARTBEAT_S": ("0.001", "0"),
    "RESULT_TTL_S": ("0.001", "0"),
    "RESULTS": ("s3://b/p redis://q rediss://q unix:///q.sock", "/folder http://q file:///q"),
    "SWEEP_S": ("0", "-0.1"),
    "RESULTS_QUOTA_MB": ("0", "-1"),
    "MAX_PIXELS": ("1", "0"),
    "MAX_VIDEO_PIXELS": ("1", "0"),
    "PUBLIC_URL": (
        "http://h https://h.example:8443 https://h/behind/a",
        "h ftp://h https:// https://h/ https://h/a/ https://h?a https://h#a",
    ),
    "WEBHOOK_RETRY_S": ("0.001", "0"),
    "LEASE_S": ("0.2", "0.19"),
    "CALL_TIMEOUT_S": ("0", "-0.1"),
    "MAX_ATTEMPTS": ("1", "0"),
    "DRAIN_S": ("0", "-0.1"),
    "GRACE_S": ("0", "-0.1"),
    "LOG_LEVEL": ("debug info warning error", "loud"),
    "LOG_FORMAT": ("auto json text", "xml"),
}
UNBOUNDED = {
    "HOST", "CORS", "INSECURE", "DATA_DIR", "MODEL", "MODELS", "PROVENANCE", "C2PA_CERT", "C2PA_KEY", "WEBHOOK_SECRET",
    "WEBHOOK_NETWORKS", "WEBHOOK_HTTP", "LOG_PROMPTS", "TRACING",
}  # fmt: skip


def test_every_setting_has_its_edges_here() -> None:
    assert {*EDGES, *UNBOUNDED} == {name.upper() for name in Settings.model_fields}


@pytest.mark.parametrize("name", EDGES)
def test_the_outermost_values_are_taken_and_the_next_ones_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def taken(value: str) -> bool:
        monkeypatch.setenv(PREFIX + name, value)
        try:
            return bool(read_settings())
        except StartupError as error:
            assert str(error).startswith(PREFIX + name)
            return False

    accepted, refused = (values.split(" ") for values in EDGES[name])
    assert [value for value in accepted if not taken(value)] == []
    assert [value for value in refused if taken(value)] == []


def test_what_is_derived_from_settings() -> None:
    bounds = ((1000, 0), (3, 0), (9, 7))
    assert [Settings(max_pending=most, max_pending_per_key=own).key_pending for most, own in bounds] == [250, 1, 7]
    assert [Settings(runtime=name).is_fake for name in ("fake", "fake-video", "auto", "torch")] == [
        True, True, False, False,
    ]  # fmt: skip


def test_lists_are_separated_by_commas(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEWSTEP_WEBHOOK_NETWORKS", "10.0.0.0/8,fd00::/8")
    monkeypatch.setenv("FEWSTEP_CORS", "https://a,https://b,")
    settings = read_settings()
    assert settings.webhook_networks == (ipaddress.ip_network("10.0.0.0/8"), ipaddress.ip_network("fd00::/8"))
    assert settings.cors == ("https://a", "https://b")


def test_one_student_or_a_directory_of_several(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FEWSTEP_MODELS", str(tmp_path))
    assert read_settings().required_models == tmp_path
    monkeypatch.setenv("FEWSTEP_MODEL", str(tmp_path))
    with pytest.raises(StartupError, match="set only one"):
        read_settings()


@pytest.mark.parametrize("name", ["REDIS_URL", "RESULTS", "WEBHOOK_SECRET"])
def test_a_value_that_may_hold_a_secret_is_not_printed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(PREFIX + name, "ftp://user:canary@host")
    with pytest.raises(StartupError, match=f"^{PREFIX}{name} is wrong: ") as caught:
        read_settings()
    assert "canary" not in str(caught.value)


def test_paths_are_made_absolute(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FEWSTEP_DATA_DIR", "here")
    monkeypatch.setenv("FEWSTEP_MODEL", "~/student")
    settings = read_settings()
    assert settings.data_dir == tmp_path / "here" and settings.model == Path.home() / "student"


def test_a_url_is_needed_where_no_server_is_started() -> None:
    with pytest.raises(StartupError, match="FEWSTEP_REDIS_URL"):
        _ = read_settings().required_redis_url


def test_secrets_come_from_files_and_the_environment_goes_before_them(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "fewstep_redis_url").write_text("redis://:canary@queue:6379\n")
    (tmp_path / "password").write_text("of somebody else")
    monkeypatch.setenv("FEWSTEP_SECRETS_DIR", str(tmp_path))
    assert read_settings().redis_url == "redis://:canary@queue:6379"
    monkeypatch.setenv("FEWSTEP_REDIS_URL", "redis://other")
    assert read_settings().redis_url == "redis://other"


def test_a_file_of_secrets_that_is_no_setting_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "fewstep_redis").write_text("x")
    monkeypatch.setenv("FEWSTEP_SECRETS_DIR", str(tmp_path))
    with pytest.raises(StartupError, match=r"fewstep_redis is not a setting: did you mean FEWSTEP_REDIS_URL\?"):
        read_settings()
    monkeypatch.setenv("FEWSTEP_SECRETS_DIR", str(tmp_path / "missing"))
    with pytest.raises(StartupError, match="^FEWSTEP_SECRETS_DIR .*missing cannot be read"):
        read_settings()


def test_what_the_client_and_the_command_line_read_is_no_unknown_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("FEWSTEP_URL", "FEWSTEP_API_KEY", "FEWSTEP_SECRETS_DIR"):
        monkeypatch.setenv(name, "")
    assert read_settings().port == 8000

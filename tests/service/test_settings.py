"""The configuration: what is known, what is refused, and with which words."""

from __future__ import annotations

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


def test_paths_are_made_absolute(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FEWSTEP_DATA_DIR", "here")
    monkeypatch.setenv("FEWSTEP_MODEL", "~/student")
    settings = read_settings()
    assert settings.data_dir == tmp_path / "here" and settings.model == Path.home() / "student"


def test_a_url_is_needed_where_no_server_is_started() -> None:
    with pytest.raises(StartupError, match="FEWSTEP_REDIS_URL"):
        _ = read_settings().required_redis_url


def test_a_wrong_url_is_not_printed_for_it_may_hold_a_password(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEWSTEP_REDIS_URL", "http://user:canary@host")
    with pytest.raises(StartupError, match="^FEWSTEP_REDIS_URL is wrong: ") as caught:
        read_settings()
    assert "canary" not in str(caught.value)


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

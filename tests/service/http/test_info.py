"""What the service says about itself: /info, /readyz, the line at its start, and --check-config."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from service.configuration import check_configuration, effective
from service.errors import StartupError
from service.keys import KeyStore
from service.settings import Settings
from tests.service.http.test_access import bearer, serve
from tests.service.students import make_student
from tests.service.support import Service, call, running_service


def test_info_says_what_serves_and_with_which_settings(live: Service) -> None:
    info = call("GET", f"{live.url}/info").json()
    assert (info["model"], info["model_version"]) == ("fake", "1")
    [worker] = info["workers"]
    assert worker["runtime"] == "fake" and worker["max_batch"] == 8 and worker["shows_steps"] is True
    assert worker["load_s"] >= worker["warm_up_s"] >= 0
    assert set(info["config"]) == set(Settings.model_fields)
    assert info["config"]["runtime"] == "fake" and info["config"]["max_pending"] == 1000
    assert info["config"]["redis_url"].startswith("unix://")


def test_the_settings_are_for_keys_with_the_scope_admin(tmp_path: Path) -> None:
    keys = KeyStore(tmp_path / "data")
    reader, admin = keys.create("reader", ["read"])[1], keys.create("admin", ["read", "admin"])[1]
    with running_service(tmp_path / "data") as service:
        assert call("GET", f"{service.url}/info", headers=bearer(reader)).json()["config"] is None
        assert call("GET", f"{service.url}/info", headers=bearer(admin)).json()["config"]["port"] == 0


def test_what_is_shown_holds_no_secret() -> None:
    settings = Settings(redis_url="rediss://user:hunter2@host:6380/1?password=hunter3")
    shown = effective(settings)
    assert shown["redis_url"] == "rediss://***@host:6380/1?password=***"
    assert "hunter" not in json.dumps(shown)


def test_the_start_shows_what_was_loaded_and_how_long_it_took(live: Service) -> None:
    assert re.search(r"fewstep serves fake 1 on fake \(loaded in [\d.]+ s, including [\d.]+ s of warm-up\): open http",
                     live.output.read_text())  # fmt: skip


def test_check_config_prints_the_effective_configuration_and_starts_nothing(tmp_path: Path) -> None:
    KeyStore(tmp_path / "data").create("ann")
    for arguments in (["--check-config"], ["serve", "--check-config"]):
        ended = serve(tmp_path / "data", *arguments, HOST="0.0.0.0", QUOTA="3")
        assert ended.returncode == 0 and ended.stderr == ""
        report = json.loads(ended.stdout)
        assert (report["model"], report["keys"], report["queue"], report["config"]["quota"]) == (
            "fake",
            1,
            "embedded",
            3.0,
        )
    assert {path.name for path in (tmp_path / "data").iterdir()} == {"keys.json", "keys.lock"}


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"HOST": "0.0.0.0"}, "no API key"),
        ({"HOST": "nowhere.invalid"}, "FEWSTEP_HOST"),
        ({"RUNTIME": "auto", "MODEL": "/nowhere"}, "/nowhere is not a student"),
        ({"REDIS_URL": "unix:///nowhere.sock"}, "FEWSTEP_REDIS_URL"),
        ({"DATA_DIR": "/dev/null/x"}, "FEWSTEP_DATA_DIR"),
        ({"PROT": "1"}, "did you mean FEWSTEP_PORT?"),
    ],
)
def test_check_config_says_what_is_wrong_in_one_sentence(settings: dict[str, str], words: str, tmp_path: Path) -> None:
    ended = serve(tmp_path / "data", "--check-config", **settings)
    [line] = ended.stderr.splitlines()
    assert ended.returncode == 1 and ended.stdout == "" and words in line


def test_of_several_students_the_directory_is_checked_and_not_the_one_that_is_not_served(tmp_path: Path) -> None:
    settings = Settings(data_dir=tmp_path / "data", models=tmp_path / "models", model=tmp_path / "none")
    with pytest.raises(StartupError, match="FEWSTEP_MODELS .* holds no student"):
        check_configuration(settings)
    make_student(tmp_path / "models", "cats", "1")
    report = check_configuration(settings)
    assert (report["model"], report["model_version"], report["keys"]) == (None, None, 0)
    assert report["config"]["models"] == str(tmp_path / "models")


def test_only_keys_that_still_open_are_counted(tmp_path: Path) -> None:
    keys = KeyStore(tmp_path)
    keys.revoke(keys.create("gone")[0].id)
    settings = Settings(runtime="fake", data_dir=tmp_path, redis_url="unix:///nowhere.sock")
    for count in (0, 1, 2):
        assert check_configuration(settings.model_copy(update={"redis_url": None}))["keys"] == count
        keys.create("ann")
    with pytest.raises(StartupError, match="FEWSTEP_REDIS_URL"):
        check_configuration(settings)

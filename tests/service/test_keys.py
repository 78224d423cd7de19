"""The file of keys: what is in it, what is not, and that whoever reads it sees every change."""

from __future__ import annotations

import hashlib
import json
import os
import stat
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from service.errors import StartupError
from service.keys import FILE_NAME, FORM, KeysError, KeyStore
from tests.service.support import REPOSITORY, clean_environment


@pytest.fixture
def store(tmp_path: Path) -> KeyStore:
    return KeyStore(tmp_path / "data")


def another(tmp_path: Path) -> KeyStore:
    """The same file as another process sees it."""
    return KeyStore(tmp_path / "data")


def test_a_key_is_found_by_its_whole_text_only(store: KeyStore) -> None:
    key, text = store.create("ann")
    other, _ = store.create("bob")
    assert FORM.fullmatch(text) and store.find(text) == key
    secret = text.rpartition("_")[2]
    wrong = [
        "",
        text[:-1],
        text + "0",
        text + "\n",
        text.upper(),
        secret,
        f"fewstep_{other.id}_{secret}",
        f"fewstep_{key.id}_{'0' * 48}",
        f"fewstep_{key.id}_{'é' * 48}",
        f"fewstep_{'0' * 12}_{secret}",
    ]
    assert [store.find(presented) for presented in wrong] == [None] * len(wrong)


def test_the_secret_is_kept_nowhere_and_the_file_is_its_owners(store: KeyStore, tmp_path: Path) -> None:
    key, text = store.create("ann")
    secret = text.rpartition("_")[2]
    files = [path for path in (tmp_path / "data").rglob("*") if path.is_file()]
    assert not [path for path in files if secret in path.read_text()]
    assert {stat.S_IMODE(path.stat().st_mode) for path in files} == {0o600}
    [entry] = json.loads((tmp_path / "data" / FILE_NAME).read_text())["keys"]
    assert entry["sha256"] == hashlib.sha256(secret.encode()).hexdigest() and entry["id"] == key.id


def test_without_a_file_no_key_is_needed_and_with_the_first_one_it_is(store: KeyStore, tmp_path: Path) -> None:
    assert not store.required
    _, text = another(tmp_path).create("ann")
    assert store.required and store.find(text)


def test_a_running_process_sees_every_change(store: KeyStore, tmp_path: Path) -> None:
    editor = another(tmp_path)
    ann, anns = editor.create("ann")
    assert store.find(anns)
    _, bobs = editor.create("bob")
    assert store.find(bobs)
    editor.revoke(ann.id)
    assert store.find(anns) is None and store.find(bobs) and store.required


def test_a_service_never_opens_because_keys_went_away(store: KeyStore, tmp_path: Path) -> None:
    key, text = store.create("ann")
    _, bobs = store.create("bob")
    assert store.required and store.find(bobs)
    store.revoke(key.id)
    assert store.required and store.find(text) is None
    assert another(tmp_path).required, "nor after a restart"
    (tmp_path / "data" / FILE_NAME).unlink()
    assert store.required and store.find(text) is None and store.find(bobs) is None


@pytest.mark.parametrize("text", ["", "rubbish", "[]", "{}", '{"format_version": 2, "keys": []}', '{"keys": [{}]}'])
def test_a_broken_file_opens_nothing_and_is_told(store: KeyStore, text: str, tmp_path: Path) -> None:
    _, good = store.create("ann")
    assert store.find(good)
    (tmp_path / "data" / FILE_NAME).write_text(text)
    assert store.required and store.find(good), "what was known stays"
    fresh = another(tmp_path)
    assert fresh.required and fresh.find(good) is None
    with pytest.raises(StartupError, match=FILE_NAME):
        fresh.keys()


def test_revoking_is_for_good_and_repeatable(store: KeyStore) -> None:
    key, text = store.create("ann")
    first = store.revoke(key.id)
    assert first.revoked is not None and store.revoke(key.id) == first and store.find(text) is None
    with pytest.raises(KeysError, match="no key 'nobody'"):
        store.revoke("nobody")
    assert store.keys() == [first]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"name": ""}, "name"),
        ({"name": "x" * 101}, "name"),
        ({"name": "a\nb"}, "name"),
        ({"scopes": ()}, "scope"),
        ({"scopes": ("read", "everything")}, "'everything'"),
        ({"quota": 0.0}, "quota"),
        ({"quota": float("nan")}, "quota"),
        ({"quota": float("inf")}, "quota"),
        ({"quota": 1e12}, "quota"),
        ({"max_priority": 6}, "from -5 to 5"),
        ({"max_priority": -6}, "from -5 to 5"),
    ],
)
def test_what_makes_no_sense_is_refused_and_nothing_is_written(
    store: KeyStore, arguments: dict[str, Any], words: str
) -> None:
    with pytest.raises(KeysError, match=words):
        store.create(**{"name": "ann", **arguments})
    assert not store.required


def test_the_outermost_values_are_taken_and_read_back_as_they_were(store: KeyStore, tmp_path: Path) -> None:
    before = int(time.time())
    made = [
        store.create("x" * 100, ("admin", "read", "generate"), 1e-6, -5)[0],
        store.create("ü", quota=9e11, max_priority=5, allow_training=True)[0],
    ]
    assert made == another(tmp_path).keys(), "in the order of their creation"
    assert [(key.scopes, key.quota, key.max_priority, key.allow_training) for key in made] == [
        (("generate", "read", "admin"), 1e-6, -5, False),
        (("generate", "read"), 9e11, 5, True),
    ]
    assert all(before <= key.created <= time.time() and key.active for key in made)
    assert before <= (store.revoke(made[0].id).revoked or 0) <= time.time()


def test_a_process_that_died_while_it_wrote_keeps_nobody_from_writing(store: KeyStore, tmp_path: Path) -> None:
    store.create("ann")
    (tmp_path / "data" / FILE_NAME).with_suffix(".part").write_text("half of a fi")
    _, text = store.create("bob")
    assert store.find(text) and [key.name for key in another(tmp_path).keys()] == ["ann", "bob"]


@pytest.mark.parametrize(
    ("options", "highest"),
    [
        ({}, 0),
        ({"scopes": ["admin"]}, 5),
        ({"max_priority": 3}, 3),
        ({"scopes": ["admin"], "max_priority": -1}, -1),
        ({"scopes": ["admin"], "max_priority": 0}, 0),
    ],
)
def test_a_priority_is_as_the_key_says_and_else_as_its_scopes(
    store: KeyStore, options: dict[str, Any], highest: int, tmp_path: Path
) -> None:
    _, text = store.create("ann", **options)
    assert (found := another(tmp_path).find(text)) and found.highest_priority == highest


def test_the_file_can_be_read_by_the_releases_before_and_after(store: KeyStore, tmp_path: Path) -> None:
    """One that knows no priorities stumbles over their field; one of a later release may write fields of its own."""
    _, text = store.create("ann")
    file = tmp_path / "data" / FILE_NAME
    written = json.loads(file.read_text())
    assert set(written["keys"][0]) == {"id", "name", "scopes", "sha256", "created", "revoked", "quota"}
    written["keys"][0]["mood"] = "calm"
    file.write_text(json.dumps(written))
    assert another(tmp_path).find(text)


def test_processes_that_create_keys_at_once_lose_none(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from service.keys import KeyStore\n"
        "for k in range(10): KeyStore(Path(sys.argv[1])).create(sys.argv[2] + str(k))"
    )
    running = [
        subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "data"), name], cwd=REPOSITORY) for name in "abc"
    ]
    assert [process.wait(60) for process in running] == [0, 0, 0]
    names = {key.name for key in another(tmp_path).keys()}
    assert names == {f"{name}{k}" for name in "abc" for k in range(10)}


def run(data_dir: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "fewstep.cli", "keys", *arguments],
        cwd=REPOSITORY,
        env={**clean_environment({"DATA_DIR": str(data_dir)}), "COLUMNS": "200"},
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_the_command_line_creates_lists_and_revokes(tmp_path: Path) -> None:
    data_dir = tmp_path / "data"
    created = run(
        data_dir, "create", "ann", "--scope", "metrics", "--scope", "read", "--quota", "2.5", "--max-priority", "1"
    )
    text = created.stdout.strip()
    store = KeyStore(data_dir)
    key = store.find(text)
    assert created.returncode == 0 and key and (key.scopes, key.quota) == (("read", "metrics"), 2.5)
    assert key.max_priority == 1
    listed = run(data_dir, "list")
    assert key.id in listed.stdout and "ann" in listed.stdout and "read,metrics" in listed.stdout
    [shown] = json.loads(run(data_dir, "list", "--json").stdout)["keys"]
    assert set(shown) == {"id", "name", "scopes", "quota", "highest_priority", "allow_training", "created", "revoked"}
    assert shown["allow_training"] is False
    assert shown["id"] == key.id
    assert text.rpartition("_")[2] not in listed.stdout and key.sha256 not in json.dumps(shown)
    assert json.loads(run(data_dir, "revoke", key.id, "--json").stdout)["revoked"] > 0
    assert store.find(text) is None
    again = json.loads(run(data_dir, "create", "bob", "--json").stdout)
    assert (found := store.find(again["key"])) and found.scopes == ("generate", "read") and again["name"] == "bob"


@pytest.mark.parametrize(
    "arguments",
    [
        ("revoke", "nobody"),
        ("create", "ann", "--scope", "all"),
        ("create", "ann", "--quota", "-1"),
        ("create", "ann", "--max-priority", "9"),
    ],
)
def test_the_command_line_says_what_is_wrong_in_one_sentence(arguments: tuple[str, ...], tmp_path: Path) -> None:
    ended = run(tmp_path / "data", *arguments)
    [line] = ended.stderr.splitlines()
    assert ended.returncode == 1 and ended.stdout == "" and line.startswith("fewstep: ") and line.endswith(".")


@pytest.mark.skipif(os.getuid() == 0, reason="root may write everywhere")
def test_a_data_directory_that_cannot_be_written_is_one_sentence(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    assert "cannot be written" in run(tmp_path / "data", "create", "ann").stderr


@pytest.mark.parametrize("changed", ["time", "file", "size"])
def test_a_file_is_read_again_whatever_has_changed_of_it(changed: str, store: KeyStore, tmp_path: Path) -> None:
    """A backup may come with its old time, an editor write into the same file, and a key be exchanged for another."""
    _, first = store.create("ann")
    assert store.find(first)
    file = tmp_path / "data" / FILE_NAME
    before, text = file.stat(), file.read_text()
    _, second = KeyStore(tmp_path / "elsewhere").create("ann")
    other = (tmp_path / "elsewhere" / FILE_NAME).read_text()
    assert len(other) == len(text)
    old_time = (before.st_atime_ns, before.st_mtime_ns)
    if changed == "time":
        file.write_text(other)
        os.utime(file, ns=(old_time[0], old_time[1] + 1))
    elif changed == "size":
        file.write_text(other + " ")
        os.utime(file, ns=old_time)
    else:
        part = file.with_name("part")
        part.write_text(other)
        os.utime(part, ns=old_time)
        part.replace(file)
    assert store.find(first) is None and store.find(second)


def test_a_key_was_revoked_when_it_was_revoked_first(store: KeyStore, monkeypatch: pytest.MonkeyPatch) -> None:
    key, _ = store.create("ann")
    for now, revoked in ((1000.9, 1000), (2000.0, 1000)):
        monkeypatch.setattr("service.keys.time.time", lambda now=now: now)
        assert store.revoke(key.id).revoked == revoked


def test_a_file_that_cannot_be_read_closes_a_service(store: KeyStore, tmp_path: Path) -> None:
    """Not even its times are known: whoever breaks it must not be let in."""
    _, text = store.create("ann")
    assert store.find(text)
    file = tmp_path / "data" / FILE_NAME
    file.unlink()
    file.symlink_to(file)
    assert store.required and store.find(text), "what was known stays"
    fresh = another(tmp_path)
    assert fresh.required and fresh.find(text) is None
    with pytest.raises(KeysError, match="cannot be read"):
        fresh.keys()

"""Feedback: kept with consent alone, once, without whose it is, and erased without a trace."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from service.keys import KeyStore
from service.quality.feedback import FeedbackPolicy, entry_of, exported, prompt_digest
from service.queue.feedback_log import FeedbackLog
from tests.service.quality.test_notes import finish, hash_of
from tests.service.support import PATIENCE_S, Queue, Service, a_job, running_service

POLICY = FeedbackPolicy(20.0, most=20, days=1.0)


class Log:
    def __init__(self, queue: Queue) -> None:
        self.queue = queue
        self.log = FeedbackLog(queue.async_client, queue.model, POLICY)

    def note(self, id: str, word: Any, prompt: str = "", image: int = 0, percentile: float = 50.0) -> str:
        digest = prompt_digest(prompt) if prompt else ""
        entry = entry_of(a_job(prompt=prompt), percentile)
        return self.queue.runner.run(self.log.note(id, image, word, digest, entry))

    def prompts(self, key: str | None = None) -> list[dict[str, Any]]:
        return self.queue.runner.run(self.log.prompts(key))

    def erase(self, key: str | None = None) -> int:
        return self.queue.runner.run(self.log.erase(key))


@pytest.fixture
def log(queue: Queue) -> Log:
    return Log(queue)


def low(prompt: str, percentile: float = 5.0) -> dict[str, Any]:
    limits = {"most": 20, "most_per_key": 5, "kept_ms": POLICY.kept_ms}
    return {"low": {"digest": prompt_digest(prompt), "entry": entry_of(a_job(prompt=prompt), percentile), **limits}}


def test_an_export_joins_keys_and_names_none(log: Log) -> None:
    finish(log.queue, low("both", 5.0), key="ann")
    finish(log.queue, low("Both", 3.0), key="ben")
    finish(log.queue, low("lone", 9.0), key="ben")
    rows = log.prompts()
    assert [(row["prompt"], row["percentile"], row["count"]) for row in rows] == [("Both", 3.0, 2), ("lone", 9.0, 1)]
    assert "ann" not in json.dumps(rows) and "ben" not in json.dumps(rows)
    assert [row["prompt"] for row in log.prompts("ann")] == ["both"]
    joined = exported({"a|1": '{"prompt": "p", "percentile": 1, "count": 1, "rejected": 2}',
                       "b|1": '{"prompt": "p", "percentile": 2, "count": 2, "rejected": 1}'})  # fmt: skip
    assert joined == [{"prompt": "p", "percentile": 1, "count": 3, "rejected": 3}]
    words = ("chosen", "rejected", "rerolled")
    parts = [{word: 10**at * key for at, word in enumerate(words)} for key in (1, 2, 4)]  # of three keys
    rows_by_key = {f"k{key}|1": json.dumps({"prompt": "p", "percentile": 1, **part}) for key, part in enumerate(parts)}
    [whole] = exported(rows_by_key)
    assert {word: whole[word] for word in words} == {"chosen": 7, "rejected": 70, "rerolled": 700}


def test_the_last_word_about_an_image_counts_and_counts_once(log: Log) -> None:
    id, _ = finish(log.queue, low("p"), key="ann")
    assert [log.note(id, word, "p") for word in ("rejected", "rejected", "chosen")] == ["ok", "same", "ok"]
    assert log.note(id, "rerolled", "p", image=1) == "ok"
    (row,) = log.prompts()
    assert (row.get("chosen"), row.get("rejected"), row.get("rerolled")) == (1, 0, 1)
    counters = log.queue.client.hgetall(f"{log.queue.prefix}n")
    assert {name: count for name, count in counters.items() if name.startswith("feedback")} == {  # type: ignore[union-attr]
        "feedback_chosen": "1", "feedback_rejected": "0", "feedback_rerolled": "1",
    }  # fmt: skip


def test_without_consent_a_word_is_counted_and_no_prompt_kept(log: Log) -> None:
    id, _ = finish(log.queue, {}, key="ann")
    assert log.note(id, "rejected") == "ok" and log.prompts() == []


def test_a_prompt_that_ranks_high_is_kept_only_where_it_was_not_liked(log: Log) -> None:
    liked, _ = finish(log.queue, {}, key="ann")
    rejected, _ = finish(log.queue, {}, key="ann")
    log.note(liked, "chosen", "liked")
    log.note(rejected, "rejected", "rejected", percentile=80.0)
    assert [(row["prompt"], row["percentile"], row["rejected"]) for row in log.prompts()] == [("rejected", 80.0, 1)]


def test_what_has_no_images_cannot_be_spoken_of(log: Log) -> None:
    assert log.note("0" * 32, "chosen") == "missing"
    assert log.note(log.queue.add(), "chosen") == "queued"


def test_erasing_a_key_leaves_nothing_of_it_and_all_of_the_others(log: Log) -> None:
    before = log.queue.add(key="ann")  # accepted before, drawn after
    spoken, _ = finish(log.queue, low("a prompt of ann", 5.0), key="ann", priority=5)
    finish(log.queue, low("a prompt of ben"), key="ben", priority=5)
    log.note(spoken, "rejected", "a prompt of ann")
    assert log.erase("ann") == 1
    worker = log.queue.consumer("w")
    (claimed,) = worker.claim({log.queue.lane: 1})
    assert worker.finish(before, claimed.token, "done", {"images": []}, notes=low("a late prompt of ann")) == "done"
    log.note(before, "rejected", "a late prompt of ann")
    assert [row["prompt"] for row in log.prompts()] == ["a prompt of ben"]
    kept = [hash_of(log.queue, name) for name in ("fb", "fc")]
    assert "ann" not in json.dumps(kept)
    assert not [name for name in log.queue.client.zrange(f"{log.queue.prefix}fz", 0, -1) if "ann" in str(name)]
    assert log.queue.field(spoken, "feedback") is None
    after, _ = finish(log.queue, low("a new prompt of ann"), key="ann")
    assert {row["prompt"] for row in log.prompts()} == {"a prompt of ben", "a new prompt of ann"}
    assert log.erase() == 2 and log.prompts() == []
    assert not log.queue.client.exists(*(f"{log.queue.prefix}{name}" for name in ("fb", "fz", "fc")))


def test_what_was_accepted_before_everything_is_erased_leaves_nothing_either(log: Log) -> None:
    before = log.queue.add(key="ann")
    log.erase()
    worker = log.queue.consumer("w")
    (claimed,) = worker.claim({log.queue.lane: 1})
    assert worker.finish(before, claimed.token, "done", {"images": []}, notes=low("a late prompt of ann")) == "done"
    log.note(before, "rejected", "a late prompt of ann")
    assert log.prompts() == []
    finish(log.queue, low("a new prompt of ann"), key="ann")
    assert [row["prompt"] for row in log.prompts()] == ["a new prompt of ann"]


def test_what_clients_say_keeps_to_the_bounds_of_the_log(log: Log) -> None:
    """A tenth of the prompts for each key, and each for as many days as the policy says."""
    ids = [finish(log.queue, {}, key="ann")[0] for _ in range(3)]
    assert (POLICY.most_per_key, POLICY.kept_ms) == (2, 86_400_000)
    assert [log.note(id, "rejected", f"prompt {k}") for k, id in enumerate(ids)] == ["ok"] * 3
    assert [row["prompt"] for row in log.prompts()] == ["prompt 0", "prompt 1"]
    kept = {name: log.queue.client.pttl(log.queue.prefix + name) for name in ("fb", "fz", "fc")}
    assert all(POLICY.kept_ms - 60_000 < kept_ms <= POLICY.kept_ms for kept_ms in kept.values()), kept


def test_a_prompt_that_is_too_old_makes_room_for_the_next(log: Log) -> None:
    for prompt in ("old", "young"):
        finish(log.queue, low(prompt), key="ann")
    fields = {
        json.loads(text)["prompt"]: name for name, text in log.queue.client.hgetall(log.queue.prefix + "fb").items()
    }
    now_us = log.queue.client.time()[0] * 1e6
    ages = {fields["old"]: now_us - 86_460e6, fields["young"]: now_us - 86_340e6}
    log.queue.client.zadd(f"{log.queue.prefix}fz", ages)
    finish(log.queue, low("new"), key="ben")
    assert {row["prompt"] for row in log.prompts()} == {"young", "new"}
    assert log.queue.client.hgetall(f"{log.queue.prefix}fc") == {"ann": "1", "ben": "1"}


def test_an_erasure_is_remembered_for_as_long_as_a_job_from_before_may_last(log: Log) -> None:
    assert log.erase("a|b") == 0
    assert 8 * 86_400 - 60 < log.queue.client.ttl(f"{log.queue.prefix}fe") <= 8 * 86_400
    at_once, _ = finish(log.queue, {}, key="a|b")
    log.queue.client.hset(f"{log.queue.prefix}fe", "a|b", log.queue.field(at_once, "created_us"))
    log.note(at_once, "rejected", "of the same moment")
    assert log.prompts() == []
    finish(log.queue, low("later"), key="a|b")
    assert [row["prompt"] for row in log.prompts("a|b")] == ["later"] and log.prompts("a") == []
    assert log.erase("a") == 0 and log.erase("a|b") == 1


@pytest.fixture(scope="module")
def keyed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Service, dict[str, str]]]:
    """A service that keeps every prompt, and keys: of one who consents, of one who does not, of the operator."""
    from service.settings import Settings

    folder = tmp_path_factory.mktemp("feedback") / "data"
    store = KeyStore(folder)
    keys = {
        "yes": store.create("yes", allow_training=True)[1], "no": store.create("no")[1],
        "admin": store.create("admin", ["admin"])[1],
    }  # fmt: skip
    assert Settings.model_fields["feedback_percentile"].default == 20.0
    with running_service(folder) as live:
        yield live, keys


def ask(keyed: tuple[Service, dict[str, str]], key: str, method: str, path: str, **options: Any) -> httpx.Response:
    live, keys = keyed
    headers = {"Authorization": f"Bearer {keys[key]}"}
    return httpx.request(method, f"{live.url}/{path}", headers=headers, timeout=PATIENCE_S, trust_env=False, **options)


def test_consent_is_the_keys_unless_the_request_says_otherwise(keyed: tuple[Service, dict[str, str]]) -> None:
    """A word of the client brings a prompt into the log, however its image ranks."""
    ids = {}
    for key, consent in (("yes", None), ("yes", False), ("no", None), ("no", True)):
        prompt = f"of {key}, {consent}"
        body = {"prompt": prompt, "user": "somebody", "metadata": {"page": "x12"}}
        if consent is not None:
            body["allow_training"] = consent
        ids[prompt] = ask(keyed, key, "POST", "generate", json=body).json()["id"]
        said = ask(keyed, key, "POST", f"jobs/{ids[prompt]}/feedback", json={"feedback": "rejected"})
        assert said.status_code == 200, said.text
        assert said.json()["trains"] is (consent if consent is not None else key == "yes")
    kept = ask(keyed, "admin", "GET", "admin/feedback")
    assert {row["prompt"] for row in kept.json()["data"]} == {"of yes, None", "of no, True"}
    assert "somebody" not in kept.text and "x12" not in kept.text
    for key in ("yes", "no"):
        id = keyed[1][key].split("_")[1]
        assert id not in kept.text
        assert ask(keyed, "admin", "POST", "admin/feedback/erase", params={"key": id}).json()["prompts"] == 1
    assert ask(keyed, "admin", "GET", "admin/feedback").json()["data"] == []


def test_a_word_that_makes_no_sense_is_refused(keyed: tuple[Service, dict[str, str]]) -> None:
    id = ask(keyed, "yes", "POST", "generate", json={"prompt": "p"}).json()["id"]
    assert ask(keyed, "no", "POST", f"jobs/{id}/feedback", json={"feedback": "chosen"}).status_code == 404
    assert ask(keyed, "yes", "POST", f"jobs/{id}/feedback", json={"feedback": "nice"}).status_code == 422
    many = ask(keyed, "yes", "POST", f"jobs/{id}/feedback", json={"feedback": "chosen", "image": 1})
    assert many.status_code == 404 and "1 images" in many.json()["error"]["message"]
    assert ask(keyed, "yes", "GET", "admin/feedback").status_code == 403


def test_the_command_line_exports_what_training_reads_and_erases(
    keyed: tuple[Service, dict[str, str]], tmp_path: Path
) -> None:
    from typer.testing import CliRunner

    from fewstep.cli import app
    from training.prompts import copies, read

    options = ["--url", keyed[0].url, "--api-key", keyed[1]["admin"]]
    CliRunner().invoke(app, ["feedback", "erase", "--all", *options])
    for k in range(2):
        id = ask(keyed, "yes", "POST", "generate", json={"prompt": f"prompt {k}"}).json()["id"]
        ask(keyed, "yes", "POST", f"jobs/{id}/feedback", json={"feedback": "rerolled"})
    file = tmp_path / "feedback.jsonl"
    run = CliRunner().invoke(app, ["feedback", "export", str(file), *options])
    assert run.exit_code == 0 and run.output == f"{file}: 2 prompts\n"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert sorted(read(file)) == ["prompt 0", "prompt 1"] and [row["rerolled"] for row in rows] == [1, 1]
    assert copies(file) == [1 + round(9 * (1 - row["percentile"] / 2 / 100)) for row in rows]  # they were disliked
    assert CliRunner().invoke(app, ["feedback", "erase", *options]).exit_code == 2
    erased = CliRunner().invoke(app, ["feedback", "erase", "--all", *options])
    assert erased.output == "2 prompts were erased.\n"
    assert CliRunner().invoke(app, ["feedback", "export", *options]).output == ""


def test_prompts_are_exported_the_lowest_first_and_equal_ones_by_their_words() -> None:
    ranks = {"z": 1.0, "b": 2.5, "a": 2.5, "c": 10.0}
    rows = {
        f"k|{prompt}": json.dumps({"prompt": prompt, "percentile": rank, "count": 1}) for prompt, rank in ranks.items()
    }
    assert [entry["prompt"] for entry in exported(rows)] == ["z", "a", "b", "c"]
    joined = {**rows, "other|c": json.dumps({"prompt": "C", "percentile": 0.5, "count": 2, "chosen": 3})}
    assert exported(joined)[0] == {"prompt": "C", "percentile": 0.5, "count": 3, "chosen": 3}
    assert [entry["prompt"] for entry in exported(joined, "other")] == ["C"]

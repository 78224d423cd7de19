"""What commands print of an answer, character by character; no service."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from fewstep import output
from fewstep.answers import FINAL, Answer, Event, Job, Picture
from fewstep.cli import app
from fewstep.client import Client
from fewstep.commands import bench
from fewstep.commands.generate import _file
from fewstep.errors import JobFailed, Refused, WrongUse
from fewstep.load.drive import Outcome, Sample
from fewstep.load.report import report
from fewstep.load.workload import Mix
from fewstep.options import write_file

JOB: dict[str, Any] = {
    "id": "j", "status": "done", "created": 0, "model": "m", "model_version": "1", "prompt": "p", "seeds": [1],
}  # fmt: skip
DATA = b"the bytes of an image"
PICTURE: dict[str, Any] = {
    "seed": 7, "width": 64, "height": 64, "sha256": "", "reward": {"trained": 0.5, "heldout": -1.25},
    "b64_json": base64.b64encode(DATA).decode(),
}  # fmt: skip
TIMES = {"queue_s": 0.0, "inference_s": 0.0, "score_s": 0.0, "encode_s": 0.0, "total_s": 1.5}
ANSWER: dict[str, Any] = {
    "id": "a", "created": 0, "model": "m", "model_version": "3", "runtime": "r", "batch_size": 4, "data": [PICTURE],
    "timings": TIMES,
}  # fmt: skip
FLOOR = {"scorer": "t", "min_reward": "p20", "asked_score": 0.5, "score": 0.25, "lowered": True}


def candidate(rank: int) -> dict[str, Any]:
    return {"seed": rank, "steps": 4, "round": 0, "rank": rank, "reward": {}}


def run(monkeypatch: pytest.MonkeyPatch, answer: Any, *arguments: object, method: str = "operate") -> Any:
    monkeypatch.setattr(Client, method, lambda self, *arguments, **options: answer)
    monkeypatch.setenv("FEWSTEP_URL", "http://127.0.0.1:9")
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.mark.parametrize(
    ("line", "rows", "table"),
    [
        ("models list",
         [{"model": "m", "version": "2", "state": "refused", "latest": True, "workers": 3, "reason": "No room."}],
         ["MODEL  VERSION  STATE            WORKERS  REASON", "m      2        refused  latest  3        No room."]),
        ("workers list",
         [{"id": "w", "host": "h", "state": "ready", "jobs": 2, "runtime": "onnx", "models": ["m/1", "n/1"]},
          {"id": "v", "host": "h", "state": "loading", "jobs": 0, "runtime": "", "models": []}],
         ["ID  HOST  STATE    JOBS  RUNTIME  MODELS", "w   h     ready    2     onnx     m/1, n/1",
          "v   h     loading  0     -        -"]),
        ("dlq list",
         [{"id": "j", "died": 60.0, "attempts": 3, "model": "m", "model_version": "1", "key": "k", "prompt": "a cat",
           "prompt_chars": 5, "prompt_sha256": "ab"},
          {"id": "i", "died": 86400.0, "attempts": 1, "model": None, "model_version": None, "key": "k", "prompt": None,
           "prompt_chars": 9, "prompt_sha256": "cd"}],
         ["ID  DIED              WORKERS  MODEL  KEY  PROMPT", "j   1970-01-01 00:01  3        m@1    k    a cat",
          "i   1970-01-02 00:00  1        -      k    9 characters, cd"]),
        ("keys usage", [{"day": "2026-01-01", "key": "k", "jobs": 2, "images": 3, "megapixel_steps": 0.048}],
         ["DAY         KEY  JOBS  IMAGES  MEGAPIXEL-STEPS", "2026-01-01  k    2     3       0.048"]),
    ],
)  # fmt: skip
def test_a_list_is_a_table_and_with_json_the_answer_itself(
    line: str, rows: list[dict[str, Any]], table: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    done = run(monkeypatch, {"data": rows}, *line.split())
    assert (done.exit_code, done.stdout.splitlines()) == (0, table)
    assert json.loads(run(monkeypatch, {"data": rows}, *line.split(), "--json").stdout) == {"data": rows}


def test_keys_are_listed_with_their_times_in_utc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entry = {"id": "0" * 12, "name": "ann", "scopes": ["read", "admin"], "sha256": "x", "created": 60, "revoked": None}
    more = {**entry, "id": "1" * 12, "name": "bob", "scopes": ["read"], "revoked": 86400, "quota": 2.5,
            "allow_training": True}  # fmt: skip
    (tmp_path / "keys.json").write_text(json.dumps({"format_version": 1, "keys": [entry, more]}))
    done = CliRunner().invoke(app, ["keys", "list", "--data-dir", str(tmp_path)])
    assert [line.split("  ") for line in done.stdout.splitlines()] == [
        line.split("  ")
        for line in (
            "id            name  scopes      quota  priority  trains  created           revoked",
            "000000000000  ann   read,admin  -      5         False   1970-01-01 00:01  -",
            "111111111111  bob   read        2.5    0         True    1970-01-01 00:01  1970-01-02 00:00",
        )
    ]
    empty = CliRunner().invoke(app, ["keys", "list", "--data-dir", str(tmp_path / "none")])
    assert empty.stdout == "There are no keys: the service needs none and serves this machine only.\n"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, ""),
        ({"steps": 4, "candidates": [candidate(1)]}, "  (4 steps, the only candidate)"),
        ({"steps": 2, "candidates": [candidate(1), candidate(2)], "below_floor": False}, "  (2 steps, best of 2)"),
        ({"steps": 2, "candidates": [candidate(1), candidate(2)], "below_floor": True},
         "  (2 steps, best of 2, below the floor)"),
    ],
)  # fmt: skip
def test_how_a_picture_was_chosen(changes: dict[str, Any], words: str) -> None:
    assert output.choice(Picture(**{**PICTURE, **changes})) == words


def test_what_is_said_of_a_floor() -> None:
    def remarks(**changes: Any) -> list[str]:
        return output.remarks(Answer(**{**ANSWER, **changes}))

    assert remarks() == remarks(floor={**FLOOR, "lowered": False}) == []
    lowered = "Load lowered the floor from +0.50 to +0.25."
    assert remarks(floor=FLOOR) == [lowered]
    ended = "Not every image below the floor was tried again: deadline."
    assert remarks(floor=FLOOR, ended_by="deadline") == [lowered, ended]


def test_generate_writes_each_file_and_says_what_is_in_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answer = Answer(**{**ANSWER, "data": [PICTURE, {**PICTURE, "seed": 8}], "floor": FLOOR})
    file = tmp_path / "x.png"
    done = run(monkeypatch, answer, "generate", "p", "-n", 2, "-o", file, method="generate")
    scores = "trained +0.50  heldout -1.25"
    assert done.stdout.splitlines() == [f"{tmp_path}/x-{seed}.png  seed {seed}  {scores}" for seed in (7, 8)]
    assert done.stderr.splitlines() == [
        "1500 ms in all, m 3, batch of 4", "Load lowered the floor from +0.50 to +0.25.",
    ]  # fmt: skip
    assert (tmp_path / "x-7.png").read_bytes() == (tmp_path / "x-8.png").read_bytes() == DATA
    told = json.loads(run(monkeypatch, answer, "generate", "p", "-o", file, "--json", method="generate").stdout)
    assert [one["file"] for one in told["data"]] == [f"{tmp_path}/x-{seed}.png" for seed in (7, 8)]
    assert "b64_json" not in told["data"][0] and told["model_version"] == "3"
    assert (_file(file, 7, 1), _file(file, 7, 2)) == (file, tmp_path / "x-7.png")


def test_a_file_that_cannot_be_written_is_one_sentence(tmp_path: Path) -> None:
    assert write_file(tmp_path / "a", b"x").read_bytes() == b"x"
    with pytest.raises(WrongUse, match=rf"^{tmp_path}/no/a cannot be written: No such file or directory\.$"):
        write_file(tmp_path / "no" / "a", b"x")


def test_a_job_is_shown_with_its_images(monkeypatch: pytest.MonkeyPatch) -> None:
    job = Job(**{**JOB, "timings": TIMES, "data": [{**PICTURE, "url": "http://h/jobs/j/images/0"}]})
    said = run(monkeypatch, job, "jobs", "get", "j", method="job").stdout
    assert said == (
        "j is done: 1 image in 1500 ms.\n  http://h/jobs/j/images/0  seed 7  trained +0.50  heldout -1.25\n"
    )


def test_images_bytes_are_left_out_wherever_they_are() -> None:
    nested = {"a": [PICTURE, (1, {"b64_json": "x", "c": None})], "b": Picture(**PICTURE)}
    shown = output.plain(nested)
    assert "b64_json" not in json.dumps(shown) and shown["a"][1] == [1, {"c": None}]
    assert shown["b"]["reward"] == {"trained": 0.5, "heldout": -1.25}


def test_an_error_is_a_sentence_or_the_object_of_the_api(capsys: pytest.CaptureFixture[str]) -> None:
    error = Refused("No.", 422, code="c", param="seed", request_id="r")
    output.print_error(error, False)
    output.print_error(error, True)
    sentence, document = capsys.readouterr().err.splitlines()
    assert sentence == "fewstep: No."
    assert json.loads(document) == {"error": {
        "message": "No.", "type": "Refused", "param": "seed", "code": "c", "status": 422, "request_id": "r",
    }}  # fmt: skip


def test_json_is_on_one_line_for_a_program_and_indented_for_a_person(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    output.print_json({"é": 1})
    assert capsys.readouterr().out == '{"\\u00e9": 1}\n'
    monkeypatch.setattr(output.sys.stdout, "isatty", lambda: True)
    output.print_json({"a": 1})
    assert capsys.readouterr().out == '{\n  "a": 1\n}\n'


def test_an_answer_is_read_tolerantly_and_never_changes() -> None:
    job = Job(**{**JOB, "of_a_later_release": 1})
    said = {name: getattr(job, name) for name in Job.model_fields if name not in JOB}
    assert {name: value for name, value in said.items() if value not in (None, [], {})} == {
        "priority": 0, "cancelling": False,
    }  # fmt: skip
    assert job.model_extra == {"of_a_later_release": 1}
    with pytest.raises(ValueError, match="frozen"):
        job.status = "failed"
    states = ("queued", "running", "done", "failed", "cancelled", "expired")
    final = {state for state in states if Job(**{**JOB, "status": state}).final}
    assert final == FINAL == {"done", "failed", "cancelled", "expired"}


def test_a_picture_is_its_bytes_and_saved_where_it_is_said(tmp_path: Path) -> None:
    picture = Picture(**PICTURE)
    assert picture.data == DATA and picture.save(tmp_path / "a.png") == tmp_path / "a.png"
    assert picture.save(str(tmp_path / "b.png")).read_bytes() == DATA
    with pytest.raises(WrongUse, match="Client.image"):
        _ = Picture(**{**PICTURE, "b64_json": None}).data
    encoded = {"b64_json": PICTURE["b64_json"]}
    pictures = [Event(name="e", number=1, data=data).picture for data in (encoded, {}, {"b64_json": 7})]
    assert pictures == [DATA, None, None]


def test_the_exit_code_of_what_ended_without_images(monkeypatch: pytest.MonkeyPatch) -> None:
    codes = [
        run(monkeypatch, Job(**{**JOB, "status": status}), "jobs", "wait", "j", method="wait").exit_code
        for status in ("done", "failed", "cancelled", "expired")
    ]
    assert codes == [0, 8, 8, 8] and JobFailed.exit_code == 8


def test_the_report_of_a_load_in_words() -> None:
    stages = {"queue_s": 0.25, "inference_s": 0.5}
    drawn = [Sample(0.0, 1.0, Outcome(2, None, size, stages)) for size in (1, 4, 4)]
    samples = [*drawn, Sample(1.0, 2.0, Outcome(error="queue_full"))]
    assert bench.sentences(report("l", samples, 4.0, 1.0)).splitlines() == [
        "l: 6 images from 4 requests in 2.00 s",
        "3.0 images/s, 1.5 requests/s (1.0 offered)",
        "goodput  0.8 requests/s within 1000 ms: 75.0% of all",
        "latency  mean 1000 ms  p50 1000 ms  p90 1000 ms  p95 1000 ms  p99 1000 ms  max 1000 ms",
        "stages   queue 250 ms  inference 500 ms",
        "batch    images",
        f"    1    {'█' * 20} 2",
        f"    4    {'█' * 40} 4",
        "error    queue_full: 1 requests",
    ]


def test_the_load_that_options_describe(tmp_path: Path) -> None:
    mix = Mix(["a"], {})
    trace = tmp_path / "t.jsonl"
    trace.write_text("".join(f'{{"at_s": {at_s}}}\n' for at_s in (0, 1, 2)))

    def load(**options: Any) -> tuple[Any, ...]:
        usual = {"requests": 100, "users": 4, "seconds": None, "rate": None, "trace": None, "seed": 1}
        found = bench._load(mix, **{**usual, **options})
        return found.name, found.count, found.seconds, found.total, found.users

    assert load() == ("closed loop, 4 users", 100, None, 100, 4)
    assert load(seconds=3.0) == ("closed loop, 4 users", None, 3.0, None, 4)
    assert load(trace=trace) == ("trace t.jsonl", None, 2.0, 3, 4)
    assert load(trace=trace, seconds=2.0) == ("trace t.jsonl", None, 2.0, 2, 4)
    name, count, seconds, total, _ = load(rate=50.0)
    assert (name, count, seconds) == ("open loop, 50 requests/s", None, 60.0) and 2700 < total < 3300
    assert load(rate=50.0, seconds=2.0)[2] == 2.0

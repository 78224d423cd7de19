"""Each option of each command arrives in its field, and each answer is told in its sentence; no service."""

from __future__ import annotations

import inspect
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from typer.testing import CliRunner

from fewstep.answers import Event, Feedback, Job
from fewstep.cli import app
from fewstep.client import Client
from fewstep.commands import bench
from fewstep.commands.generate import _floor, _format, _steps
from fewstep.commands.jobs import _sentence
from fewstep.commands.models import canary
from fewstep.errors import WrongUse
from fewstep.load.drive import Outcome, Sample
from fewstep.output import job_line
from service.keys import KeyStore
from service.quality.canary import Plan

JOB: dict[str, Any] = {
    "id": "j", "status": "done", "created": 0, "model": "m", "model_version": "1", "prompt": "p", "seeds": [1],
}  # fmt: skip
PICTURE = {"seed": 7, "width": 64, "height": 64, "sha256": "", "reward": {"trained": 0.5, "heldout": -1.25}}
TIMES = {"queue_s": 0.0, "inference_s": 0.0, "score_s": 0.0, "encode_s": 0.0, "total_s": 1.5}


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """What the client was asked for, by operation; each answer says what the last one said."""
    found: list[tuple[Any, ...]] = []

    def note(name: str, answer: Any) -> None:
        def call(self: Client, *arguments: Any, **options: Any) -> Any:
            found.append((name, *arguments, options))
            return answer

        monkeypatch.setattr(Client, name, call)

    note("submit", Job(**JOB))
    note("jobs", [Job(**{**JOB, "key": "k"})])
    note("feedback", Feedback(id="j", image=2, feedback="rejected", trains=True))
    note("wait", Job(**{**JOB, "status": "expired"}))
    note("image", b"bytes")
    monkeypatch.setenv("FEWSTEP_URL", "http://127.0.0.1:9")
    return found


def run(*arguments: object) -> tuple[int, str]:
    done = CliRunner().invoke(app, [str(argument) for argument in arguments])
    return done.exit_code, done.stdout


def test_each_option_of_generate_is_a_field(asked: list[tuple[Any, ...]]) -> None:
    code, said = run(
        "generate", "p", "--detach", "-o", "x.webp", "-n", 3, "--seed", 7, "--steps", 2, "--guidance", 3.5, "--best-of",
        4,
        "--rank-by", "heldout", "--min-reward", "p20", "--cascade", "1,2", "--model", "m", "--model-version", "2",
        "--size", "64x32", "--frames", 9, "--fps", 8, "--quality", 80, "--priority", -1, "--timeout", 30,
        "--webhook", "https://a", "--no-training",
    )  # fmt: skip
    assert (code, said) == (0, "j\n")
    [(_, prompt, options)] = asked
    assert prompt == "p" and options == {
        "n": 3, "seed": 7, "num_inference_steps": 2, "guidance_scale": 3.5, "best_of": 4, "rank_by": "heldout",
        "min_reward": "p20", "cascade": [1, 2], "model": "m", "model_version": "2", "size": "64x32", "num_frames": 9,
        "fps": 8, "output_format": "webp", "output_compression": 80, "priority": -1, "timeout_s": 30.0,
        "webhook_url": "https://a", "allow_training": False,
    }  # fmt: skip


def test_what_is_not_said_is_left_to_the_service(asked: list[tuple[Any, ...]]) -> None:
    assert run("generate", "p", "--detach")[0] == 0
    [(_, _, options)] = asked
    assert {name: value for name, value in options.items() if value is not None} == {"n": 1, "output_format": "png"}


@pytest.mark.parametrize(
    ("name", "format"),
    [("a.png", "png"), ("a.JPG", "jpeg"), ("a.jpeg", "jpeg"), ("a.webp", "webp"), ("a.mp4", "mp4"), ("-", "png")],
)
def test_the_name_says_the_format(name: str, format: str) -> None:
    assert _format(Path(name), None) == format


def test_floors_and_cascades_are_read() -> None:
    assert [_floor(text) for text in (None, "0.5", "-1", "p20", "nan", "inf")] == [None, 0.5, -1.0, "p20", "nan", "inf"]
    assert (_steps(None), _steps("2"), _steps("2,4,8")) == (None, [2], [2, 4, 8])
    with pytest.raises(WrongUse, match="step counts separated by commas"):
        _steps("2;4")


def test_options_of_jobs(asked: list[tuple[Any, ...]], tmp_path: Path) -> None:
    assert run("jobs", "list", "--limit", 7, "--status", "done", "--status", "failed", "--all")[0] == 0
    code, said = run("jobs", "feedback", "j", "rejected", "--image", 2)
    assert (code, said) == (0, "Image 2 of j is rejected; its prompt may train later students.\n")
    assert run("jobs", "wait", "j", "--timeout", 3)[0] == 8, "it ended without images"
    assert run("jobs", "image", "j", "-o", tmp_path / "x.png", "-k", 2)[0] == 0
    assert (tmp_path / "x.png").read_bytes() == b"bytes"
    assert asked == [
        ("jobs", 7, {"status": ["done", "failed"], "everybody": True}), ("feedback", "j", "rejected", 2, {}),
        ("wait", "j", 3.0, {}), ("image", "j", 2, {}),
    ]  # fmt: skip


def test_the_list_names_the_owner_only_where_all_are_listed(asked: list[tuple[Any, ...]]) -> None:
    head, row = run("jobs", "list")[1].splitlines()
    assert head.split() == ["ID", "STATUS", "CREATED", "IMAGES", "PROMPT"] and row.split()[-1] == "p"
    head, row = run("jobs", "list", "--all")[1].splitlines()
    assert head.split() == ["ID", "STATUS", "CREATED", "IMAGES", "KEY", "PROMPT"] and row.split()[-2:] == ["k", "p"]


CANARY = {"model": "m", "candidate": "2", "base": "1", "state": "running", "reason": "", "pairs": 3,
          "rewards": {"t": {"mean": -0.5, "half_width": 0.25}, "h": {"mean": 0.5, "half_width": None}}}  # fmt: skip
VERSION = {"model": "m", "version": "2", "state": "serving", "latest": True}
WORKER = {"id": "w", "state": "paused"}
OPERATIONS: list[tuple[str, tuple[str, str], dict[str, Any], dict[str, Any], str | None]] = [
    ("models load m 2", ("POST", "admin/models/m/2/load"), {"wait_s": 120.0}, VERSION,
     "m 2 is serving and its model's latest version.\n"),
    ("models load m/x 2 --wait 5", ("POST", "admin/models/m%2Fx/2/load"), {"wait_s": 5.0}, {**VERSION, "latest": False},
     "m 2 is serving.\n"),
    ("models promote m 2", ("POST", "admin/models/m/2/promote"), {}, VERSION, None),
    ("models unload m 2 --wait 0", ("POST", "admin/models/m/2/unload"), {"wait_s": 0.0}, VERSION, None),
    ("models canary m 2", ("POST", "admin/canaries/m/2/start"),
     {"share": 0.05, "margin": 0.1, "failures": 0.02, "slowdown": 1.25, "wait_s": 120.0}, CANARY,
     "m 2 against 1: running; 3 pairs; h +0.500; t -0.500 ± 0.250.\n"),
    ("models canary m 2 --share 0.5 --margin 0.2 --failures 0.3 --slowdown 2 --wait 7",
     ("POST", "admin/canaries/m/2/start"),
     {"share": 0.5, "margin": 0.2, "failures": 0.3, "slowdown": 2.0, "wait_s": 7.0}, CANARY, None),
    ("models canary m 2 --stop", ("POST", "admin/canaries/m/2/stop"), {},
     {**CANARY, "state": "stopped", "reason": "by the operator", "rewards": {}},
     "m 2 against 1: stopped (by the operator); 3 pairs.\n"),
    ("models canaries", ("GET", "admin/canaries"), {}, {"data": []}, "There was no canary yet.\n"),
    ("workers pause w", ("POST", "admin/workers/w/pause"), {}, WORKER,
     "w is paused: it takes no work until it is resumed.\n"),
    ("workers resume w", ("POST", "admin/workers/w/resume"), {}, {**WORKER, "state": "ready"},
     "w is ready and takes work.\n"),
    ("workers drain w", ("POST", "admin/workers/w/drain"), {}, {**WORKER, "state": "draining"},
     "w is draining: it finishes its jobs and ends.\n"),
    ("workers list", ("GET", "admin/workers"), {}, {"data": []}, "No worker is alive.\n"),
    ("dlq list --limit 7", ("GET", "admin/dlq"), {"limit": 7}, {"data": []}, "No job was given up.\n"),
    ("dlq retry a/b", ("POST", "admin/dlq/a%2Fb/retry"), {}, {"retried_as": "n"}, "a/b is retried as n.\n"),
    ("dlq drop j", ("POST", "admin/dlq/j/drop"), {}, {}, "j was dropped.\n"),
    ("keys usage --days 3", ("GET", "admin/usage"), {"days": 3}, {"data": []}, "There was no usage in that time.\n"),
    ("feedback export --key k", ("GET", "admin/feedback"), {"key": "k"}, {"data": [{"prompt": "é"}]},
     '{"prompt": "é"}\n'),
    ("feedback export", ("GET", "admin/feedback"), {}, {"data": []}, ""),
    ("feedback erase --key k", ("POST", "admin/feedback/erase"), {"key": "k"}, {"prompts": 2},
     "2 prompts were erased.\n"),
    ("feedback erase --all", ("POST", "admin/feedback/erase"), {"key": "all"}, {"prompts": 2}, None),
]  # fmt: skip


@pytest.mark.parametrize(("line", "call", "query", "answer", "said"), OPERATIONS)
def test_an_operators_command_is_one_call_and_one_sentence(
    line: str, call: tuple[str, str], query: dict[str, Any], answer: dict[str, Any], said: str | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    calls: list[tuple[tuple[str, ...], dict[str, Any]]] = []

    def operate(self: Client, *arguments: str, **options: Any) -> dict[str, Any]:
        calls.append((arguments, options))
        return answer

    monkeypatch.setattr(Client, "operate", operate)
    code, printed = run(*line.split(), "--url", "http://127.0.0.1:9")
    assert (code, calls) == (0, [(call, query)]) and said in (None, printed)


@pytest.mark.parametrize("line", ["feedback erase", "feedback erase --key k --all"])
def test_erasing_names_one_key_or_all(line: str) -> None:
    assert run(*line.split())[0] == 2


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"status": "queued", "queue": {"position": 3, "predicted_wait_s": 1.0}},
         "j is queued; 3 jobs are ahead of it."),
        ({"status": "failed", "error": {"message": "No."}}, "j is failed: No."),
        ({"timings": TIMES, "data": [PICTURE]}, "j is done: 1 image in 1500 ms."),
        ({"timings": TIMES, "data": [PICTURE, PICTURE]}, "j is done: 2 images in 1500 ms."),
        ({"timings": TIMES, "data": [PICTURE], "progress": 100}, "j is done: 1 video in 1500 ms."),
        ({"status": "running"}, "j is running."),
        ({"status": "running", "cancelling": True}, "j is running and is being cancelled."),
    ],
)  # fmt: skip
def test_a_job_is_one_sentence(fields: dict[str, Any], sentence: str) -> None:
    assert job_line(Job(**{**JOB, **fields})) == sentence


@pytest.mark.parametrize(
    ("name", "data", "sentence"),
    [
        ("queued", {"position": 2}, "queued; 2 jobs are ahead of it"),
        ("queued", {}, "queued"),
        ("started", {"queue_s": 1.234}, "started after 1.23 s"),
        ("image_generation.partial_image", {"index": 1, "partial_image_index": 0}, "image 1: preview 1"),
        ("image_generation.completed", {"index": 0, **PICTURE}, "image 0: seed 7  trained +0.50  heldout -1.25"),
        ("done", {}, "done"),
    ],
)
def test_an_event_is_one_line(name: str, data: dict[str, Any], sentence: str) -> None:
    assert _sentence(Event(name=name, number=None, data=data)) == sentence


def test_what_a_canary_must_show_is_by_default_what_the_service_says() -> None:
    said = {name: one.default for name, one in inspect.signature(canary).parameters.items()}
    assert {name: said[name] for name in ("margin", "failures", "slowdown")} == {
        name: value for name, value in asdict(Plan()).items() if name != "alpha"
    }
    assert said["share"] == 0.05, "as the service's own, and docs/reward-serving.md"


@pytest.mark.parametrize(
    ("options", "made"),
    [
        ((), (["generate", "read"], None, None, False)),
        (("--quota", 0, "--max-priority", 0, "--allow-training"), (["generate", "read"], 0.0, 0, True)),
        (
            ("-s", "admin", "-s", "metrics", "--quota", 2.5, "--max-priority", -5),
            (["admin", "metrics"], 2.5, -5, False),
        ),
    ],
)
def test_a_key_is_made_as_it_is_asked_for_and_nought_is_not_nothing(
    options: tuple[Any, ...], made: tuple[Any, ...], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked = list[tuple[Any, ...]]()

    def create(store: KeyStore, *about: Any) -> Any:
        asked.append(about)
        return SimpleNamespace(id="k", scopes=("generate",)), "the key"

    monkeypatch.setattr(KeyStore, "create", create)
    code, said = run("keys", "create", "ann", *options, "--data-dir", tmp_path)
    assert (code, said.splitlines()[0], asked) == (0, "the key", [("ann", *made)])


def test_where_an_image_cannot_be_written_none_is_generated(asked: list[tuple[Any, ...]], tmp_path: Path) -> None:
    lines = [("-o", tmp_path / "nowhere" / "x.png"), ("-o", "-", "-n", 2)]
    assert [run("generate", "p", *options)[0] for options in lines] == [2, 2] and asked == []


@pytest.mark.parametrize(("failed", "code"), [(0, 0), (1, 8)])
def test_a_load_with_errors_has_an_exit_code(failed: int, code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    async def load(*_: object) -> list[Sample]:
        return [Sample(0.0, 1.0, Outcome(1)), *[Sample(0.0, 1.0, Outcome(error="queue_full"))] * failed]

    monkeypatch.setattr(bench, "_run", load)
    assert run("bench", "--json")[0] == code


def test_each_option_of_bench_is_a_field_of_its_requests(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    loads = list[tuple[Any, ...]]()

    async def load(*about: Any) -> list[Sample]:
        loads.append(about)
        return [Sample(0.0, 1.0, Outcome(1))]

    monkeypatch.setattr(bench, "_run", load)
    (tmp_path / "prompts").write_text("a\n\n b \n")
    code, _ = run(
        "bench", "--requests", 7, "--concurrency", 3, "-n", 1, "-n", "2:3", "--steps", 4, "--size", "64x32", "--model",
        "m:1", "--prompts", tmp_path / "prompts", "--api", "openai", "--warmup", 5, "--timeout", 6, "--seed", 8,
        "--url", "http://h", "--api-key", "k", "--json",
    )  # fmt: skip
    [(api, url, key, timeout_s, found, warmup)] = loads
    assert (code, api, url, key, timeout_s, warmup) == (0, "openai", "http://h", "k", 6.0, 5)
    assert (found.count, found.users, found.seed, found.mix.prompts) == (7, 3, 8, ("a", "b"))
    assert {name: (choice.values, choice.weights) for name, choice in found.mix.fields.items()} == {
        "n": ([1, 2], [1.0, 3.0]), "num_inference_steps": ([4], [1.0]), "size": (["64x32"], [1.0]),
        "model": (["m"], [1.0]),
    }  # fmt: skip

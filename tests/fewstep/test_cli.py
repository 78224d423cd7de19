"""The command line against a real service: what it prints, what it writes, and its exit codes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner, Result

from fewstep.cli import app
from fewstep.client import Client
from tests.fewstep.sleeping import instead_of_sleep
from tests.service.support import REPOSITORY, Service, clean_environment, expected_pixels, pixels

PROMPT = "a red heart above a blue star"


def call(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture
def fewstep(live: Service, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    monkeypatch.setenv("FEWSTEP_URL", live.url)
    monkeypatch.chdir(tmp_path)
    return call


def test_generate_writes_the_picture(fewstep: Any, tmp_path: Path) -> None:
    done = fewstep("generate", PROMPT, "-o", "heart.png", "--seed", 7, "--steps", 2)
    assert done.exit_code == 0, done.output
    assert (pixels((tmp_path / "heart.png").read_bytes()) == expected_pixels(PROMPT, 7, 2)).all()
    assert done.stdout.startswith("heart.png  seed 7  trained ") and "in all" in done.stderr


@pytest.mark.parametrize(("name", "format"), [("a.jpg", "JPEG"), ("a.webp", "WEBP"), ("a.PNG", "PNG")])
def test_the_files_name_says_the_format(fewstep: Any, tmp_path: Path, name: str, format: str) -> None:
    assert fewstep("generate", PROMPT, "-o", name).exit_code == 0
    with Image.open(tmp_path / name) as image:
        assert image.format == format


def test_several_pictures_have_their_seeds_in_their_names(fewstep: Any, tmp_path: Path) -> None:
    done = fewstep("generate", PROMPT, "-n", 3, "--seed", 7, "-o", "x.png", "--json")
    report = json.loads(done.stdout)
    assert [picture["file"] for picture in report["data"]] == ["x-7.png", "x-8.png", "x-9.png"]
    assert all("b64_json" not in picture for picture in report["data"])
    for picture in report["data"]:
        drawn = pixels((tmp_path / picture["file"]).read_bytes())
        assert np.array_equal(drawn, expected_pixels(PROMPT, picture["seed"]))


def test_a_picture_can_go_to_standard_output(live: Service) -> None:
    command = [sys.executable, "-m", "fewstep", "generate", PROMPT, "--seed", "7", "-o", "-", "--url", live.url]
    done = subprocess.run(command, cwd=REPOSITORY, env=clean_environment({}), capture_output=True, check=True)
    assert (pixels(done.stdout) == expected_pixels(PROMPT, 7)).all() and done.stderr == b""


def test_the_life_of_a_job(fewstep: Any, tmp_path: Path) -> None:
    id = fewstep("generate", PROMPT, "--seed", 7, "--detach").stdout.strip()
    waited = fewstep("jobs", "wait", id)
    assert waited.exit_code == 0 and f"{id} is done: 1 image in " in waited.stdout
    assert json.loads(fewstep("jobs", "get", id, "--json").stdout)["status"] == "done"
    assert fewstep("jobs", "image", id, "-o", "again.png").exit_code == 0
    assert (pixels((tmp_path / "again.png").read_bytes()) == expected_pixels(PROMPT, 7)).all()
    events = [json.loads(line) for line in fewstep("jobs", "watch", id, "--json").stdout.splitlines()]
    assert [event["event"] for event in events] == ["queued", "started", "image_generation.completed", "done"]
    assert fewstep("jobs", "watch", id).stdout.splitlines()[-1] == "done"
    assert json.loads(fewstep("jobs", "cancel", id, "--json").stdout)["status"] == "done"
    listed = fewstep("jobs", "list")
    assert listed.stdout.splitlines()[1].split()[:2] == [id, "done"] and PROMPT in listed.stdout
    assert json.loads(fewstep("jobs", "list", "--json", "--limit", 1).stdout)["data"][0]["id"] == id


def test_a_job_without_a_picture_has_an_exit_code(fewstep: Any) -> None:
    id = fewstep("generate", "fake:raise", "--detach").stdout.strip()
    done = fewstep("jobs", "wait", id)
    assert done.exit_code == 8 and f"{id} is failed" in done.stdout
    watched = fewstep("jobs", "watch", id)
    assert watched.exit_code == 8 and watched.stderr.startswith("fewstep: ")


def test_bench_prints_its_figures(fewstep: Any) -> None:
    done = fewstep("bench", "--requests", 12, "--concurrency", 3, "--warmup", 1, "--json")
    report = json.loads(done.stdout)
    assert (report["requests"], report["images"], report["errors"]) == (12, 12, {})
    assert set(report["latency"]) == {"mean_s", "p50_s", "p90_s", "p95_s", "p99_s", "max_s"}
    done = fewstep("bench", "--requests", 4, "--steps", 1)
    assert done.exit_code == 0 and "images/s" in done.stdout and "p99" in done.stdout and "█" in done.stdout


def test_bench_sends_an_open_load_and_keeps_its_report(fewstep: Any, tmp_path: Path) -> None:
    lines = [{"at_s": 0.3, "prompt": "a"}, {"at_s": 0.0, "num_inference_steps": 1}, {"at_s": 0.1, "n": 2}]
    (tmp_path / "trace.jsonl").write_text("\n".join(map(json.dumps, lines)))
    done = fewstep("bench", "--trace", "trace.jsonl", "--objective", 60, "-o", "a.json", "--plot", "a.png")
    assert done.exit_code == 0 and "goodput  " in done.stdout and "100.0% of all" in done.stdout, done.output
    kept = json.loads((tmp_path / "a.json").read_text())
    assert (kept["load"], kept["requests"], kept["images"]) == ("trace trace.jsonl", 3, 4)
    assert kept["window_s"] == 0.3 and kept["goodput_share"] == 1.0 and len(kept["series"]) == 1
    with Image.open(tmp_path / "a.png") as image:
        assert image.format == "PNG" and image.width > 800
    done = fewstep("bench", "--rate", 40, "--seconds", 0.5, "--json", "--steps", 1, "--steps", "2:3", "--warmup", 0)
    assert json.loads(done.stdout)["load"] == "open loop, 40 requests/s"


def test_bench_measures_any_server_with_openais_endpoint(fewstep: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEWSTEP_URL", os.environ["FEWSTEP_URL"] + "/v1")
    done = fewstep("bench", "--api", "openai", "--requests", 5, "-n", 2, "--warmup", 1, "--json")
    found = json.loads(done.stdout)
    assert (found["requests"], found["images"], found["errors"], found["batch_sizes"]) == (5, 10, {}, {})
    done = fewstep("bench", "--api", "openai", "--model", "other", "--warmup", 0, "--requests", 3, "--json")
    assert done.exit_code == 8 and json.loads(done.stdout)["errors"] == {"model_not_found": 3}


@pytest.mark.parametrize(
    ("arguments", "code", "sentence"),
    [
        (["generate", PROMPT, "--steps", 3], 3, "num_inference_steps is 3: fake was trained for 1, 2, 4."),
        (["generate", PROMPT, "--model", "x"], 5, "The model 'x' is not served: accepted is fake."),
        (["generate", PROMPT, "-o", "a.gif"], 2, "a.gif does not name an image format"),
        (["generate", PROMPT, "-o", "no/a.png"], 2, "no/a.png cannot be written: there is no directory no."),
        (["generate", PROMPT, "-o", "-", "-n", 2], 2, "Standard output takes one image"),
        (["generate", "fake:raise"], 8, ""),
        (["generate", "fake:sleep=3", "--timeout", 0.1], 7, ""),
        (["jobs", "get", "0" * 32], 5, "There is no such job"),
        (["jobs", "get", "a/b"], 5, "There is no such"),
        (["jobs", "list", "--url", "http://127.0.0.1:9"], 9, "The service cannot be reached"),
        (["jobs", "list", "--url", "nowhere"], 2, "nowhere is not an address"),
        (["bench", "--prompts", "missing.txt"], 2, "missing.txt cannot be read: No such file or directory."),
        (["bench", "--requests", 3, "--steps", 3], 3, "num_inference_steps"),
        (["bench", "--steps", "4:0"], 2, "4:0 is not a value with a positive weight."),
        (["bench", "--steps", "four"], 2, "four is not a value, or a value and its weight"),
        (["bench", "--trace", "missing.jsonl"], 2, "missing.jsonl cannot be read: No such file or directory."),
        (["bench", "--trace", "x", "--rate", 3], 2, "--rate and --trace exclude each other: give one of them."),
        (["bench", "--rate", 0.001, "--seconds", 0.1], 2, "No request arrives within 0.1 s"),
    ],
)
def test_an_error_is_one_sentence_with_an_exit_code(
    fewstep: Any, monkeypatch: pytest.MonkeyPatch, arguments: list[object], code: int, sentence: str
) -> None:
    instead_of_sleep(monkeypatch, lambda seconds: None)
    done = fewstep(*arguments)
    assert done.exit_code == code, done.output
    assert done.stderr.startswith(f"fewstep: {sentence}") and done.stderr.count("\n") == 1 and done.stdout == ""
    report = fewstep(*arguments, "--json")
    assert report.exit_code == code and json.loads(report.stderr)["error"]["message"].startswith(sentence)


def test_wrong_usage_is_code_2(fewstep: Any) -> None:
    for arguments in ([], ["nonsense"], ["generate"], ["generate", PROMPT, "-n", "11"], ["bench", "--requests", "0"]):
        assert fewstep(*arguments).exit_code == 2


def test_every_command_has_help_and_json_where_it_prints_results(fewstep: Any) -> None:
    for command in (["generate"], ["bench"], *(["jobs", name] for name in ("list", "get", "cancel", "watch", "wait"))):
        help = fewstep(*command, "--help")
        assert help.exit_code == 0 and "--json" in help.stdout and "--api-key" in help.stdout


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_shell_can_complete_commands(shell: str) -> None:
    environment = {
        **clean_environment({}), "_FEWSTEP_COMPLETE": f"complete_{shell}", 
        "COMP_WORDS": "fewstep ge", "COMP_CWORD": "1",
        "_TYPER_COMPLETE_ARGS": "fewstep ge", "_TYPER_COMPLETE_FISH_ACTION": "get-args",
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-m", "fewstep"], cwd=REPOSITORY, env=environment, capture_output=True, text=True
    )
    assert "generate" in done.stdout and "bench" not in done.stdout


def test_serve_and_worker_are_the_services_own(tmp_path: Path) -> None:
    """Up to the sentence with which each refuses to start."""

    def run(*arguments: str, **settings: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "fewstep", *arguments]
        environment = clean_environment({"DATA_DIR": str(tmp_path), **settings})
        return subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True)

    refused = run("serve", MODEL=str(tmp_path / "none"), API_KEY="fs_x", URL="http://here")
    assert refused.returncode == 1 and "FEWSTEP_MODEL" in refused.stderr and refused.stderr.count("\n") == 1
    refused = run("worker", "--name", "w", RUNTIME="fake")
    assert refused.returncode == 1 and "FEWSTEP_REDIS_URL is not set" in refused.stderr
    assert "--name" in run("worker", "--help").stdout


def test_a_key_travels_with_every_command(live: Service) -> None:
    with Client(live.url, "fs_any") as client:
        assert client.jobs(1) is not None
    assert call("jobs", "list", "--url", live.url, "--api-key", "not a key").exit_code == 2


def test_the_best_of_several_is_written_and_said_to_be(fewstep: Any, tmp_path: Path) -> None:
    done = fewstep("generate", PROMPT, "--seed", 7, "--best-of", 4, "-o", "x.png")
    assert done.exit_code == 0 and "(4 steps, best of 4)" in done.stdout
    seed = int(done.stdout.split("seed ")[1].split()[0])
    assert np.array_equal(pixels((tmp_path / "x.png").read_bytes()), expected_pixels(PROMPT, seed))
    report = json.loads(fewstep("generate", PROMPT, "--seed", 7, "--best-of", 4, "-o", "x.png", "--json").stdout)
    assert report["data"][0]["candidates"][0]["seed"] == 7 and report["rank_by"] == "trained"


def test_a_floor_and_a_cascade_are_passed_on(fewstep: Any) -> None:
    done = fewstep("generate", PROMPT, "--seed", 7, "--min-reward", 9.5, "--cascade", "1,2", "-o", "x.png", "--json")
    report = json.loads(done.stdout)
    assert report["floor"]["min_reward"] == 9.5 and [one["steps"] for one in report["data"][0]["candidates"]] == [1, 2]
    below = fewstep("generate", PROMPT, "--min-reward", "9.5", "--cascade", "1,2", "-o", "x.png")
    assert "best of 2, below the floor)" in below.stdout
    assert fewstep("generate", PROMPT, "--min-reward", "p50", "--best-of", 2, "-o", "x.png").exit_code == 0
    wrong = fewstep("generate", PROMPT, "--cascade", "2;4", "-o", "x.png")
    assert wrong.exit_code != 0 and "step counts separated by commas" in wrong.stderr

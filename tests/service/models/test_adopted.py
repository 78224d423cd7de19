"""Models that nobody has seen, adopted with rewards, exported and served: each score is that of the published code.

Pipelines and rewards are random, of a fresh seed every time; what a failure prints has it.
"""

from __future__ import annotations

import base64
import io
import os
import secrets
import shutil
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from PIL import Image
from transformers import CLIPModel

from export import run as command
from export.verify import FP32
from rewards.checkpoint import fill
from rewards.clip import ClipReward
from rewards.hps import from_open_clip
from student.bundle import Scorer, read_student
from student.runtimes.manifest import read_manifest
from tests.export.adopting import published as save
from tests.export.adopting import run as adopt
from tests.rewards import published, small
from tests.service.late import answered, check_each_once, load, settled
from tests.service.support import PATIENCE_S, Service, call, eventually, post, running_service, wait_for_models
from tests.student.families import tiny

SEED = secrets.randbelow(2**31)
GATE = "TESTS_ADOPTED_GATE"
PROMPTS = ("a red heart above a blue star", "a blue ring", "star on red", "x", "heart, ring and circle", "a b c")
ASKED = (*PROMPTS[:2], "a green circle", "something that was not measured")
NAMES = {kind: f"tests.service.models.test_adopted-{kind}" for kind in ("Pick", "Hps", "Moody")}
MODELS = {
    "schnell": lambda: tiny.flux(scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0), seed=SEED),
    "turbo": lambda: tiny.sd3(seed=SEED),
}


def open_clip() -> published.OpenClip:
    """HPS as its authors publish it."""
    model = published.OpenClip().eval()
    published.randomise(model, SEED)
    return model


class Pick(ClipReward):
    def __init__(self) -> None:
        super().__init__(small.clip_model(SEED, eos_token_id=2), small.clip_tokenizer(), scaled=True)


class Hps(ClipReward):
    def __init__(self) -> None:
        state = from_open_clip(open_clip().state_dict(), "hps")
        super().__init__(fill(CLIPModel, published.clip_config(), state, "hps"), small.clip_tokenizer(), fit="pad")


class Moody(small.EveryThird):
    """Raises on each third picture; while a file is there, it waits."""

    def score(self, images: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        gate, deadline = Path(os.environ.get(GATE, os.devnull) + ".shut"), time.monotonic() + PATIENCE_S
        while gate.exists() and time.monotonic() < deadline:
            gate.with_suffix(".waits").touch()
            time.sleep(0.01)
        return super().score(images, prompts)


def theirs(kind: str, picture: Image.Image, prompt: str) -> float:
    """What the published code gives a picture, as it lies in its file."""
    if kind == "Pick":
        model = small.clip_model(SEED, eos_token_id=2)
        return float(published.pick_score(model, small.clip_tokenizer(), [picture], [prompt]))
    with torch.no_grad():
        return float(open_clip().score(published.hps_pixels(picture)[None], [prompt]))


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of students: each model adopted with all three rewards."""
    print(f"seed {SEED}")
    work = tmp_path_factory.mktemp("adopted")
    (work / "prompts.txt").write_text("\n".join(PROMPTS))
    for name, make in MODELS.items():
        source, folder = save(work / "published" / name, make()), work / "models" / name
        rewards = ",".join(f"tests.service.models.test_adopted:{kind}" for kind in NAMES)
        code, said = adopt(
            source, "--steps", "2", "--size", "32x64", "--reward", rewards, "--prompts", work / "prompts.txt",
            "--images", "24", "--seeds", "2", "--out", work / name,
        )  # fmt: skip
        assert code == 0, said
        folder.mkdir(parents=True)
        shutil.move(work / name, folder / "1")
    return work / "models"


@pytest.fixture(scope="module", params=["torch", "onnx-staged-fp32"])
def service(request: pytest.FixtureRequest, models: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Served at once by torch, and by the compiled runtime once it is exported."""
    settings = {"RUNTIME": "torch"} if request.param == "torch" else {"RUNTIME": "auto"}
    if request.param != "torch":
        for name in MODELS:
            command.run(student=models / name / "1", to="onnx")
    folder = tmp_path_factory.mktemp("adopted")
    with running_service(folder / "data", MODELS=str(models), THREADS="1", **settings) as live:
        wait_for_models(live, models)
        yield live, request.param


@pytest.mark.parametrize("model", sorted(MODELS))
def test_every_score_is_that_of_the_published_code_on_the_picture_that_was_sent(
    service: tuple[Service, str], models: Path, model: str
) -> None:
    live, runtime = service
    scorers, seen = read_student(models / model / "1").scorers, []
    for prompt in ASKED:
        answer = post(live.url, model=model, prompt=prompt, seed=7, n=2).json()
        assert answer["runtime"] == runtime and len(answer["data"]) == 2
        for image in answer["data"]:
            for kind in ("Pick", "Hps"):
                raw = theirs(kind, picture(image), prompt)
                assert image["reward"][NAMES[kind]] == pytest.approx(scaled(scorers[NAMES[kind]], raw), abs=1e-3), SEED
                assert 0 <= image["reward_percentile"][NAMES[kind]] <= 100
            seen.append([image["reward"][NAMES[kind]] for kind in ("Pick", "Hps")])
    assert (np.std(seen, axis=0) > 0.05).all(), f"seed {SEED}: the scores tell the pictures apart"


@pytest.mark.parametrize("model", sorted(MODELS))
def test_a_reward_that_raises_on_every_third_picture_costs_no_picture_and_no_other_score(
    service: tuple[Service, str], model: str
) -> None:
    live, _ = service
    images = [post(live.url, model=model, prompt="heart", seed=seed).json()["data"][0] for seed in range(9)]
    assert all(picture(image).size == (32, 64) for image in images)
    assert all({NAMES["Pick"], NAMES["Hps"]} <= image["reward"].keys() for image in images)
    failed = [image for image in images if NAMES["Moody"] not in image["reward"]]
    assert len(failed) == 3 and all(image["reward_failed"] == [NAMES["Moody"]] for image in failed)


@pytest.mark.parametrize("model", sorted(MODELS))
def test_what_best_of_buys_is_predicted(service: tuple[Service, str], model: str) -> None:
    live, _ = service
    (version,) = call("GET", f"{live.url}/v1/models/{model}").json()["versions"]
    assert {row["best_of"] for row in version["best_of"]} >= {2, 4}
    assert all(set(row["gain"]) == {NAMES["Pick"], NAMES["Hps"]} for row in version["best_of"] if row["best_of"] == 2)


def test_scores_that_no_answer_waits_for_are_the_same(models: Path, tmp_path: Path) -> None:
    settings = {"MODELS": str(models), "THREADS": "1", "RUNTIME": "torch", "SCORE": "after"}
    with running_service(tmp_path / "data", **settings) as live:
        wait_for_models(live, models)
        answers = {name: post(live.url, model=name, prompt=ASKED[0], seed=7).json() for name in MODELS}
        for name, answer in answers.items():
            scorers = read_student(models / name / "1").scorers
            assert answer["scoring"] in ("pending", "done")
            job = eventually(lambda id=answer["id"]: _scored(live, id), "the picture is scored")  # type: ignore[misc]
            for kind in ("Pick", "Hps"):
                raw = theirs(kind, picture(answer["data"][0]), ASKED[0])
                expected = scaled(scorers[NAMES[kind]], raw)
                assert job["data"][0]["reward"][NAMES[kind]] == pytest.approx(expected, abs=1e-3), SEED


def test_a_worker_that_is_killed_while_it_scores_under_load_costs_no_picture_and_no_score_comes_twice(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(GATE, str(tmp_path / "gate"))
    shut, waits = tmp_path / "gate.shut", tmp_path / "gate.waits"
    bodies = [{"model": sorted(MODELS)[k % 2], "prompt": ASKED[k % 4], "seed": k, "n": 1 + k % 2} for k in range(24)]
    settings = {"MODELS": str(models), "THREADS": "1", "RUNTIME": "torch", "SCORE": "after", "LEASE_S": "2"}
    with running_service(tmp_path / "data", **settings) as live:
        wait_for_models(live, models)
        with load(live.url, bodies) as asked:
            eventually(lambda: answered(asked, 6), "some answers have come")
            shut.touch()
            eventually(lambda: waits.exists() and answered(asked, 12), "answers come while a scorer waits")
            live.kill("worker")
            shut.unlink()
        answers = [one.result() for one in asked]
        jobs = settled(live, answers)
        ends = check_each_once(live, jobs, [NAMES["Pick"], NAMES["Hps"]])
        assert ends["done"] > 0 and ends["lost"] > 0, ends
        for answer, job, body in zip(answers, jobs, bodies, strict=True):
            assert [image["seed"] for image in answer["data"]] == [body["seed"] + k for k in range(body["n"])]  # type: ignore[operator, arg-type]
            for image, late in zip(answer["data"], job["data"], strict=True):
                check_late_score(models, job, picture(image), late)


def check_late_score(models: Path, job: dict[str, Any], drawn: Image.Image, late: dict[str, Any]) -> None:
    assert drawn.size == (32, 64)
    scorers = read_student(models / job["model"] / "1").scorers
    for kind in ("Pick", "Hps") if job["scoring"] == "done" else ():
        wanted = scaled(scorers[NAMES[kind]], theirs(kind, drawn, job["prompt"]))
        assert late["reward"][NAMES[kind]] == pytest.approx(wanted, abs=1e-3), SEED


def _scored(live: Service, id: str) -> Any:
    job = call("GET", f"{live.url}/jobs/{id}").json()
    return job["scoring"] == "done" and job


@pytest.mark.parametrize("model", sorted(MODELS))
def test_the_export_compared_the_rewards_themselves(service: tuple[Service, str], models: Path, model: str) -> None:
    """The one that raises at times is compared on the pictures that it has scored on either side, if there are any."""
    if service[1] == "torch":
        pytest.skip("nothing is exported")
    for steps, parity in read_manifest(models / model / "1" / "runtimes" / service[1]).parity.items():
        assert steps == 2 and parity.reward.keys() - {NAMES["Moody"]} == {NAMES["Pick"], NAMES["Hps"]}
        for change in (parity.reward[NAMES[kind]] for kind in ("Pick", "Hps")):
            assert change.prompts >= len(PROMPTS) and abs(change.mean) <= FP32.reward, SEED


def scaled(scorer: Scorer, raw: float) -> float:
    return (raw - scorer.mean) / scorer.std


def picture(image: dict[str, Any]) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(image["b64_json"])))

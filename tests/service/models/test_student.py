"""A whole service around a real (tiny, random) student that was compiled by the export command."""

from __future__ import annotations

import base64
import os
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from service.worker.pictures import encode
from service.worker.provenance import Provenance
from student.runtimes.load import load
from student.runtimes.runtime import Runtime
from tests.service.support import Service, eventually, post, running_service

MADE_BY = Provenance("tiny", "1")
PROMPTS = ("a small red heart above a large blue star", "ring", "an unknown zebra", "a blue circle left of a red ring")


@pytest.fixture(scope="module")
def service(compiled: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    data_dir = tmp_path_factory.mktemp("student") / "data"
    with running_service(data_dir, RUNTIME="auto", MODEL=str(compiled), THREADS="1", BATCH="8") as running:
        yield running  # by itself a worker takes fewer than wait where it has seen that to be faster


@pytest.fixture(scope="module")
def runtime(compiled: Path) -> Runtime:
    return load(compiled, "onnx", 1)


def test_what_is_served_is_what_the_runtime_draws_and_scores(service: Service, runtime: Runtime) -> None:
    for prompt in PROMPTS:
        answer = post(service.url, prompt=prompt, seed=2**32 - 1, num_images_per_prompt=2).json()
        assert (answer["model"], answer["model_version"], answer["runtime"]) == ("tiny", "1", "onnx-fused-fp32")
        for image, seed in zip(answer["data"], (2**32 - 1, 0), strict=True):
            drawn = runtime.draw([prompt], [seed], 4)
            assert image["seed"] == seed and base64.b64decode(image["b64_json"]) == encode(
                drawn[0], "png", made_by=MADE_BY
            )
            scores = {name: float(score[0]) for name, score in runtime.score(drawn, [prompt]).items()}
            assert image["reward"] == pytest.approx(scores, abs=1e-4) and set(scores) == {"trained", "heldout"}


def test_the_bytes_do_not_depend_on_the_batch(service: Service) -> None:
    def ask(k: int) -> tuple[str, int]:
        answer = post(service.url, prompt=PROMPTS[k % 4], seed=k).json()
        return answer["data"][0]["b64_json"], answer["batch_size"]

    worker = service.pids()["worker"]
    os.kill(worker, signal.SIGSTOP)  # until all of them wait, so that they are drawn in full batches
    try:
        with ThreadPoolExecutor(16) as pool:
            asked = [pool.submit(ask, k) for k in range(16)]
            eventually(lambda: service.redis.zcard("fewstep:{tiny}:pending") == 16)
            os.kill(worker, signal.SIGCONT)
            together = [future.result() for future in asked]
    finally:
        os.kill(worker, signal.SIGCONT)
    assert {batch_size for _, batch_size in together} == {8}
    assert [data for data, _ in together] == [ask(k)[0] for k in range(16)]


def test_a_prompt_is_as_long_as_the_students_tokens(service: Service) -> None:
    """The tokenizer adds an end token to the words."""
    assert post(service.url, prompt="red " * 23, seed=1).status_code == 200
    error = post(service.url, prompt="red " * 24, seed=1).json()["error"]
    assert error["param"] == "prompt" and error["message"] == "prompt has 25 tokens: the student reads at most 24."


def test_the_worker_runs_without_torch_and_the_http_process_without_a_network_library(service: Service) -> None:
    maps = {role: Path(f"/proc/{pid}/maps").read_text() for role, pid in service.pids().items()}
    assert "onnxruntime" in maps["worker"] and "libtorch" not in maps["worker"]
    assert "onnxruntime" not in maps["api"] and "libtorch" not in maps["api"]


def test_a_runtime_that_the_student_does_not_have_ends_the_start_with_the_reason(bundle: Path, tmp_path: Path) -> None:
    service = Service(tmp_path / "data", {"RUNTIME": "onnx", "MODEL": str(bundle)})
    assert service.process.wait(60) == 1
    lines = [line for line in service.output.read_text().splitlines() if not line.startswith("{")]  # the log
    assert all(line.startswith("fewstep: ") for line in lines) and "onnx-fused-fp32" in lines[0], lines

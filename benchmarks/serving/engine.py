"""The engine that every server has: the student's graph, its scorers, PNG, base64. Imports nothing of any server.

python -m benchmarks.serving.engine --processes 2 --threads 1 --batch 8 --seconds 6     the engine alone, in a loop
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import json
import multiprocessing
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from service.worker.pictures import encode
from service.worker.provenance import Provenance
from student.runtimes.load import load

REPOSITORY = Path(__file__).resolve().parents[2]
BUNDLE = REPOSITORY / "models" / "shapes"
RUNTIME = "onnx"  # whichever form the bundle holds
PROMPT = "a small red heart above a large blue star on a gray background"
MOST = 8


class Engine:
    """Answers a batch of requests as the service would."""

    def __init__(self, threads: int, bundle: Path = BUNDLE) -> None:
        self._runtime = load(bundle, RUNTIME, threads)
        student = self._runtime.student
        self._made_by = Provenance(student.id, student.version)
        self._steps = student.steps[0]

    def answer(self, prompts: Sequence[str], seeds: Sequence[int]) -> list[dict[str, Any]]:
        """One answer for each request, as JSON has it."""
        images_BCHW = self._runtime.draw(prompts, seeds, self._steps)
        scores = self._runtime.score(images_BCHW, prompts)
        return [
            self._one(encode(image_CHW, "png", None, self._made_by), seed, {n: float(s[k]) for n, s in scores.items()})
            for k, (image_CHW, seed) in enumerate(zip(images_BCHW, seeds, strict=True))
        ]

    def _one(self, data: bytes, seed: int, reward: dict[str, float]) -> dict[str, Any]:
        picture = {
            "b64_json": base64.b64encode(data).decode("ascii"),
            "seed": seed,
            "sha256": hashlib.sha256(data).hexdigest(),
            "reward": reward,
        }
        return {"data": [picture]}


def images_per_s(processes: int, threads: int, batch: int, seconds: float) -> float:
    """Of ``processes`` engines at once, all work included; they start together when all are warm."""
    context = multiprocessing.get_context("spawn")
    ready, counts = context.Barrier(processes), context.Queue()
    running = [context.Process(target=_loop, args=(threads, batch, seconds, ready, counts)) for _ in range(processes)]
    for process in running:
        process.start()
    found = [counts.get(timeout=seconds + 300) for _ in running]
    for process in running:
        process.join()
    return float(sum(found))


def _loop(threads: int, batch: int, seconds: float, ready: Any, counts: Any) -> None:
    engine = Engine(threads)
    prompts, count = [PROMPT] * batch, 0
    engine.answer(prompts, range(batch))
    ready.wait()
    start = time.perf_counter()
    while (took_s := time.perf_counter() - start) < seconds:
        answers = engine.answer(prompts, range(count, count + batch))
        for answer in answers:
            json.dumps(answer)
        count += batch
    counts.put(count / took_s)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("processes", 1), ("threads", 2), ("batch", 8)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--seconds", type=float, default=6.0)
    print(json.dumps(images_per_s(**vars(parser.parse_args()))))


if __name__ == "__main__":
    main()

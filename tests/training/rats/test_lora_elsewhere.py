"""A LoRA that a run wrote, opened by diffusers alone in a fresh process, draws the student's own picture."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from student.bundle import Student, read_student
from student.noise import noise
from student.pipeline import open_pipeline, reproduce, shift_no_more
from student.sampler import pack
from tests.training.rats.test_families import run, settings

PROMPT, SEED, STEPS = "a red heart number 3", 5, 3
FAMILIES = ("flux", "sd3", "z_image")
ELSEWHERE = """
import json, sys

import numpy as np
import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler

for task in json.load(sys.stdin):
    pipe = DiffusionPipeline.from_pretrained(task["base"])
    pipe.load_lora_weights(task["adapter"])
    pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=1.0)
    latents = torch.from_numpy(np.load(task["latents"]))
    np.save(task["pictures"], pipe(latents=latents, output_type="np", **task["call"]).images)
ours = {name.partition(".")[0] for name in sys.modules} & {"student", "training", "rewards", "fewstep"}
assert not ours, ours
"""


def task(folder: Path, out: Path, base: Path, student: Student) -> dict[str, Any]:
    latents = torch.from_numpy(noise([SEED], student.latents.shape))
    np.save(folder / "latents.npy", (pack(latents) if student.latents.packing == 2 else latents).numpy())
    call = {
        "prompt": [PROMPT],
        "num_inference_steps": STEPS,
        "sigmas": list(student.sigmas[STEPS]),
        "height": student.image.height,
        "width": student.image.width,
        "max_sequence_length": student.max_tokens,
        **student.baked,
    }
    files = {"latents": str(folder / "latents.npy"), "pictures": str(folder / "pictures.npy")}
    return {"base": str(base), "adapter": str(out / "adapter"), "call": call, **files}


@pytest.fixture
def own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("training.evaluate.CACHE", tmp_path / "cache")


@pytest.mark.usefixtures("own_cache")
def test_diffusers_alone_draws_the_students_picture_with_its_lora(tmp_path: Path) -> None:
    tasks = []
    for family in FAMILIES:
        folder = tmp_path / f"of-{family}"
        folder.mkdir()
        code, text = run("--out", str(folder / "out"), *settings(folder, family, lora_rank=2, lr=0.02, alpha=0.1))
        assert code == 0, text
        tasks.append(task(folder, folder / "out", folder / family, read_student(folder / "out")))
    done = subprocess.run(
        [sys.executable, "-I", "-c", ELSEWHERE],
        input=json.dumps(tasks), cwd=tmp_path, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    for family in FAMILIES:
        folder = tmp_path / f"of-{family}"
        student = read_student(folder / "out")
        elsewhere = np.load(folder / "pictures.npy").transpose(0, 3, 1, 2)
        own = reproduce(open_pipeline(folder / "out"), student, [PROMPT], [SEED], STEPS)
        plain = open_pipeline(folder / family)
        shift_no_more(plain)
        before = reproduce(plain, student, [PROMPT], [SEED], STEPS)
        assert np.abs(elsewhere - own).max() < 2e-3 < 0.01 < np.abs(before - own).max(), family

"""What the methods are held against: the rendered truth, the truth through the autoencoder, and the two teachers."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import torch

from student.writing import write_atomically
from training.config import changed
from training.experiment.setup import Setup, prepare
from training.lab.cells import SEEDS, base
from training.lab.stops import SEEDS_EACH, Figures, drawn, of_images
from training.lab.teachers import TEACHERS
from training.rats.config import RatsConfig
from training.shapes import world
from training.shapes.acceptance import scenes_of
from training.shapes.autoencoder import round_trip

TRUTH, AUTOENCODER = "rendered truth", "truth through the autoencoder"
FILE = "references.json"
SCENES = 37  # the key of the truth's places, which captions leave open


def teacher_name(teacher: str) -> str:
    """The row of a teacher."""
    return f"{teacher} teacher"


def measure(path: Path, configs: Mapping[str, RatsConfig]) -> dict[str, Figures]:
    """All references, measured once and kept at ``path``; ``configs`` has a run's configuration for each teacher."""
    if not path.exists():
        found: dict[str, Figures] = {}
        for name, config in configs.items():
            setup = prepare(config)
            found |= _of_the_world(setup) if not found else {}
            sampler = setup.sampler(setup.model, "teacher", config.teacher.reference_nfe)
            with setup.roles.role("start"):
                found[teacher_name(name)] = drawn(setup, sampler)
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = {"prompts": setup.prompts.test, **{name: asdict(value) for name, value in found.items()}}
        write_atomically(path, json.dumps(kept).encode())
    return read(path)[1]


def read(path: Path) -> tuple[list[str], dict[str, Figures]]:
    """The evaluation prompts, and the references by name."""
    kept = json.loads(path.read_text())
    prompts: list[str] = kept.pop("prompts")
    return prompts, {name: Figures(**row) for name, row in kept.items()}


def configs(teachers: Path, steps: int = 0) -> dict[str, RatsConfig]:
    """For each teacher the configuration in which it is measured; a trial of few ``steps`` has fewer prompts."""
    values = {"seed": SEEDS[0], **({"steps": steps} if steps else {})}
    return {name: changed(base(teachers / name), values) for name in TEACHERS}


def _of_the_world(setup: Setup) -> dict[str, Figures]:
    """The truth for every prompt, SEEDS_EACH times with other places, as it is and through the autoencoder."""
    texts = [text for text in setup.prompts.test for _ in range(SEEDS_EACH)]
    images = world.render_NCHW(scenes_of(texts, SCENES))
    size = setup.config.validation.batch
    through = torch.cat([round_trip(setup.model.vae, part) for part in images.split(size)])
    return {TRUTH: of_images(setup, images), AUTOENCODER: of_images(setup, through)}

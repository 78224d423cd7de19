"""Students of every family, compiled once for all tests of this folder. Not to be written to."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from export import run as command
from tests.export.adopting import MODELS, published
from tests.student.families import tiny

MAKERS: dict[str, Callable[[], Any]] = {
    "flux": lambda: tiny.flux(guidance_embeds=True),
    "flux2": tiny.flux2,
    "qwen_image": tiny.qwen_image,
    "sd3": tiny.sd3,
    "sd3 without T5": lambda: tiny.sd3(with_t5=False, dual=False),
    "wan": tiny.wan,
    "wan_5b": tiny.wan_5b,
    "wan_14b": tiny.wan_14b,
    "z_image": tiny.z_image,
}
Compile = Callable[[str], Path]


@pytest.fixture(scope="session")
def compile_family(tmp_path_factory: pytest.TempPathFactory) -> Compile:
    """The bundle of a family with its staged ONNX runtime; compiled when it is first asked for."""
    made: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in made:
            made[name] = tmp_path_factory.mktemp("staged") / "tiny"
            tiny.build(made[name], MAKERS[name]())
            command.run(student=made[name], to="onnx")
        return made[name]

    return get


@pytest.fixture(scope="session")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A published pipeline by its name in ``adopting.MODELS``."""
    made: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in made:
            made[name] = published(tmp_path_factory.mktemp("published") / name, MODELS[name]())
        return made[name]

    return get

"""The card's own words: code that is executed and compared with our sampler, and the terms of the teacher's card."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from huggingface_hub import ModelCard

from student.bundle import Student
from student.families.find import family_of, family_of_student
from student.noise import noise
from student.pipeline import open_pipeline, read_index
from student.sampler import denoise, pack
from tests.student.families import tiny
from training.card import _front_matter, _licence, _short
from training.config import changed
from training.experiment.presets import PRESETS
from training.origin import Origin, origin
from training.usage import PROMPT, usage

SEED = 7
MAKERS: dict[str, Callable[[], Any]] = {
    **tiny.MAKERS,
    "flux-dev": lambda: tiny.flux(guidance_embeds=True),
    "sd3-without-t5": lambda: tiny.sd3(with_t5=False),
}


def ours(bundle: Path, student: Student) -> np.ndarray:
    """Our sampler's picture of the card's prompt, (H, W, 3); of a video its frames."""
    family = family_of_student(open_pipeline(bundle), student)
    condition = family.encode([PROMPT])
    start = torch.from_numpy(noise([SEED], student.latents.shape))
    with torch.no_grad():
        end = denoise(lambda x, s: family.velocity(x, s, condition), start, student.sigmas[student.steps[0]])
        return family.decode(end)[0].movedim(-3, -1).numpy()


def blocks(text: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", text, re.DOTALL)


def drawn(code: str, student: Student, monkeypatch: pytest.MonkeyPatch) -> np.ndarray:
    """What the card's plain code draws from the same noise."""
    latents = torch.from_numpy(noise([SEED], student.latents.shape))
    names: dict[str, Any] = {"latents": pack(latents) if student.latents.packing == 2 else latents}
    videos: list[np.ndarray] = []
    monkeypatch.setattr("diffusers.utils.export_to_video", lambda frames, path, fps: videos.append(np.array(frames)))
    asked = f'    prompt="{PROMPT}",\n'
    assert asked in code
    exec(code.replace(asked, f"{asked}    latents=latents,\n"), names)
    return videos[0] if videos else np.asarray(names["image"]) / 255


@pytest.mark.parametrize("name", MAKERS)
def test_the_cards_code_draws_what_we_draw(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = MAKERS[name]()
    bundle = tmp_path / "models" / f"tiny-{family_of(pipe).name}"
    student = tiny.build(bundle, pipe)
    monkeypatch.chdir(tmp_path)
    with_fewstep, plain = blocks(usage(student, read_index(bundle), "fp32"))
    expected = ours(bundle, student)
    assert expected.std() > 0.05
    assert np.abs(drawn(plain, student, monkeypatch) - expected).max() < 1.5 / 255
    names: dict[str, Any] = {}
    exec(with_fewstep, names)
    assert np.abs(np.moveaxis(names["images"][0], -3, -1) - expected).max() < 1e-3
    assert student.image.frames or (tmp_path / "picture.png").is_file()


@pytest.mark.parametrize("name, line", [("sd3", "    guidance_scale=1.0,\n"), ("wan", r"pipe\.scheduler\.set_.*\n")])
def test_without_a_line_of_it_the_picture_is_another(
    name: str, line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = tmp_path / "models" / f"tiny-{name}"
    student = tiny.build(bundle, MAKERS[name]())
    monkeypatch.chdir(tmp_path)
    code = blocks(usage(student, read_index(bundle), "fp32"))[1]
    shorter = re.sub(line, "", code)
    assert shorter != code
    assert np.abs(drawn(shorter, student, monkeypatch) - ours(bundle, student)).max() > 5 / 255


@pytest.mark.parametrize("name", ["flux", "wan"])
def test_a_student_that_was_measured_in_bf16_is_opened_in_it(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = tmp_path / "models" / f"tiny-{name}"
    student = tiny.build(bundle, MAKERS[name]())
    monkeypatch.chdir(tmp_path)
    opened: list[Any] = []
    plain = DiffusionPipeline.from_pretrained
    monkeypatch.setattr(
        DiffusionPipeline, "from_pretrained", lambda *a, **k: (opened.append(plain(*a, **k)), opened[-1])[1]
    )
    picture = drawn(blocks(usage(student, read_index(bundle), "bf16"))[1], student, monkeypatch)
    assert opened[-1].transformer.dtype == torch.bfloat16
    assert opened[-1].vae.dtype == (torch.float32 if name == "wan" else torch.bfloat16)
    assert np.abs(picture - ours(bundle, student)).mean() < 0.05


FLUX_TERMS = "license: other\nlicense_name: flux-1-dev-non-commercial-license\nlicense_link: LICENSE.md\n"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The hub's cache, without a network, with one model's card."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    place = tmp_path / "hub" / "models--black-forest-labs--FLUX.1-dev"
    (place / "snapshots" / ("a" * 40)).mkdir(parents=True)
    (place / "snapshots" / ("a" * 40) / "README.md").write_text(f"---\nlanguage:\n- en\n{FLUX_TERMS}---\n# FLUX\n")
    (place / "refs").mkdir()
    (place / "refs" / "main").write_text("a" * 40)
    return tmp_path


def test_a_student_of_the_hub_is_under_its_teachers_terms(hub: Path) -> None:
    found = origin("black-forest-labs/FLUX.1-dev")
    link = "https://huggingface.co/black-forest-labs/FLUX.1-dev/blob/main/LICENSE.md"
    name = "flux-1-dev-non-commercial-license"
    assert found == Origin("black-forest-labs/FLUX.1-dev", "other", name, link)
    head = ModelCard(_front_matter(tiny.build(hub / "student", tiny.flux()), found)).data
    assert (head.license, head.license_name, head.license_link) == ("other", name, link)
    assert (head.base_model, head.pipeline_tag) == ("black-forest-labs/FLUX.1-dev", "text-to-image")
    assert f"[{name}]({link})" in _licence(found)


def test_a_folder_brings_its_terms_along(tmp_path: Path) -> None:
    folder = tmp_path / "my-flux"
    folder.mkdir()
    (folder / "README.md").write_text(f"---\n{FLUX_TERMS}---\n")
    (folder / "LICENSE.md").write_text("no trade")
    found = origin(str(folder))
    assert (found.name, found.license, found.terms) == ("my-flux", "other", folder / "LICENSE.md")
    assert "(LICENSE.md)" in _licence(found)


@pytest.mark.parametrize(
    "text", [None, "# no front matter\n", "---\nlicense: [unclosed\n---\n", "---\ntags: [x]\n---\n"]
)
def test_unknown_terms_are_said_to_be_unknown(text: str | None, hub: Path) -> None:
    folder = hub / "mine"
    folder.mkdir()
    if text is not None:
        (folder / "README.md").write_text(text)
    for found in (origin(str(folder)), origin("nobody/nothing")):
        assert not found.license
        assert "No licence of" in _licence(found)
        head = ModelCard(_front_matter(tiny.build(hub / "student", tiny.wan(), width_px=64), found)).data
        assert head.license is None and head.pipeline_tag == "text-to-video"


def test_the_starter_worlds_terms_are_its_teachers() -> None:
    assert origin("models/shapes-teacher").license == "apache-2.0"


@pytest.mark.parametrize("name", PRESETS)
def test_only_a_run_that_a_person_shortened_is_called_short(name: str) -> None:
    config = PRESETS[name]()
    assert _short(config, config.data.test) == ""
    assert "Evaluated on 64 prompts only" in _short(config, 64)
    assert "A short run: 4 steps" in _short(changed(config, {"steps": 4}), config.data.test)

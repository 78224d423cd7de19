"""Each family, as diffusers saves its pipeline, is adopted; torch draws with it what diffusers draws."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from export.adoption import Adoption, adopt
from export.source import find_source
from student.bundle import read_student
from student.families.find import FAMILIES, family_of
from student.pipeline import open_pipeline, reproduce
from student.runtimes.torch import TorchRuntime
from tests.export.adopting import edit, run
from tests.student.families import tiny

PROMPT, SEED, STEPS = "a red heart", 7, 2


@pytest.mark.parametrize("name", sorted(tiny.MAKERS))
def test_a_pipeline_of_every_family_is_adopted_and_drawn_with(name: str, tmp_path: Path) -> None:
    pipe: Any = tiny.MAKERS[name]()
    pipe.save_pretrained(tmp_path / "published")
    frames = 5 if name.startswith("wan") else 1
    source, size = find_source(str(tmp_path / "published")), (64, 32)
    adopt(Adoption(source, (STEPS,), tmp_path / "student", size=size, frames=frames, say=lambda text: None))
    student = read_student(tmp_path / "student")
    arguments = {"num_frames": frames} if frames > 1 else {}
    pipe(prompt=PROMPT, num_inference_steps=STEPS, height=64, width=32, max_sequence_length=tiny.MAX_TOKENS,
         output_type="latent", **arguments)  # fmt: skip
    assert student.sigmas[STEPS] == pytest.approx(pipe.scheduler.sigmas[:-1].tolist()), "of the pipeline's own run"
    assert student.family == family_of(pipe).name and student.steps == (STEPS,)
    if frames > 1:
        assert (student.image.frames, student.image.fps) == (5, 24 if name == "wan_5b" else 16)
    drawn = TorchRuntime(tmp_path / "student", student, threads=1).draw([PROMPT], [SEED], STEPS)
    theirs = reproduce(open_pipeline(tmp_path / "student"), student, [PROMPT], [SEED], STEPS)
    assert drawn.shape == theirs.shape and drawn.std() > 0.02
    np.testing.assert_allclose(drawn, theirs, atol=2e-4)


@pytest.mark.parametrize(
    ("made", "name"),
    [
        ("flux", "FluxKontextPipeline"),
        ("flux", "FluxImg2ImgPipeline"),
        ("flux", "FluxControlNetPipeline"),
        ("flux2", "Flux2Pipeline"),
        ("qwen_image", "QwenImageEditPipeline"),
        ("qwen_image", "QwenImageLayeredPipeline"),
        ("sd3", "StableDiffusion3InpaintPipeline"),
        ("sd3", "StableDiffusion3ControlNetPipeline"),
        ("wan", "WanImageToVideoPipeline"),
        ("wan", "WanVACEPipeline"),
        ("z_image", "ZImageImg2ImgPipeline"),
    ],
)
def test_a_pipeline_close_to_a_supported_one_is_refused(made: str, name: str, tmp_path: Path) -> None:
    tiny.MAKERS[made]().save_pretrained(tmp_path / "published")
    edit(tmp_path / "published" / "model_index.json", lambda index: index.update(_class_name=name))
    code, said = run(tmp_path / "published", "--steps", STEPS, "--size", "32x64", "--out", tmp_path / "out")
    assert code == 1 and f"is a {name}: supported are {', '.join(FAMILIES)}" in said, said
    assert not (tmp_path / "out").exists()

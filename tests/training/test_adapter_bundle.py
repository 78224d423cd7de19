"""A student that carries its adapter alone: the pictures of the whole bundle, in a hundredth of the room."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from service.models.memory import needed_bytes
from student.base import BASE, read_base
from student.bundle import BundleError, read_student
from student.noise import noise
from student.pipeline import open_pipeline, reproduce
from student.runtimes.load import load
from student.runtimes.placement import numbers_of
from student.sampler import pack
from tests.student.families import tiny
from tests.training.rats.test_families import run, settings
from training.beginning import beginning
from training.config import ConfigError, with_settings
from training.rats.config import RatsConfig
from training.usage import PROMPT

MORE = {"steps": 2, "lora_rank": 2, "lr": 0.05, "warmup": 1, "alpha": 0.1}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The same run twice: with its whole pipeline, and with its adapter alone."""
    folder = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("training.evaluate.CACHE", folder / "cache")
        for kind in ("whole", "adapter"):
            more = settings(folder, "flux", **MORE, **{"student.bundle": kind})
            code, text = run("--out", str(folder / kind), *more)
            assert code == 0, text
    return SimpleNamespace(teacher=folder / "flux", whole=folder / "whole", adapter=folder / "adapter")


def drawn(pipe: Any, bundle: Path) -> np.ndarray:
    return reproduce(pipe, read_student(bundle), [PROMPT], [5], 3)


def test_it_draws_what_the_whole_bundle_draws_and_holds_no_weights_of_the_base(folders: Any) -> None:
    expected = drawn(open_pipeline(folders.whole), folders.whole)
    found = drawn(open_pipeline(folders.adapter), folders.adapter)
    before = drawn(open_pipeline(folders.teacher), folders.adapter)
    assert np.abs(found - expected).max() < 0.1 * np.abs(before - expected).max(), (
        "it is kept in fp16 where it is whole"
    )
    weights = [path.parent.name for path in folders.adapter.rglob("*.safetensors")]
    assert weights == ["adapter"]
    whole = {part: count for part, count in numbers_of(folders.whole).items() if part != "adapter"}
    assert numbers_of(folders.adapter) == whole and whole["transformer"] > 0
    assert needed_bytes(folders.adapter, "torch") > needed_bytes(folders.whole, "torch"), "fp32 files in place of fp16"


def test_the_torch_runtime_serves_it_and_its_evaluation_is_its_own(folders: Any) -> None:
    runtime = load(folders.adapter, "torch")
    found = runtime.draw([PROMPT], [5], 3)
    np.testing.assert_allclose(found, drawn(open_pipeline(folders.adapter), folders.adapter), atol=2e-3)
    whole, adapter = (read_student(folder) for folder in (folders.whole, folders.adapter))
    assert whole.sigmas == adapter.sigmas and whole.fingerprint() != adapter.fingerprint()
    for one, other in zip(whole.evaluation, adapter.evaluation, strict=True):
        assert one["trained"]["mean"] == pytest.approx(other["trained"]["mean"], abs=0.02)


def test_diffusers_alone_opens_it_as_its_card_says(folders: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    code = (folders.adapter / "README.md").read_text().split("```python\n")[-1].partition("```")[0]
    student = read_student(folders.adapter)
    assert "load_lora_weights" in code and str(folders.teacher) in code
    code = code.replace(f"models/{student.id}", str(folders.adapter)).replace('image.save("picture.png")', "")
    names: dict[str, Any] = {"latents": pack(torch.from_numpy(noise([5], student.latents.shape)))}
    exec(code.replace("image = pipe(", "image = pipe(latents=latents, "), names)
    picture = np.asarray(names["image"]).transpose(2, 0, 1)[None] / 255
    np.testing.assert_allclose(picture, drawn(open_pipeline(folders.adapter), folders.adapter), atol=0.01)


def test_a_base_that_is_elsewhere_or_another_is_said(folders: Any, tmp_path: Path) -> None:
    copy, base = tmp_path / "copy", tmp_path / "base"
    shutil.copytree(folders.adapter, copy)
    shutil.copytree(folders.teacher, base)
    named = json.loads((copy / BASE).read_text())

    def rename(**changes: Any) -> None:
        (copy / BASE).write_text(json.dumps({**named, **changes}))

    rename(model=str(tmp_path / "nowhere"))
    with pytest.raises(BundleError, match=f"the base {tmp_path}/nowhere is not there"):
        open_pipeline(copy)
    rename(model="someone/something", revision="0" * 40)
    with pytest.raises(BundleError, match="is not on this machine: `hf download someone/something --revision 0000"):
        open_pipeline(copy)
    with pytest.raises(BundleError, match="base.json has changed since student.json was written"):
        load(copy, "torch")
    (copy / BASE).write_bytes((folders.adapter / BASE).read_bytes())
    kept = folders.teacher / "transformer" / "config.json"
    text = kept.read_text()
    try:
        kept.write_text(text + " ")
        with pytest.raises(BundleError, match=r"transformer/config.json is not what .* was trained on"):
            load(copy, "torch")
    finally:
        kept.write_text(text)
    assert read_base(folders.whole) is None


@pytest.mark.parametrize("changes", [["lora.rank=0"], ["lora.rank=2", "student.init=x"]])
def test_what_has_no_adapter_of_its_teacher_is_refused(changes: list[str]) -> None:
    with pytest.raises(ConfigError, match="student.bundle is 'adapter': accepted with a lora.rank"):
        with_settings(RatsConfig(), ["student.bundle=adapter", *changes])


def test_another_run_begins_from_it(folders: Any, tmp_path: Path) -> None:
    found = beginning(str(folders.adapter), str(folders.teacher), tiny.flux().transformer, torch.float32)
    expected = load_file(next((folders.whole / "transformer").glob("*.safetensors")))
    before = load_file(next((folders.teacher / "transformer").glob("*.safetensors")))
    for name, value in found.state_dict().items():
        torch.testing.assert_close(value, expected[name].float(), rtol=2e-3, atol=2e-4)  # the whole one is in fp16
    assert max(float((expected[name].float() - value).abs().max()) for name, value in before.items()) > 0.01
    out = tmp_path / "more"
    more = settings(folders.teacher.parent, "flux", **{**MORE, "lr": 1e-9, "steps": 1})
    code, text = run("--out", str(out), "--init", str(folders.adapter), *more)
    assert code == 0, text
    kept = load_file(next((out / "transformer").glob("*.safetensors")))
    for name, value in kept.items():
        torch.testing.assert_close(value.float(), expected[name].float(), rtol=2e-3, atol=2e-4)


def test_the_base_is_named_with_all_that_is_read_of_it(folders: Any) -> None:
    base = read_base(folders.adapter)
    assert base is not None and base.revision is None and Path(base.model) == folders.teacher.resolve()
    assert {name.partition("/")[0] for name in base.files} >= {"transformer", "vae", "text_encoder", "text_encoder_2"}

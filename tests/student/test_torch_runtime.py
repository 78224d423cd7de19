"""The torch runtime against diffusers' own pipeline, at every step count that the student was trained for."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline

from student.bundle import read_student
from student.families.find import family_of_student
from student.noise import noise
from student.pipeline import open_pipeline, reproduce, save_pipeline
from student.runtimes import torch as module
from student.runtimes.load import load
from student.runtimes.manifest import DECODER
from student.runtimes.options import Options
from student.runtimes.runtime import Preview, StepwiseRuntime
from student.runtimes.torch import TorchRuntime
from student.runtimes.torch_stage import torch_stages
from student.sampler import denoise
from tests import tiny

SEEDS = (0, 1, 2, 3, 2**32 - 1, 5, 5)


@pytest.fixture(scope="module")
def runtime(bundle: Path) -> TorchRuntime:
    return TorchRuntime(bundle, read_student(bundle), threads=1)


def test_torch_computes_with_as_many_threads_as_the_operator_says(bundle: Path) -> None:
    before = torch.get_num_threads()
    try:
        for threads in (before + 2, before + 1):
            TorchRuntime(bundle, read_student(bundle), threads)
            assert torch.get_num_threads() == threads
        torch_stages(bundle, read_student(bundle), [DECODER], before + 3)
        assert torch.get_num_threads() == before + 3
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("steps", [2, 4])
def test_diffusers_draws_the_same_pictures(bundle: Path, runtime: TorchRuntime, steps: int) -> None:
    images = runtime.draw(tiny.PROMPTS, SEEDS, steps)
    theirs = reproduce(open_pipeline(bundle), runtime.student, tiny.PROMPTS, SEEDS, steps)
    assert images.shape == (7, 3, 64, 64) and images.dtype == np.float32
    assert 0 <= images.min() and images.max() <= 1 and images.std() > 0.1
    np.testing.assert_allclose(images, theirs, atol=1e-4)


def test_prompt_seed_and_steps_all_matter(runtime: TorchRuntime) -> None:
    base = runtime.draw(["a red heart"], [1], 4)
    for prompt, seed, steps in (("a blue star", 1, 4), ("a red heart", 2, 4), ("a red heart", 1, 2)):
        assert np.abs(runtime.draw([prompt], [seed], steps) - base).max() > 0.01


def test_bytes_do_not_depend_on_batch_mates(runtime: TorchRuntime) -> None:
    together = runtime.draw(tiny.PROMPTS, SEEDS, 4)
    for b, (prompt, seed) in enumerate(zip(tiny.PROMPTS, SEEDS, strict=True)):
        np.testing.assert_array_equal(runtime.draw([prompt], [seed], 4)[0], together[b])


def test_batch_sizes_are_kept_for_this_student_and_this_way_of_running(runtime: TorchRuntime) -> None:
    student, placement, options = runtime.student, runtime.placement, Options()
    key = module._key(student, placement, options)
    assert module._key(replace(student, id="other", version="2"), placement, options) == key
    others = {
        module._key(replace(student, max_tokens=student.max_tokens + 1), placement, options),
        module._key(student, replace(placement, dtype="float16"), options),
        module._key(student, replace(placement, offload="encoders"), options),
        module._key(student, placement, replace(options, compile="graphs")),
    }
    assert len(others) == 4 and key not in others


def test_calls_out_of_range_are_refused(runtime: TorchRuntime) -> None:
    for prompts, seeds, steps, message in (
        ([], [], 4, "prompts and seeds are 0 and 0"),
        (["a"], [1, 2], 4, "prompts and seeds are 1 and 2"),
        (["a"] * 9, range(9), 4, "the batch has 9 images: accepted is 1 to 8"),
        (["a"], [1], 3, "steps is 3: tiny was trained for 4, 2"),
        (["a"], [-1], 4, "seed is -1"),
    ):
        with pytest.raises(ValueError, match=message):
            runtime.draw(prompts, seeds, steps)


def test_a_bundle_without_compiled_scorers_scores_nothing(runtime: TorchRuntime) -> None:
    assert runtime.score(np.zeros((1, 3, 64, 64), np.float32), ["a"]) == {}


def test_half_weights_on_disk_open_in_float32_whoever_opens_them(tmp_path: Path) -> None:
    """A pipeline opened without a dtype must run: transformers follows the config's type, diffusers does not."""
    pipe = tiny.pipeline()
    before = pipe.transformer.proj_out.weight.clone()
    save_pipeline(pipe, tmp_path)
    assert (pipe.transformer.proj_out.weight - before).abs().max() > 0
    opened = DiffusionPipeline.from_pretrained(tmp_path)
    for name in ("transformer", "vae", "text_encoder", "text_encoder_2"):
        weights, saved = getattr(opened, name).state_dict(), getattr(pipe, name).state_dict()
        assert {value.dtype for value in weights.values()} == {torch.float32}
        assert all(torch.equal(weights[key], saved[key]) for key in saved)
    assert json.loads((tmp_path / "text_encoder" / "config.json").read_text())["dtype"] == "float32"
    assert len({p.stat().st_mode for p in tmp_path.rglob("*") if p.is_file()}) == 1
    size = sum(p.stat().st_size for p in tmp_path.rglob("*.safetensors"))
    numel = sum(v.numel() for n in opened.components.values() if isinstance(n, torch.nn.Module) for v in n.parameters())
    assert size < 2.2 * numel


def test_a_weight_beyond_half_is_named(tmp_path: Path) -> None:
    pipe = tiny.pipeline()
    with torch.no_grad():
        pipe.vae.decoder.layers[0].bias[0] = 1e5
    with pytest.raises(ValueError, match=r"vae\.decoder\.layers\.0\.bias holds values that are not finite in float16"):
        save_pipeline(pipe, tmp_path)


def test_a_saved_pipeline_does_not_say_where_it_came_from(bundle: Path) -> None:
    assert not [path for path in bundle.rglob("*.json") if "_name_or_path" in path.read_text("utf-8")]


@pytest.mark.parametrize("name", ["wan", "z_image"])
def test_a_student_without_scorers_is_served_and_not_scored(name: str, tmp_path: Path) -> None:
    """Its family has no tokenizer of CLIP's."""
    from tests.student.families import tiny as families

    families.build(tmp_path / "tiny", families.MAKERS[name]())
    runtime = load(tmp_path / "tiny", "torch")
    images = runtime.draw(["a star"], [3], 2)
    assert images.std() > 0.02 and runtime.score(images, ["a star"]) == {}


@pytest.mark.parametrize("steps", [2, 4])
def test_watching_shows_what_the_network_takes_the_picture_for_and_changes_no_byte(
    bundle: Path, runtime: TorchRuntime, steps: int
) -> None:
    """The answer key is the family's own loop: x0 = x - sigma v after each call but the last."""
    seen: list[np.ndarray] = []
    rows = [2, 0]

    def watch(step: int, preview: Preview) -> None:
        assert step == len(seen)
        seen.append(preview(rows))

    images = runtime.draw_watched(tiny.PROMPTS, SEEDS, steps, watch)
    assert np.array_equal(images, runtime.draw(tiny.PROMPTS, SEEDS, steps)) and len(seen) == steps - 1
    family, student = family_of_student(open_pipeline(bundle), runtime.student), runtime.student
    for at, row in enumerate(rows):
        expected: list[np.ndarray] = []

        def note(i: int, sigma: float, x: torch.Tensor, v: torch.Tensor, into: list[np.ndarray] = expected) -> None:
            into.append(family.decode(x - sigma * v).numpy()[0])

        with torch.no_grad():
            condition = family.encode([tiny.PROMPTS[row]])
            x = torch.from_numpy(noise([SEEDS[row]], student.latents.shape))
            denoise(lambda x, s, c=condition: family.velocity(x, s, c), x, student.sigmas[steps], note)  # type: ignore[misc]
        for step, pictures in enumerate(seen):
            np.testing.assert_allclose(pictures[at], expected[step], atol=1e-5)


def test_whoever_watches_can_end_the_drawing(runtime: TorchRuntime) -> None:
    steps: list[int] = []

    def stop(step: int, preview: Preview) -> None:
        steps.append(step)
        raise InterruptedError

    with pytest.raises(InterruptedError):
        runtime.draw_watched(tiny.PROMPTS, SEEDS, 4, stop)
    assert steps == [0] and isinstance(runtime, StepwiseRuntime)


def test_it_computes_with_as_many_threads_as_it_is_told(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", asked.append)
    TorchRuntime(bundle, read_student(bundle), threads=3)
    assert asked == [3]

"""Figures with known answers."""

import hashlib
import io
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from torch import Tensor, nn

from student.families.find import family_of
from student.families.two_experts import joined
from student.noise import noise
from student.sampler import denoise
from tests.student.families import tiny
from training import progress
from training.evaluate import (
    Evaluation,
    Measure,
    Plan,
    add_weights,
    cached,
    computed_with,
    fingerprint,
    hash_model,
    in_turns,
    mean_error,
    paired,
    vendi,
)
from training.sampler import Sampler

PROMPTS = [f"a red heart number {i}" for i in range(11)]


def test_vendi_counts_the_different_ones() -> None:
    assert vendi(np.ones((8, 3))) == pytest.approx(1.0)
    assert vendi(np.eye(8)) == pytest.approx(8.0)
    assert vendi(np.repeat(np.eye(4), 2, axis=0)) == pytest.approx(4.0)


def test_mean_and_standard_error() -> None:
    mean, error = mean_error([1.0, 2.0, 3.0, 4.0])
    assert (mean, error) == (2.5, pytest.approx(math.sqrt(5 / 3) / 2))


def test_values_of_one_prompt_are_one_cluster() -> None:
    """Each value twice is no more evidence than once; against statsmodels' cluster-robust form by hand."""
    values, prompts = [1.0, 2.0, 3.0, 6.0], ["a", "b", "c", "d"]
    once, twice = mean_error(values, prompts), mean_error([*values, *values], [*prompts, *prompts])
    assert once == pytest.approx(mean_error(values)) and twice == pytest.approx(once)
    sums = np.array([(1 - 3) + (2 - 3), 3 - 3, 6 - 3])
    expected = math.sqrt(3 / 2 * float((sums**2).sum())) / 4
    assert mean_error(values, ["a", "a", "c", "d"]) == (3.0, pytest.approx(expected))
    assert paired([2.0, 3.0], [1.0, 1.0], ["a", "a"])[0] == 1.5


def test_a_paired_difference_forgets_what_both_share() -> None:
    hard = [10.0, -20.0, 7.0, 3.0]
    assert paired([x + 1 for x in hard], hard) == (1.0, 0.0)


def test_an_evaluation_is_measured_once(tmp_path: Path) -> None:
    made = []

    def make() -> Evaluation:
        made.append(1)
        return Evaluation("teacher", 50, 1.5, {"trained": [0.5]}, {"right": [1.0]}, [2.0])

    assert cached(tmp_path, "key", make) == cached(tmp_path, "key", make)
    assert len(made) == 1
    cached(tmp_path, "another", make)
    assert len(made) == 2


def sampler_of(pipe: object, frames: int = 1, side_px: int = 32) -> Sampler:
    family = family_of(pipe, max_tokens=tiny.MAX_TOKENS)
    return Sampler(family, family.sigmas(3, family.latent_shape(side_px, side_px, frames)))


def key(sampler: Sampler, shape: tuple[int, ...], **others: object) -> str:
    plan = Plan(PROMPTS, PROMPTS[:2], shape, 4)
    return fingerprint(hash_model(sampler.model), sampler, replace(plan, **others), "rewards")  # type: ignore[arg-type]


def test_figures_of_another_size_are_kept_apart() -> None:
    """Stable Diffusion's and Wan's sigmas are the same at every size, and so are their weights."""
    still, moving = sampler_of(tiny.sd3()), sampler_of(tiny.wan(), frames=5)
    sizes = [still.model.latent_shape(*size) for size in ((32, 32), (64, 128), (128, 64))]
    lengths = [moving.model.latent_shape(32, 32, frames) for frames in (1, 5, 9)]
    found = [*(key(still, shape) for shape in sizes), *(key(moving, shape) for shape in lengths)]
    assert len(set(found)) == 6


def test_figures_of_other_prompts_seeds_lengths_types_and_libraries_are_kept_apart(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sampler = sampler_of(tiny.sd3())
    shape = sampler.model.latent_shape(32, 32)
    other = Sampler(family_of(tiny.sd3(), max_tokens=tiny.MAX_TOKENS - 1), sampler.sigmas)
    found = [
        key(sampler, shape),
        key(other, shape),
        key(replace(sampler, guidance=2.0), shape),
        key(replace(sampler, guidance=2.0, negative="gray"), shape),
        key(replace(sampler, sigmas=(1.0, 0.5)), shape),
        key(sampler, shape, varied=PROMPTS[:3]),
        key(sampler, shape, varied_seed=7),
        key(sampler, shape, first_seed=7),
        key(sampler, shape, prompts=PROMPTS[1:]),
    ]
    found.append(key(replace(sampler, precision="bf16"), shape))
    monkeypatch.setattr("training.evaluate.metadata.version", lambda name: "0.0")
    found.append(key(sampler, shape))
    monkeypatch.undo()
    assert key(sampler, shape, batch=1) == found[0]  # else a teacher would be measured again for nothing
    sampler.model.vae.to(torch.bfloat16)
    found.append(key(sampler, shape))
    assert len(set(found)) == len(found)


def test_a_guided_transformer_is_kept_apart_by_its_guidance() -> None:
    pipe = tiny.flux(guidance_embeds=True)
    two = [family_of(pipe, max_tokens=tiny.MAX_TOKENS, guidance=value) for value in (3.5, 1.5)]
    assert len({key(Sampler(model, (1.0, 0.5)), two[0].latent_shape(32, 32)) for model in two}) == 2


def red(images: Tensor, prompts: Sequence[str]) -> Tensor:
    return images[:, 0].mean((1, 2)) + len(prompts[0])


def judge(images: Tensor, prompts: Sequence[str]) -> dict[str, list[float]]:
    return {"right": [float(prompt.split()[-1]) for prompt in prompts]}


MEASURE = Measure({"red": red}, judge, lambda images: images.flatten(1))


@pytest.mark.parametrize("batch", [1, 3, 12, 64])
def test_an_evaluation_looks_at_every_prompt_with_its_seed(batch: int) -> None:
    """Against all pictures drawn at once by the plain loop."""
    sampler = sampler_of(tiny.flux())
    family, shape = sampler.model, sampler.model.latent_shape(32, 32)

    def drawn(prompts: Sequence[str], seeds: Sequence[int]) -> Tensor:
        condition, start = family.encode(prompts), torch.from_numpy(noise(seeds, shape))
        with torch.no_grad():
            return family.decode(denoise(lambda x, s: family.velocity(x, s, condition), start, sampler.sigmas))

    found = MEASURE.evaluate("student", sampler, Plan(PROMPTS, PROMPTS[:3], shape, batch))
    images = drawn(PROMPTS, range(len(PROMPTS)))
    offset = np.array([len(PROMPTS[i // batch * batch]) for i in range(len(PROMPTS))])
    assert found.scores["red"] == pytest.approx(images[:, 0].mean((1, 2)).numpy() + offset, abs=1e-5)
    assert found.judge == {"right": [float(i) for i in range(len(PROMPTS))]}
    varied = drawn([prompt for prompt in PROMPTS[:3] for _ in range(8)], range(100_000, 100_024)).flatten(1)
    expected = [vendi(group) for group in np.split(varied.double().numpy(), 3)]
    assert found.diversity == pytest.approx(expected, abs=1e-5) and min(expected) > 1.0001
    assert found.diversities == {}


def test_diversity_on_other_features_is_that_of_the_same_pictures() -> None:
    sampler = sampler_of(tiny.flux())
    plan = Plan(PROMPTS[:2], PROMPTS[:3], sampler.model.latent_shape(32, 32), 12)
    several = replace(MEASURE, more_features={"of_red": lambda images: images[:, :1].flatten(1)})
    alone = replace(MEASURE, features=several.more_features["of_red"])
    found, expected = (measure.evaluate("student", sampler, plan) for measure in (several, alone))
    assert found.diversities == {"of_red": pytest.approx(expected.diversity)}
    assert found.diversity == pytest.approx(MEASURE.diversity(sampler, plan)) == several.diversity(sampler, plan)
    assert found.diversity != pytest.approx(expected.diversity, abs=1e-4) and found.varied == expected.varied


def test_no_more_pictures_are_held_than_are_drawn_at_a_time() -> None:
    sampler, sizes = sampler_of(tiny.flux()), []

    def seen(images: Tensor) -> Tensor:
        sizes.append(len(images))
        return images.flatten(1)

    measure = Measure({"red": lambda images, prompts: (sizes.append(len(images)), red(images, prompts))[1]}, None, seen)
    measure.evaluate("student", sampler, Plan(PROMPTS, PROMPTS[:2], sampler.model.latent_shape(32, 32), 3))
    scored, compared = len(PROMPTS) + 16, 16  # pictures of one prompt are also scored, for their spread
    assert max(sizes) == 3 and sum(sizes) == scored + compared


def test_alone_every_part_is_worked_on_once() -> None:
    assert in_turns(range(3), str) == ["0", "1", "2"] and in_turns([], str) == []


def test_two_processes_share_the_work_and_have_the_figures_of_one(tmp_path: Path) -> None:
    sampler = sampler_of(tiny.flux())
    tiny.flux().save_pretrained(tmp_path / "flux")
    found = MEASURE.evaluate("student", sampler, Plan(PROMPTS, PROMPTS[:3], sampler.model.latent_shape(32, 32), 2))
    (tmp_path / "one.json").write_text(json.dumps(asdict(found)))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m"]
    done = subprocess.run(
        [*command, "tests.training.turns", str(tmp_path)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]


def test_a_long_look_shows_how_far_it_is_and_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also within a run's own bar, which stays."""
    shown = io.StringIO()
    monkeypatch.setattr(progress, "console", Console(file=shown, force_terminal=True, width=80))

    def slow(part: int) -> int:
        time.sleep(0.3)  # longer than a bar takes to be drawn again
        return part

    for _ in progress.steps("rats", 0, 2):
        assert in_turns(range(3), slow, "diversity") == [0, 1, 2]
    text = shown.getvalue()
    assert "diversity" in text and "1/3" in text and "rats" in text
    assert "diversity" not in text.splitlines()[-1] and "2/2" in text
    shown = io.StringIO()
    monkeypatch.setattr(progress, "console", Console(file=shown, width=80))
    assert in_turns(range(3), str, "diversity") == ["0", "1", "2"]
    assert "diversity" not in shown.getvalue(), "a log file is no place for a bar that passes"


def test_the_varied_pictures_are_scored_prompt_by_prompt() -> None:
    """Each is what the sampler draws of that prompt and seed, whatever it was drawn with."""
    sampler = sampler_of(tiny.sd3())
    shape = sampler.model.latent_shape(32, 32)

    def brightness(images: Tensor, prompts: Sequence[str]) -> Tensor:
        return images.mean(dim=(1, 2, 3)) + torch.tensor([float(len(prompt)) for prompt in prompts])

    measure = Measure({"bright": brightness}, None, lambda images: images)
    plan = Plan(PROMPTS[:3], [PROMPTS[0], PROMPTS[10]], shape, 8)
    found = measure.evaluate("student", sampler, plan)
    for at, prompt in enumerate(plan.varied):
        seeds = [plan.varied_seed + 8 * at + k for k in range(8)]
        own = brightness(sampler.draw([prompt] * 8, seeds, shape, 8), [prompt] * 8)
        assert found.varied["bright"][at] == pytest.approx(own.tolist(), abs=1e-5)
    assert found.diversity == pytest.approx(measure.diversity(sampler, plan))


def test_a_second_experts_guidance_is_part_of_the_key() -> None:
    model = joined(family_of(tiny.wan_14b(), max_tokens=tiny.MAX_TOKENS))
    shape = model.latent_shape(32, 32, 5)
    sampler = Sampler(model, (1.0, 0.5), 4.0)
    found = [key(sampler, shape)]
    for second in (3.0, 2.0):
        model.guidance_2 = second  # type: ignore[attr-defined]
        found.append(key(sampler, shape))
    assert len(set(found)) == 3


def test_each_expert_is_guided_as_strongly_as_it_is_told() -> None:
    """The second from just below its boundary on, and as the first one where nothing is said of it."""
    model = joined(family_of(tiny.wan_14b(), max_tokens=tiny.MAX_TOKENS))
    x = torch.randn(1, *model.latent_shape(32, 32, 5), generator=torch.Generator().manual_seed(1))
    field = Sampler(model, (1.0,), 4.0, "a ring").velocity(["a red heart"])
    for second in (0.0, 2.5):
        model.guidance_2 = second  # type: ignore[attr-defined]
        for sigma, own in ((1.0, 4.0), (0.875, 4.0), (0.874, second or 4.0), (0.2, second or 4.0)):
            with torch.no_grad():
                v, negative = (model.velocity(x, sigma, model.encode([text])) for text in ("a red heart", "a ring"))
                torch.testing.assert_close(field(x, sigma), negative + own * (v - negative), rtol=1e-4, atol=1e-4)


def test_a_models_hash_is_of_its_names_types_and_values() -> None:
    def of(first: str = "a", value: float = 1.0, dtype: torch.dtype = torch.float32) -> str:
        network = nn.Module()
        network.register_parameter(first, nn.Parameter(torch.full((2,), value, dtype=dtype)))
        network.register_buffer("z", torch.zeros(1))
        return hash_model(network)

    assert of() == of() and len({of(), of("b"), of(value=2.0), of(dtype=torch.bfloat16)}) == 4


def test_a_quantised_weight_is_hashed_by_all_that_it_is_made_of() -> None:
    """torchao's are one tensor to the eye, and a narrow one with its scales inside."""

    class Made:
        def __init__(self, **parts: Tensor) -> None:
            self.parts = parts

        def __getattr__(self, name: str) -> Tensor:
            return self.parts[name]

        def __tensor_flatten__(self) -> tuple[list[str], None]:
            return list(self.parts), None

        def detach(self) -> "Made":
            return self

    def of(data: float, scale: float) -> str:
        digest = hashlib.sha256()
        made: Any = Made(qdata=torch.full((2,), data), scale=torch.full((1,), scale))
        add_weights(digest, {"w": made})
        return digest.hexdigest()

    assert of(1, 2) == of(1, 2) and len({of(1, 2), of(1, 3), of(2, 2)}) == 3


def test_figures_are_kept_by_the_kind_of_gpu_and_not_by_which_of_them_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    gpus = {"cuda:0": "NVIDIA A", "cuda:1": "NVIDIA A", "cuda:2": "NVIDIA B"}
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: gpus[str(device)])
    part = nn.Linear(1, 1)
    part.dtype = torch.bfloat16  # type: ignore[assignment]

    def of(device: str) -> list[str]:
        model: Any = SimpleNamespace(device=torch.device(device), transformer=part, vae=part)
        return computed_with(Sampler(model, (1.0,), precision="bf16"))

    assert of("cuda:0") == of("cuda:1") == ["NVIDIA A", "bf16", "torch.bfloat16", "torch.bfloat16"]
    assert of("cuda:2")[0] == "NVIDIA B" and of("cpu")[0] == "cpu"

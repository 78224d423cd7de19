"""A whole run of three steps for each family, on tiny random pipelines of the real classes."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from torch import Tensor
from typer.testing import CliRunner

from student.bundle import read_student
from student.families.family import Family
from student.families.find import open_family
from student.families.flux import Flux
from student.families.wan import Wan
from student.files import verify_files
from student.noise import noise
from student.pipeline import open_pipeline, read_index, reproduce, shift_no_more
from student.sampler import denoise
from tests.student.families import tiny
from tests.training.rats.own_reward import Redness
from training.config import with_settings
from training.evaluate import DIVERSITY_SEEDS, Evaluation, Measure, Plan
from training.experiment import validation
from training.experiment.presets import preset
from training.experiment.setup import DTYPES, prepare
from training.prompts import from_files
from training.rats.adapters import LORA_TARGETS
from training.rats.config import RatsConfig
from training.sampler import Sampler
from training.steplog import read_log
from training.usage import plain

OWN, OTHERS = "tests.training.rats.own_reward", "tests.rewards.own"
PIPELINES = tiny.MAKERS


@pytest.fixture(autouse=True)
def own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("training.evaluate.CACHE", tmp_path / "cache")


def run(*arguments: str) -> tuple[int, str]:
    import typer

    from training.run import main

    app = typer.Typer()
    app.command()(main)
    result = CliRunner().invoke(app, list(arguments), env={"COLUMNS": "400"})
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, " ".join(result.output.split())


def settings(tmp_path: Path, family: str, **others: object) -> list[str]:
    """A run of seconds on a tiny pipeline of ``family``, saved into ``tmp_path``; keys without their groups."""
    folder = tmp_path / family
    if not folder.exists():
        PIPELINES[family]().save_pretrained(folder)
        (tmp_path / "prompts.txt").write_text("".join(f"a red heart number {i}\n" for i in range(16)))
    chosen = {
        "model": folder,
        "reward": f"{OWN}:Redness",
        "heldout": f"{OWN}:Brightness",
        "prompts": tmp_path / "prompts.txt",
        "student_id": f"tiny-{family}",
        "height_px": 32,
        "width_px": 32,
        "frames": 5 if family.startswith("wan") else 1,
        "max_tokens": tiny.MAX_TOKENS,
        "nfe": 3,
        "teacher_nfe": 5,
        "reference_nfe": 6,
        "guidance": 2.0 if family == "sd3" else 1.0,
        "guided_steps": 2 if family == "sd3" else 0,
        "batch": 2,
        "steps": 3,
        "validate_every": 2,
        "min_diversity": 0.0,  # a random model's pictures change with every step
        "precision": "fp32",
        "lr": 1e-3,
        **others,
    }
    return [part for key, value in chosen.items() for part in ("--set", f"{RatsConfig.MOVED.get(key, key)}={value}")]


@pytest.mark.parametrize("family", PIPELINES)
def test_a_run_writes_a_bundle_that_diffusers_draws_like_us(family: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    more = {"heldout": f"{__name__}:Later", "alpha": 0.1, "warmup": 1}  # the run's last step is kept
    code, text = run("--out", str(out), *settings(tmp_path, family, **more))
    assert code == 0, text
    student = read_student(out)
    assert student.chosen_at > 0
    verify_files(out, student)
    model = open_family(out, max_tokens=tiny.MAX_TOKENS)
    assert (student.steps, student.id) == ((3,), f"tiny-{family}") and student.family == model.name
    pipe = open_pipeline(out)
    assert type(pipe) is type(PIPELINES[family]())
    theirs = reproduce(pipe, student, ["a red heart number 3"], [5], 3)
    x = torch.from_numpy(noise([5], student.latents.shape))
    condition = model.encode(["a red heart number 3"])
    with torch.no_grad():
        ours = model.decode(denoise(lambda x, s: model.velocity(x, s, condition), x, student.sigmas[3]))
    np.testing.assert_allclose(theirs, ours.numpy(), atol=2e-3)
    before, after = (load_file(next((p / "transformer").glob("*.safetensors"))) for p in (tmp_path / family, out))
    assert any(not torch.equal(value.half(), after[name]) for name, value in before.items()), "it is kept in fp16"
    card = (out / "README.md").read_text()
    assert "| teacher | 6 |" in card and (out / "run" / "grids" / "000002.png").exists()
    assert plain(student, read_index(out), "fp32") in card  # what it does: test_card
    assert ModelCard(card).data.base_model == family == student.teacher


PRESETS = {
    "flux-dev": "flux",
    "sd35-medium": "sd3",
    "wan-1.3b": "wan",
    "wan-2.2-5b": "wan_5b",
    "wan-14b": "wan_14b",
    "flux2-klein": "flux2",
    "qwen-image": "qwen_image",
    "z-image-turbo": "z_image",
}
SMALLER = {  # what a real run's scale is made of; everything else stays as the preset has it
    *("model", "reward", "heldout", "prompts", "height_px", "width_px", "frames", "max_tokens", "teacher_nfe"),
    *("reference_nfe", "guided_steps", "steps", "validate_every", "min_diversity"),
}


@pytest.mark.parametrize("preset", PRESETS)
def test_the_presets_of_real_models_run_with_their_own_settings(preset: str, tmp_path: Path) -> None:
    """One sample a micro-batch, tau in spreads, bf16 with adapters, the detached gradient, the reward on few frames."""
    family = PRESETS[preset]
    given = dict(setting.split("=", 1) for setting in settings(tmp_path, family, steps=3, teacher_nfe=9)[1::2])
    if family == "flux2":  # the preset begins with klein's base, which is guided
        tiny.flux2(is_distilled=False).save_pretrained(tmp_path / family)
    dotted = {RatsConfig.MOVED.get(key, key) for key in SMALLER}
    chosen = [part for key, value in given.items() if key in dotted for part in ("--set", f"{key}={value}")]
    chosen += ["--set", "validation.dinov2="]  # which would be fetched
    code, text = run("--preset", preset, "--out", str(tmp_path / "out"), *chosen)
    assert code == 0, text
    rows = [row for row in read_log(tmp_path / "out" / "run" / "log.jsonl") if row["step"] >= 0]
    assert len(rows) == 3 and all(row["grad_norm"] > 0 and row["gap_std"] > 0 for row in rows)
    assert all(0 < row["gate_std"] < 0.5 for row in rows)


@pytest.mark.parametrize("gradient", ["full", "detached"])
def test_lora_with_everything_that_saves_memory(gradient: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    more = {"lora_rank": 2, "lr": 0.01, "checkpointing": "true", "gradient": gradient, "accumulate": 2}
    code, text = run("--out", str(out), *settings(tmp_path, "flux", **more))
    assert code == 0, text
    merged = DiffusionPipeline.from_pretrained(out).transformer
    assert not [name for name, _ in merged.named_parameters() if "lora" in name]
    pipe = DiffusionPipeline.from_pretrained(tmp_path / "flux")
    pipe.load_lora_weights(out / "adapter")
    drawn = [drawn_by(one, out) for one in (pipe, open_pipeline(out), open_pipeline(tmp_path / "flux"))]
    assert np.abs(drawn[0] - drawn[1]).max() < 2e-3 < 0.02 < np.abs(drawn[2] - drawn[1]).max()
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    for name, value in merged.state_dict().items():
        torch.testing.assert_close(pipe.transformer.state_dict()[name], value, atol=2e-3, rtol=2e-3)
    plain = load_file(out / "adapter" / "pytorch_lora_weights.safetensors")
    assert all(re.fullmatch(r"transformer\..*\.lora_[AB]\.weight", name) for name in plain)  # no scale beside them
    before = DiffusionPipeline.from_pretrained(tmp_path / "flux").transformer.state_dict()
    moved = {name for name, value in merged.state_dict().items() if (value - before[name]).abs().max() > 2e-2}
    assert "proj_out.weight" not in moved, "the last layer is outside of the blocks"
    assert len(moved) > 5 and all(re.fullmatch(LORA_TARGETS + r"\.weight", name) for name in moved)


def drawn_by(pipe: Any, out: Path) -> np.ndarray:
    """The student's picture of one seed, by diffusers' own loop."""
    shift_no_more(pipe)
    return reproduce(pipe, read_student(out), ["a red heart number 3"], [5], 3)


@pytest.mark.parametrize("family", PIPELINES)
def test_adapters_are_on_the_blocks_alone(family: str) -> None:
    transformer = PIPELINES[family]().transformer
    kinds = [name for name, part in transformer.named_modules() if isinstance(part, torch.nn.Linear)]
    chosen = {name for name in kinds if re.fullmatch(LORA_TARGETS, name)}
    inside = {name for name in kinds if re.match(r"(\w*blocks|layers|\w*refiner)\.\d", name)}
    assert len(chosen) > 5 and chosen <= inside
    assert all(re.search("norm|_mod|modulation", name) for name in inside - chosen), "attention and feed-forward, all"


class Opposite(Redness):
    """The held-out scorer that disagrees with the trained one about everything."""

    def score(self, images_BCHW: Tensor, prompts: Sequence[str]) -> Tensor:
        return -super().score(images_BCHW, prompts)


def test_a_held_out_scorer_that_disagrees_keeps_the_start_and_the_run_says_so(tmp_path: Path) -> None:
    out = tmp_path / "out"
    more = {"heldout": f"{__name__}:Opposite", "alpha": 0.0, "lr": 0.01, "steps": 6, "warmup": 1, "lora_rank": 2}
    code, text = run("--out", str(out), *settings(tmp_path, "flux", **more))
    assert code == 0 and "the student has the weights that it began with" in text, text
    rows = [row for row in read_log(out / "run" / "log.jsonl") if "heldout_validation" in row]
    assert rows[-1]["reward_validation"] > rows[0]["reward_validation"] + 0.1, "it did learn"
    assert all(row["heldout_validation"] == pytest.approx(-row["reward_validation"], abs=1e-4) for row in rows)
    assert {row["best_at"] for row in rows} == {0.0}
    assert read_student(out).chosen_at == 0 and "**Not better than its start" in (out / "README.md").read_text()
    assert "the held-out score fell" in (out / "run" / "alarms.txt").read_text()
    before, after = (load_file(next((p / "transformer").glob("*.safetensors"))) for p in (tmp_path / "flux", out))
    assert all(torch.equal(value.half(), after[name]) for name, value in before.items())


def test_a_held_out_scorer_that_agrees_keeps_a_step(tmp_path: Path) -> None:
    out = tmp_path / "out"
    more = {"heldout": f"{__name__}:Same", "alpha": 0.0, "lr": 0.01, "steps": 4, "warmup": 1}
    code, text = run("--out", str(out), *settings(tmp_path, "flux", **more))
    assert code == 0 and "the weights that it began with" not in text, text
    assert read_student(out).chosen_at == 4 and "(after 4 of 4 steps)" in (out / "README.md").read_text()


class Same(Redness):
    """The trained one by another name."""


class Later:
    """It likes each picture better than the ones before it, so that the last checkpoint is the best."""

    differentiable = False

    def __init__(self) -> None:
        self.seen = 0

    def score(self, images_BCHW: Tensor, prompts: Sequence[str]) -> Tensor:
        self.seen += len(images_BCHW)
        return torch.arange(self.seen - len(images_BCHW), self.seen, dtype=torch.float32)


def test_what_is_measured_is_guided_as_what_is_trained_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[str, int, float, str]] = []
    plain = Measure.evaluate

    def evaluate(self: Measure, label: str, sampler: Sampler, plan: Plan) -> Evaluation:
        seen.append((label, len(sampler.sigmas), sampler.guidance, sampler.precision))
        return plain(self, label, sampler, plan)

    monkeypatch.setattr(Measure, "evaluate", evaluate)
    more = {"watched_prompts": 3, "min_diversity": 0.1}
    values = settings(tmp_path, "sd3", **more)
    code, text = run("--out", str(tmp_path / "out"), *values)
    assert code == 0, text
    teachers = [("teacher", 6, 2.0, "fp32"), ("teacher", 3, 2.0, "fp32")]
    assert seen == [("calibration", 6, 2.0, "fp32"), *teachers, ("student", 3, 1.0, "fp32")]
    setup = prepare(with_settings(preset("shapes"), values[1::2]))
    plan = validation._plan(setup)
    assert len(plan.varied) == min(3, len(plan.prompts)) > 1 and plan.varied == plan.prompts[:3]


def test_a_guidance_that_the_network_takes_is_set_once_and_not_doubled(tmp_path: Path) -> None:
    arguments = settings(tmp_path, "flux", guidance=2.0, lora_rank=2)
    shutil.rmtree(tmp_path / "flux")
    tiny.flux(guidance_embeds=True).save_pretrained(tmp_path / "flux")
    calls: list[float] = []
    plain = Flux._predict

    def predict(self: Flux, x: Tensor, *more: Any) -> Tensor:
        calls.append(self.guidance)
        return plain(self, x, *more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Flux, "_predict", predict)
        code, text = run("--out", str(tmp_path / "out"), *arguments)
    assert code == 0, text
    student = read_student(tmp_path / "out")
    assert set(calls) == {2.0} and student.baked == {"guidance_scale": 2.0}
    setup = prepare(with_settings(preset("shapes"), arguments[1::2]))
    x = torch.randn(1, *setup.latents.shape)
    sampler = setup.sampler(setup.model, "teacher", 3)
    with torch.no_grad():
        once = setup.model.velocity(x, 0.5, setup.model.encode(["a red heart number 3"]))
        torch.testing.assert_close(sampler.velocity(["a red heart number 3"])(x, 0.5), once)


@pytest.mark.parametrize("weights", ["fp32", "bf16"])
def test_weights_are_kept_in_the_types_of_the_run(weights: str, tmp_path: Path) -> None:
    """bf16 as bf16; a weight that fp16 cannot hold is no traceback after the training."""
    arguments = settings(tmp_path, "flux", weights=weights, lora_rank=2)
    pipe = tiny.flux()
    pipe.transformer.norm_out.linear.bias.data[0] = 1e5  # beyond 65504
    shutil.rmtree(tmp_path / "flux")
    pipe.save_pretrained(tmp_path / "flux")
    code, text = run("--out", str(tmp_path / "out"), *arguments)
    assert code == 0, text
    kept = load_file(next((tmp_path / "out" / "transformer").glob("*.safetensors")))
    assert {value.dtype for value in kept.values()} == {torch.float32 if weights == "fp32" else torch.bfloat16}


def test_one_student_for_several_step_counts(tmp_path: Path) -> None:
    out = tmp_path / "out"
    code, text = run(
        "--out",
        str(out),
        *settings(tmp_path, "flux", nfe="[2,3,4]", steps=6, tau_in_spreads="true", weights="bf16", lora_rank=2),
    )
    assert code == 0, text
    student = read_student(out)
    assert student.steps == (2, 3, 4) and all(len(student.sigmas[nfe]) == nfe for nfe in (2, 3, 4))
    assert len({row["nfe"] for row in read_log(out / "run" / "log.jsonl") if "nfe" in row}) > 1
    assert [(row["model"], row["nfe"]) for row in student.evaluation][-3:] == [("student", n) for n in (2, 3, 4)]
    assert set(student.within_prompt or {}) == {"2", "3", "4"}
    for known in (student.within_prompt or {}).values():
        assert known.seeds == DIVERSITY_SEEDS and set(known.spread) == set(known.gain) == set(student.scorers)
        assert all(spread > 0 for spread in known.spread.values())


def test_rewards_are_weighted_and_logged_as_one(tmp_path: Path) -> None:
    out = tmp_path / "out"
    both = f"{OWN}:Redness:1.0,{OWN}:Brightness:-0.5"
    code, text = run("--out", str(out), *settings(tmp_path, "flux", reward=both, heldout=f"{OWN}:Counted"))
    assert code == 0, text
    row = read_student(out).evaluation[0]
    assert abs(row["trained"]["mean"]) < 3 and row["prompts"] >= 3


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"reward": f"{OWN}:Counted"}, "has no gradient down to the pixels"),
        ({"heldout": f"{OWN}:Redness"}, "is both trained on and held out"),
        ({"reward": f"{OWN}:Rednes"}, "did you mean 'Redness'"),
        ({"tau_in_spreads": "true", "batch": 1}, "it needs 2 or more samples per step"),
        ({"weights": "bf16"}, "small updates to bf16 weights round to nothing"),
        ({"height_px": 33}, "height is 33: accepted are multiples of"),
        ({"prompts": "/nowhere.txt"}, "there is no such file"),
        ({"reward": f"{OTHERS}:Column"}, "returned shape (2, 1) for 2 images"),
        ({"reward": f"{OTHERS}:Raising"}, "failed in score(images_BCHW, prompts): KeyError"),
        ({"reward": f"{OTHERS}:Blind"}, "says that it is differentiable, but its scores have no gradient"),
        (
            {"reward": f"{OWN}:Redness,{OTHERS}:Flat"},
            f"the gradient of reward '{OTHERS}:Flat' is zero for every picture",
        ),
        (
            {"reward": f"{OTHERS}:Full"},
            "checkpointing=true, gradient.mode=detached, lora.rank=32, or a smaller optim.batch or",
        ),
        ({"heldout": f"{OTHERS}:one_for_all"}, "returned shape (1,) for 2 images"),
        ({"heldout": f"{OTHERS}:Listed"}, "returned a list for 2 images"),
        ({"heldout": f"{OTHERS}:NotANumber"}, "cannot be standardised: not all scores of"),
        ({"student_id": "my model"}, "student.id is 'my model': accepted are"),
        ({"seed": -1}, "seed is -1: accepted is 0 to"),
        ({"device": "gpu0"}, "compute.device is 'gpu0', which cannot be used here"),
        ({"device": "meta"}, "compute.device is 'meta', which cannot be used here"),
    ],
)
def test_what_cannot_be_run_is_refused_and_leaves_nothing(
    change: dict[str, object], sentence: str, tmp_path: Path
) -> None:
    code, text = run("--out", str(tmp_path / "out"), *settings(tmp_path, "flux", **change))
    assert code == 2 and sentence in text, text
    assert not (tmp_path / "out").exists()


def test_a_black_box_may_only_measure(tmp_path: Path) -> None:
    """Without a reward term the gate may use a reward that gives no gradient."""
    more = {"reward": f"{OWN}:Counted", "reward_weight": 0}
    code, text = run("--out", str(tmp_path / "out"), *settings(tmp_path, "flux", **more))
    assert code == 0, text


@pytest.mark.parametrize("distilled", [True, False])
def test_guidance_that_the_pipeline_never_applies_is_refused(distilled: bool, tmp_path: Path) -> None:
    arguments = settings(tmp_path, "flux2", guidance=4.0)
    tiny.flux2(is_distilled=distilled).save_pretrained(tmp_path / "flux2")
    code, text = run("--out", str(tmp_path / "out"), *arguments)
    assert (code == 2) == distilled, text
    assert ("flux2 is distilled, so accepted is 1" in text) == distilled and (tmp_path / "out").exists() != distilled


def test_prompts_that_are_cut_are_said_and_trained_on(tmp_path: Path) -> None:
    arguments = settings(tmp_path, "flux")
    with (tmp_path / "prompts.txt").open("a") as file:
        file.write("a red heart that is as long as no other\n")
    code, text = run("--out", str(tmp_path / "out"), *arguments)
    assert code == 0 and "prompts.txt: line 17 cut, longer than the 24 tokens that the model reads" in text, text
    assert text.count(" cut, ") == 1


def test_prompts_that_a_reward_does_not_read_to_their_end_are_said_too(tmp_path: Path) -> None:
    """The model reads all of them here; each reward has its own tokenizer and its own length."""
    rewards = {"reward": "tests.rewards.small:Pick", "heldout": "tests.rewards.small:Image"}
    arguments = settings(tmp_path, "flux", **rewards, max_tokens=200)
    with (tmp_path / "prompts.txt").open("a") as file:
        file.writelines(f"{' '.join('b' * num)}\n" for num in (33, 34, 38, 39))  # and two marks, of start and end
    code, text = run("--out", str(tmp_path / "out"), *arguments)
    assert code == 0 and text.count(" cut, ") == 2, text
    assert (
        "prompts.txt: line 20 cut, longer than the 40 tokens that the reward 'tests.rewards.small:Pick' reads" in text
    )
    assert "lines 18, 19, 20 cut, longer than the 35 tokens that the reward 'tests.rewards.small:Image' reads" in text


def test_rewards_that_are_no_numbers_end_the_run_and_change_nothing(tmp_path: Path) -> None:
    more = {"reward": f"{OWN}:Broken", "steps": 30, "validate_every": 5}
    code, text = run("--out", str(tmp_path / "out"), *settings(tmp_path, "flux", **more))
    assert code == 2 and "the loss was not finite for 10 steps in a row" in text
    rows = read_log(tmp_path / "out" / "run" / "log.jsonl")
    assert sum("skipped" in row for row in rows) == 9
    looked = [row["reward_validation"] for row in rows if "reward_validation" in row]
    assert len(looked) == 2 and looked[0] == looked[1]


def test_a_run_without_a_better_heldout_score_stops_early(tmp_path: Path) -> None:
    more = {"steps": 30, "validate_every": 1, "patience": 2, "lr": 1e-30}
    code, text = run("--out", str(tmp_path / "out"), *settings(tmp_path, "flux", **more))
    assert code == 0 and "stopped early after 2 steps: the held-out score was best after 0" in text, text
    assert [row["step"] for row in read_log(tmp_path / "out" / "run" / "log.jsonl")] == [-1, 0, 1]


@pytest.mark.parametrize("family", ["flux", "wan"])
def test_one_picture_at_a_time_is_one_everywhere(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Calibration, the teacher's diversity, validations, velocities, grids and evidence."""
    sizes: set[tuple[str, int]] = set()
    for name in ("velocity", "decode"):
        plain = getattr(Family, name) if name == "velocity" else None
        for kind in (Flux, Wan):
            method = plain or getattr(kind, name)

            def counted(self: Family, x: Tensor, *more: Any, name: str = name, method: Any = method) -> Tensor:
                sizes.add((name, len(x)))
                return method(self, x, *more)

            monkeypatch.setattr(kind, name, counted)
    more = {"batch": 1, "draw_batch": 1, "min_diversity": 0.5, "steps": 2, "diversity_prompts": 2}
    code, text = run("--out", str(tmp_path / "out"), *settings(tmp_path, family, **more))
    assert code == 0, text
    assert sizes == {("velocity", 1), ("decode", 1)}


def test_a_second_size_is_calibrated_again(tmp_path: Path) -> None:
    kept = []
    for height_px, width_px in ((32, 32), (64, 32)):
        values = settings(tmp_path, "sd3", height_px=height_px, width_px=width_px)
        setup = prepare(with_settings(preset("shapes"), values[1::2]))
        kept.append(setup.rewards["trained"].terms[0].calibration)
    assert kept[0] != kept[1]


@pytest.mark.parametrize("lora_rank", [0, 2])
def test_the_evidence_is_that_of_the_bundle_on_disk(lora_rank: int, tmp_path: Path) -> None:
    """Merged, rounded, written and opened again: every score is that of a picture which its user draws."""
    out = tmp_path / "out"
    weights = "bf16" if lora_rank else "fp32"
    more = {"lora_rank": lora_rank, "lr": 0.03, "weights": weights, "alpha": 0.0}
    code, text = run("--out", str(out), *settings(tmp_path, "flux", **more))
    assert code == 0, text
    rows = [json.loads(path.read_text()) for path in (tmp_path / "cache").glob("*.json")]
    said = next(row for row in rows if row["label"] == "student")
    student = read_student(out)
    model = open_family(out, DTYPES[weights], max_tokens=student.max_tokens)
    texts = from_files(tmp_path / "prompts.txt", None, 401).test
    images = Sampler(model, student.sigmas[3]).draw(texts, range(len(texts)), student.latents.shape, 64)
    assert said["scores"]["trained"] == Redness().score(images, texts).double().tolist()
    assert np.std(said["scores"]["trained"]) > 0

"""Published pipelines become students as they lie, with their own sigmas and guidance, or are refused in a sentence."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from huggingface_hub import constants as hub_constants
from safetensors.torch import load_file, save_file

from export import adoption, measure
from export import source as source_module
from export.adoption import Adoption
from export.errors import ExportError
from export.lora import Lora
from export.measure import KEPT
from export.single_file import find_model
from export.within import FIRST_SEED
from export.within import KEPT as KEPT_WITHIN
from student.bundle import read_student
from student.files import verify_files
from student.pipeline import open_pipeline, reproduce
from student.runtimes.load import load
from student.runtimes.options import Options
from student.within_prompt import measure as measure_within
from tests.export.adopting import PROMPTS, a_lora, edit, own_picture, published, run, schnell
from tests.student.families import tiny

NETWORKS = ("transformer", "vae", "text_encoder", "text_encoder_2")


@pytest.mark.parametrize(
    ("name", "call", "baked"),
    [
        ("schnell", {"max_sequence_length": 256}, {}),
        ("dev", {"guidance_scale": 3.5}, {"guidance_scale": 3.5}),
        ("turbo", {"guidance_scale": 1.0}, {"guidance_scale": 1.0}),
    ],
)
def test_a_student_draws_what_its_model_draws_when_asked_for_so_many_steps(
    sources: Callable[[str], Path], tmp_path: Path, name: str, call: dict[str, Any], baked: dict[str, float]
) -> None:
    source, out = sources(name), tmp_path / "students" / name
    said = f"hashing every file {out}: {'sd3' if name == 'turbo' else 'flux'}, 4, 2 steps;"
    found = run(source, "--steps", "4,2", "--size", "32x64", "--out", out)
    assert found == (0, f"{said} FEWSTEP_MODEL={out} serves it")
    student = read_student(out)
    verify_files(out, student)
    assert student.baked == baked and student.steps == (4, 2) and student.teacher == name
    runtime = load(out, "torch")
    for steps in (4, 2):
        theirs = own_picture(source, steps, PROMPTS[0], 7, **call)
        np.testing.assert_allclose(runtime.draw([PROMPTS[0]], [7], steps), theirs, atol=1e-4)
    np.testing.assert_allclose(
        reproduce(open_pipeline(out), student, [PROMPTS[0]], [7], 4), runtime.draw([PROMPTS[0]], [7], 4), atol=1e-4
    )
    card = (out / "README.md").read_text()
    assert "license: apache-2.0" in card and f"base_model: {name}" in card and "without any training" in card


def test_no_weight_is_copied_and_the_source_is_not_touched(sources: Callable[[str], Path], tmp_path: Path) -> None:
    source, out = sources("schnell"), tmp_path / "linked"
    before = {path: path.read_bytes() for path in source.rglob("*.json")}
    assert run(source, "--size", "32x64", "--out", out)[0] == 0
    weights = sorted(source.rglob("*.safetensors"))
    assert len(weights) == 4
    for path in weights:
        assert (out / path.relative_to(source)).stat().st_ino == path.stat().st_ino
    assert {path: path.read_bytes() for path in source.rglob("*.json")} == before
    assert run(source, "--size", "32x64", "--out", out)[1].startswith(f"{out} already exists")
    assert "choose another --out" in run(source, "--size", "32x64", "--steps", "2", "--out", out)[1]


@pytest.mark.parametrize(("variant", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_variants_shards_and_links_into_a_cache_are_opened_without_being_told(
    tmp_path: Path, variant: str, dtype: torch.dtype
) -> None:
    pipe = schnell().to(dtype)
    source = published(tmp_path / "half", pipe, variant=variant, max_shard_size="20KB")
    assert list(source.glob(f"transformer/*.index.{variant}.json"))
    assert not [path for path in source.rglob("*.safetensors") if f".{variant}" not in path.name]
    cache = tmp_path / "cache"
    cache.mkdir()
    for number, path in enumerate(sorted(source.rglob("*.safetensors"))):
        shutil.move(path, cache / f"blob{number}")
        path.symlink_to(cache / f"blob{number}")
    out = tmp_path / "student"
    code, said = run(source, "--size", "32x64", "--out", out)
    assert code == 0, said
    verify_files(out, read_student(out))
    for name in NETWORKS:
        theirs = getattr(pipe, name).state_dict()
        ours = getattr(open_pipeline(out), name).state_dict()
        assert all(torch.equal(ours[key], value.float()) for key, value in theirs.items() if value.is_floating_point())
    assert not any(path.is_symlink() for path in out.rglob("*"))


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ("black-forest-labs/FLUX.1-schnell", "schnell"),
        ("stabilityai/stable-diffusion-3.5-large-turbo", "turbo"),
        ("owner/name", "schnell"),
    ],
)
def test_a_hub_id_is_adopted_from_the_cache(
    sources: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: str, name: str
) -> None:
    place, commit, out = tmp_path / f"models--{model.replace('/', '--')}", "c" * 40, tmp_path / "student"
    shutil.copytree(sources(name), place / "snapshots" / commit)
    (place / "refs").mkdir()
    (place / "refs" / "main").write_text(commit)
    monkeypatch.setattr(hub_constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(hub_constants, "HF_HUB_OFFLINE", True)
    code, said = run(model, "--size", "32x64", "--steps", "2", "--out", out)
    assert code == 0, said
    assert read_student(out).teacher == model and f"base_model: {model}" in (out / "README.md").read_text()
    own = sources(name) / "transformer" / "diffusion_pytorch_model.safetensors"
    assert (out / "transformer" / own.name).read_bytes() == own.read_bytes()


@pytest.mark.parametrize("model", ["flux1-dev.safetensors", "./FLUX.1-dev", "models/flux.gguf", "/nowhere/FLUX.1-dev"])
def test_a_path_that_does_not_exist_is_not_looked_for_on_the_hub(tmp_path: Path, model: str) -> None:
    code, said = run(model, "--out", tmp_path / "out")
    assert code == 1 and f"{model} does not exist: accepted are a folder" in said, said


def _pickled(part: str) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        for path in folder.glob(f"{part}/*.safetensors"):
            torch.save(load_file(path), path.with_suffix(".bin"))
            path.unlink()

    return spoil


def _evicted(folder: Path) -> None:
    """The hub's cache was cleaned, and the link into it was left."""
    path = next(folder.glob("text_encoder/*.safetensors"))
    path.unlink()
    path.symlink_to(folder.parent / "blobs" / "a1b2c3")


def _missing_shard(folder: Path) -> None:
    shard = "diffusion_pytorch_model-00002-of-00002.safetensors"
    index = folder / "transformer" / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": {"x": shard}}))


def _torn(folder: Path) -> None:
    path = next(folder.glob("transformer/*.safetensors"))
    data = path.read_bytes()
    path.unlink()
    path.write_bytes(data[:-100])


def _pointer(pattern: str) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        path = next(folder.glob(pattern))
        path.unlink()
        path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")

    return spoil


REFUSED: list[tuple[Callable[[Path], object], str]] = [
    (lambda f: (f / "model_index.json").unlink(), "is not a diffusers pipeline: it has no model_index.json"),
    (
        lambda f: edit(f / "model_index.json", lambda d: d.update(_class_name="StableDiffusionPipeline")),
        "is a StableDiffusionPipeline: supported are FluxPipeline,",
    ),
    (lambda f: (f / "model_index.json").write_text("{"), "model_index.json"),
    (
        lambda f: edit(f / "model_index.json", lambda d: d.update(vae=[None, None])),
        "has no vae, which a FluxPipeline needs",
    ),
    (
        lambda f: edit(f / "model_index.json", lambda d: d.pop("tokenizer_2")),
        "has no tokenizer_2, which a FluxPipeline needs",
    ),
    (_pickled("vae"), "has its weights only as pickles (diffusion_pytorch_model.bin): accepted are safetensors"),
    (_pickled("text_encoder"), "text_encoder has its weights only as pickles (model.bin): accepted are safetensors"),
    (_evicted, "model.safetensors is a link to a file that does not exist: download the model again"),
    (_missing_shard, "00002-of-00002.safetensors is missing, although diffusion_pytorch_model.safetensors.index.json"),
    (_torn, "is incomplete: its last 100 bytes are missing"),
    (_pointer("vae/*.safetensors"), "is a Git LFS pointer, not the file itself: run git lfs pull"),
    (_pointer("tokenizer/*.json"), "is a Git LFS pointer, not the file itself: run git lfs pull"),
    (_pointer("model_index.json"), "model_index.json is a Git LFS pointer, not the file itself"),
    (
        lambda f: (f / "text_encoder" / "config.json").write_text("{"),
        "text_encoder cannot be opened as a CLIPTextModel",
    ),
    (
        lambda f: edit(f / "transformer" / "config.json", lambda d: d.update(num_layers=2)),
        "has other weights than its config.json says: transformer_blocks.1.norm1.linear.weight is missing, not [",
    ),
    (
        lambda f: edit(f / "transformer" / "config.json", lambda d: d.update(joint_attention_dim=48)),
        "has other weights than its config.json says: context_embedder.weight is [32, 32], not [32, 48]",
    ),
    (lambda f: (f / "vae" / "config.json").unlink(), "vae cannot be opened as a AutoencoderKL"),
    (lambda f: shutil.rmtree(f / "tokenizer"), "lacks the folder 'tokenizer'"),
    (lambda f: shutil.rmtree(f / "text_encoder_2"), "lacks the folder 'text_encoder_2'"),
    (
        lambda f: [p.unlink() for p in f.glob("tokenizer_2/*")],
        "tokenizer_2 has no tokenizer file: accepted are tokenizer.json,",
    ),
    (lambda f: [p.unlink() for p in f.glob("vae/*.safetensors")], "vae has no weights"),
    (
        lambda f: edit(f / "scheduler" / "scheduler_config.json", lambda d: d.update(stochastic_sampling=True)),
        "the scheduler's stochastic_sampling is True",
    ),
    (
        lambda f: edit(f / "model_index.json", lambda d: d.update(scheduler=["diffusers", "DDIMScheduler"])),
        "has a DDIMScheduler, which does not take plain Euler steps: supported are FlowMatchEuler",
    ),
    (
        lambda f: edit(f / "model_index.json", lambda d: d.update(vae=["diffusers", "AutoencoderOfNobody"])),
        "needs diffusers.AutoencoderOfNobody, which the installed diffusers does not have",
    ),
]


@pytest.mark.parametrize(("spoil", "sentence"), REFUSED)
def test_what_cannot_be_served_is_refused_in_one_sentence_with_nothing_written(
    sources: Callable[[str], Path], tmp_path: Path, spoil: Callable[[Path], object], sentence: str
) -> None:
    source = tmp_path / "copy"
    shutil.copytree(sources("schnell"), source)
    spoil(source)
    code, said = run(source, "--size", "32x64", "--out", tmp_path / "out" / "student")
    assert code == 1 and sentence in said and said.startswith("adopt: ") and "Traceback" not in said, said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["copy"]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--steps", "0"], "accepted are numbers from 1 to 100"),
        (["--size", "33x64"], "cannot generate 33x64: width is 33: accepted are multiples of 16"),
        (["--size", "big"], "accepted is WIDTHxHEIGHT"),
        (["--guidance", "3.5"], "like FLUX.1-schnell, takes none"),
        (["--reward", "pickscore"], "--reward needs --prompts FILE"),
        (["--lora", "nowhere.safetensors"], "lora nowhere.safetensors does not exist"),
        (["--lora", "a:0"], "with a weight other than 0"),
        (["--config", "x"], "--config goes with a single .safetensors file"),
        (["--reward", "nobody", "--prompts", "PROMPTS"], "unknown reward 'nobody'"),
        (["--reward", "tests.rewards.small:Nobody", "--prompts", "PROMPTS"], "tests.rewards.small has no 'Nobody'"),
        (["--reward", "aesthetic", "--prompts", "missing.txt"], "missing.txt cannot be read as a file of prompts"),
    ],
)
def test_a_wrong_argument_is_one_sentence(
    sources: Callable[[str], Path], tmp_path: Path, arguments: list[str], sentence: str
) -> None:
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    arguments = [str(tmp_path / "prompts.txt") if part == "PROMPTS" else part for part in arguments]
    rest = [] if "--size" in arguments else ["--size", "32x64"]
    code, said = run(sources("schnell"), *arguments, *rest, "--out", tmp_path / "out")
    assert code == 1 and sentence in said and not (tmp_path / "out").exists(), said


def test_disk_and_memory_are_counted_before_anything_is_loaded(
    sources: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_file(a_lora(schnell()), tmp_path / "x.safetensors")
    arguments = (sources("schnell"), "--size", "32x64", "--lora", tmp_path / "x.safetensors", "--out", tmp_path / "out")
    with monkeypatch.context() as patched:
        patched.setattr(adoption.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(1, 1, 10**6))  # type: ignore[attr-defined]
        assert "of disk space, and 0.00 GB are free" in run(*arguments)[1]
    monkeypatch.setattr(adoption, "free_bytes", lambda: 1000)
    assert "merging a LoRA needs" in run(*arguments)[1]
    assert not (tmp_path / "out").exists()


def test_what_cannot_be_linked_is_copied_where_there_is_room(
    sources: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    needed = sum(path.stat().st_size for path in sources("schnell").rglob("*.safetensors"))
    free = [needed - 1]
    monkeypatch.setattr(adoption, "SPARE_BYTES", 0)
    monkeypatch.setattr(adoption, "_links", lambda weights, place: False)  # another file system
    monkeypatch.setattr(adoption.shutil, "disk_usage", lambda path: SimpleNamespace(free=free[0]))
    arguments = (sources("schnell"), "--size", "32x64", "--out", tmp_path / "out")
    code, said = run(*arguments)
    assert code == 1 and "of disk space" in said and not list(tmp_path.iterdir())
    free[0] = needed
    assert run(*arguments)[0] == 0


@pytest.fixture
def prompts(tmp_path: Path) -> Iterator[Path]:
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    yield tmp_path / "prompts.txt"


def test_rewards_are_measured_on_the_models_own_pictures(
    sources: Callable[[str], Path], tmp_path: Path, prompts: Path
) -> None:
    out, reward = tmp_path / "scored", "tests.rewards.small:Pick,tests.rewards.own:Redness"
    code, said = run(
        sources("schnell"), "--steps", "2,1", "--size", "32x64", "--reward", reward, "--prompts", prompts,
        "--images", "12", "--seeds", "3", "--within", "4", "--out", out,
    )  # fmt: skip
    assert code == 0, said
    student = read_student(out)
    pick, red = "tests.rewards.small-Pick", "tests.rewards.own-Redness"
    assert set(student.scorers) == {pick, red} and student.scorers[pick].reward == "tests.rewards.small:Pick"
    assert (out / "scorers" / f"{pick}.onnx").is_file() and not (out / "scorers" / f"{red}.onnx").is_file()
    assert not list((out / "scorers").glob(".*")) and (out / "calibration.txt").read_text().split("\n")[1] == "ring"
    from rewards.serving import open_reward

    runtime = load(out, "torch", 1, Options(open_reward))
    texts = [PROMPTS[number % len(PROMPTS)] for number in range(12)]
    for steps in (2, 1):
        images = np.concatenate([runtime.draw(texts[b : b + 4], range(b, b + 4), steps) for b in (0, 4, 8)])
        scores = runtime.score(images, texts)
        for name in (pick, red):
            known = student.reward_reference[name]
            assert known.at is not None
            assert scores[name].mean() == pytest.approx(known.at[str(steps)].mean, abs=1e-3)
            assert scores[name].std(ddof=1) == pytest.approx(known.at[str(steps)].std, rel=1e-3)
            if steps == 2:  # the scale is that of the largest step count
                assert abs(scores[name].mean()) < 1e-3 and scores[name].std(ddof=1) == pytest.approx(1, rel=1e-3)
    assert "## Rewards" in (out / "README.md").read_text()
    within, seeds = student.within_prompt or {}, range(FIRST_SEED, FIRST_SEED + 3)
    assert set(within) == {"1", "2"} and not (out / KEPT_WITHIN).exists()
    scores = [runtime.score(runtime.draw([text] * 3, seeds, 2), [text] * 3) for text in PROMPTS[:4]]
    assert within["2"] == measure_within({name: [row[name].tolist() for row in scores] for name in (pick, red)})


def test_an_interrupted_measurement_goes_on_where_it_was(
    sources: Callable[[str], Path], tmp_path: Path, prompts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from student.runtimes.torch import TorchRuntime

    out, drawn = tmp_path / "scored", list[int]()
    draw = TorchRuntime.draw

    def dying(self: TorchRuntime, texts: Any, seeds: Any, steps: int, *rest: Any) -> Any:
        if len(drawn) == 2:
            raise KeyboardInterrupt
        drawn.append(steps)
        return draw(self, texts, seeds, steps, *rest)

    arguments = (
        sources("schnell"), "--steps", "2,1", "--size", "32x64", "--reward", "tests.rewards.own:Redness",
        "--prompts", prompts, "--images", "20", "--seeds", "0", "--out", out,
    )  # fmt: skip
    monkeypatch.setattr(TorchRuntime, "draw", dying)
    code, said = run(*arguments)
    assert code == 130 and "resumes from there" in said and read_student(out).scorers == {}
    kept = out / "scorers" / KEPT.format(name="tests.rewards.own-Redness")
    with kept.open("a") as file:
        file.write('{"steps": 2, "hei')  # killed in the middle of a line
    seen: list[tuple[int, int]] = []
    monkeypatch.setattr(
        TorchRuntime,
        "draw",
        lambda self, texts, seeds, steps, *rest: (
            seen.extend((steps, seed) for seed in seeds) or draw(self, texts, seeds, steps, *rest)
        ),
    )
    assert run(*arguments)[0] == 0
    assert seen == [(2, seed) for seed in range(16, 20)] + [(1, seed) for seed in range(20)]
    assert set(read_student(out).scorers) == {"tests.rewards.own-Redness"} and not kept.exists()


def test_a_reward_that_tells_nothing_apart_is_refused(
    sources: Callable[[str], Path], tmp_path: Path, prompts: Path
) -> None:
    code, said = run(
        sources("schnell"), "--steps", "1", "--size", "32x64", "--reward", "tests.rewards.small:Constant",
        "--prompts", prompts, "--images", "8", "--out", tmp_path / "out",
    )  # fmt: skip
    assert code == 1 and "gave the same score for every picture" in said
    assert read_student(tmp_path / "out").scorers == {}


def test_a_video_model_that_steps_by_unipc_becomes_euler_steps_at_its_own_sigmas(tmp_path: Path) -> None:
    source, out = published(tmp_path / "wan", tiny.wan()), tmp_path / "out"
    code, said = run(source, "--size", "32x64", "--frames", "5", "--steps", "4,2", "--out", out)
    assert code == 0, said
    student, scheduler = read_student(out), DiffusionPipeline.from_pretrained(source).scheduler
    for steps in (4, 2):
        scheduler.set_timesteps(steps)
        assert student.sigmas[steps] == tuple(scheduler.sigmas[:-1].tolist())
        theirs = reproduce(open_pipeline(out), student, [PROMPTS[0]], [7], steps)
        np.testing.assert_allclose(load(out, "torch").draw([PROMPTS[0]], [7], steps), theirs, atol=1e-4)
    assert "Its UniPC steps are replaced by Euler steps at the same sigmas." in (out / "README.md").read_text()


@pytest.mark.parametrize("change", [{"prediction_type": "epsilon"}, {"use_flow_sigmas": False}])
def test_unipc_of_another_kind_is_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    source = published(tmp_path / "wan", tiny.wan())
    edit(source / "scheduler" / "scheduler_config.json", lambda config: config.update(change))
    code, said = run(source, "--size", "32x64", "--out", tmp_path / "out")
    assert code == 1 and "supported are FlowMatchEulerDiscreteScheduler, and UniPCMultistepScheduler with flow" in said
    assert not (tmp_path / "out").exists()


HUB = {
    "model_index.json": 500,
    "transformer/diffusion_pytorch_model-00001-of-00002.safetensors": 10 * 10**9,
    "transformer/diffusion_pytorch_model-00002-of-00002.safetensors": 10 * 10**9,
    "transformer/diffusion_pytorch_model.fp16.safetensors": 7 * 10**9,
    "vae/diffusion_pytorch_model.fp16.safetensors": 2 * 10**9,
    "vae/diffusion_pytorch_model.bf16.safetensors": 1 * 10**9,
    "vae/diffusion_pytorch_model.bin": 50 * 10**9,
    "flux1-dev.safetensors": 90 * 10**9,
}
INDEX = {"_class_name": "FluxPipeline", "transformer": ["diffusers", "T"], "vae": ["diffusers", "V"]}


@pytest.mark.parametrize(("free", "cached", "fits"), [(21, 0, True), (20, 0, False), (11, 10, True)])
def test_a_download_is_held_against_the_disk_before_it_begins(
    free: int, cached: int, fits: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The plain shards of the transformer and the bf16 autoencoder, which is what is downloaded: 21 GB."""
    listed = [SimpleNamespace(rfilename=name, size=size) for name, size in HUB.items()]
    hub = SimpleNamespace(model_info=lambda model, files_metadata: SimpleNamespace(siblings=listed))
    there = "transformer/diffusion_pytorch_model-00001-of-00002.safetensors"
    monkeypatch.setattr(source_module, "HfApi", lambda: hub)
    monkeypatch.setattr(
        source_module, "try_to_load_from_cache", lambda model, name: "x" if cached and name == there else None
    )
    monkeypatch.setattr(source_module.shutil, "disk_usage", lambda path: SimpleNamespace(free=free * 10**9))
    if fits:
        return source_module.check_download("owner/name", INDEX)
    with pytest.raises(ExportError, match=r"^owner/name is a download of 21.00 GB, and 20.00 GB are free in .*HF_HOME"):
        source_module.check_download("owner/name", INDEX)


def test_a_hub_that_is_away_stops_no_cached_model(monkeypatch: pytest.MonkeyPatch) -> None:
    def away(model: str, files_metadata: bool) -> Any:
        raise OSError("no network")

    monkeypatch.setattr(source_module, "HfApi", lambda: SimpleNamespace(model_info=away))
    source_module.check_download("owner/name", INDEX)


def test_memory_for_measuring_is_counted_before_anything_is_opened(
    sources: Callable[[str], Path], tmp_path: Path, prompts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """4 GB for PickScore, and 4 bytes for each number of the student where nothing is compiled."""
    out, free = tmp_path / "out", 4 * 10**9
    assert run(sources("schnell"), "--size", "32x64", "--out", out)[0] == 0
    numbers = sum(sum(p.numel() for p in getattr(schnell(), part).parameters()) for part in NETWORKS)
    assert measure.drawing_bytes(out) == 4 * numbers
    monkeypatch.setattr(measure, "free_bytes", lambda: free)
    arguments = (sources("schnell"), "--size", "32x64", "--prompts", prompts, "--images", "8", "--out", out)
    code, said = run(*arguments, "--reward", "pickscore")
    assert code == 1 and "measuring pickscore on" in said and "and 4.00 GB are free" in said
    assert read_student(out).scorers == {} and not (out / "scorers").exists()
    code, said = run(*arguments, "--reward", "tests.rewards.own:Redness")
    assert code == 0, said


def test_a_student_has_the_name_and_version_that_it_is_given(sources: Callable[[str], Path], tmp_path: Path) -> None:
    source, out = sources("schnell"), tmp_path / "students" / "fast" / "2"
    named = ("--size", "32x64", "--out", out, "--id", "fast", "--version", "2")
    assert run(source, *named)[0] == 0
    assert (read_student(out).id, read_student(out).version) == ("fast", "2")
    assert run(source, *named)[1].startswith(f"{out} already exists")
    assert "choose another --out" in run(source, *named[:-1], "3")[1]
    for option in ("--id", "--version"):
        code, said = run(source, "--out", tmp_path / "none", option, "../x")
        assert code == 1 and f"{option} is '../x': accepted are up to 64 characters" in said
    assert not (tmp_path / "none").exists()


def test_the_same_command_is_one_with_the_same_of_everything(sources: Callable[[str], Path], tmp_path: Path) -> None:
    """Whatever differs makes another student, but for where it lies and who listens."""
    asked = Adoption(find_model(str(sources("dev")), ""), (4,), tmp_path / "out", size=(32, 64))
    others = {
        "source": find_model(str(sources("turbo")), ""),
        "steps": (4, 2),
        "loras": (Lora.parse("some/lora:0.5"),),
        "size": (64, 64),
        "frames": 5,
        "guidance": 2.0,
        "id": "other",
        "version": "2",
    }
    same = {"out": tmp_path / "elsewhere", "say": print}
    assert {field.name for field in fields(Adoption)} == {*others, *same}
    for name, value in same.items():
        assert replace(asked, **{name: value}).identity() == asked.identity(), name
    for name, value in others.items():
        assert replace(asked, **{name: value}).identity() != asked.identity(), name


def test_rewards_that_do_not_fit_into_memory_are_refused_before_one_is_opened(
    sources: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measure, "free_bytes", lambda: 30 * measure.GB)
    monkeypatch.setattr(measure, "_open", lambda reward: pytest.fail(f"{reward} is opened"))
    (tmp_path / "prompts.txt").write_text("a heart\na ring\n")
    asked = ("--reward", "hpsv3,clip", "--prompts", tmp_path / "prompts.txt", "--out", tmp_path / "out")
    code, said = run(sources("schnell"), "--size", "32x64", *asked)
    assert code == 1 and "opening hpsv3, clip needs about 33.00 GB of memory, and 30.00 GB are free" in said
    assert not (tmp_path / "out").exists()


def test_the_second_experts_weights_are_held_to_its_config_too(tmp_path: Path) -> None:
    tiny.wan_14b().save_pretrained(tmp_path / "wan")
    edit(tmp_path / "wan" / "transformer_2" / "config.json", lambda config: config.update(num_layers=9))
    with pytest.raises(ExportError, match="transformer_2 has other weights than its config.json says"):
        adoption.check_shapes(find_model(str(tmp_path / "wan"), ""), open_pipeline(tmp_path / "wan"))

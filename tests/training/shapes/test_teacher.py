"""The teacher's loss, its data and its form on disk."""

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline, FluxPipeline
from torch import Tensor

from student.families.flux import Flux
from student.sampler import pack, unpack
from tests.training.shapes import small
from training import checkpoint
from training.optim import one_cycle
from training.shapes import autoencoder, pairs, prompts, teacher, vocabulary, world
from training.steplog import read_log

TOKENIZER = vocabulary.tokenizer()

CONFIG = teacher.TeacherConfig(width=32, single_blocks=1, batch=6, cached_batches=2)


def _vae() -> autoencoder.AutoencoderTiny:
    torch.manual_seed(1)
    return autoencoder.build(autoencoder.AutoencoderConfig(width=8, latent_channels=4))


def test_latents_are_those_that_the_pipeline_decodes() -> None:
    vae = _vae()
    vae.register_to_config(scaling_factor=2.0, shift_factor=0.25)
    images = world.render_NCHW(world.sample(2, 1))
    packed = teacher.encode(vae, images)
    with torch.no_grad():
        raw = vae.encode(images * 2 - 1).latents
    error = unpack(packed, 8, 8) / 2.0 + 0.25 - raw  # the training side encodes in bf16
    assert error.abs().max() < 0.05 * raw.std()


def test_batches_are_a_function_of_the_step_and_are_kept() -> None:
    first, second = (teacher.LatentSource(_vae(), CONFIG) for _ in range(2))
    latents, texts = first.batch(3)
    first.batch(0)
    again, texts_again = second.batch(3)
    assert torch.equal(latents, again) and texts == texts_again
    kept, other_texts = first.batch(5)  # 5 % 2 == 3 % 2: the same scenes, other words
    assert torch.equal(kept, latents) and other_texts != texts


def test_the_loss_of_a_model_that_knows_the_velocity_is_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    data = torch.randn(6, 16, 16, generator=torch.Generator().manual_seed(1))

    def knows(_: object, x: torch.Tensor, sigma: torch.Tensor, __: torch.Tensor) -> torch.Tensor:
        return (x - data) / sigma[:, None, None]

    monkeypatch.setattr(teacher, "velocity", knows)
    parts = teacher.Parts(*(torch.nn.Identity() for _ in range(3)))  # type: ignore[arg-type]
    assert teacher.loss(parts, data, torch.zeros(6, 16), CONFIG, 3).item() == pytest.approx(0, abs=1e-6)


def test_the_saved_teacher_is_a_flux_pipeline_that_draws(tmp_path: Path) -> None:
    small.write_models(tmp_path)
    pipe = DiffusionPipeline.from_pretrained(tmp_path / "shapes-teacher")
    assert isinstance(pipe, FluxPipeline)
    pipe.set_progress_bar_config(disable=True)
    images = pipe(
        ["a red heart", "what is this"],
        num_inference_steps=2,
        sigmas=[1.0, 0.5],
        height=64,
        width=64,
        max_sequence_length=vocabulary.MAX_TOKENS,
        output_type="np",
    ).images
    assert images.shape == (2, 64, 64, 3)


@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")  # fp32 norms under bf16, as wanted
@pytest.mark.parametrize("muon_lr", [0.0, 0.01])
def test_training_resumes_to_the_same_weights(muon_lr: float, tmp_path: Path) -> None:
    """With all of its optimizers."""
    config = teacher.TeacherConfig(
        width=32, single_blocks=1, batch=4, cached_batches=2, steps=8, save_every=3, muon_lr=muon_lr
    )
    for name in ("whole", "cut"):
        _vae().save_pretrained(tmp_path / name / "autoencoder")
    whole = teacher.train(config, tmp_path / "whole").modules().state_dict()
    teacher.train(config, tmp_path / "cut", until=5)  # the checkpoint is of step 3: 3 and 4 are done again
    cut = teacher.train(config, tmp_path / "cut").modules().state_dict()
    assert all(torch.equal(value, cut[name]) for name, value in whole.items())


def test_the_teachers_times_are_logit_normal_towards_noise_and_its_target_is_noise_minus_data(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[tuple[Tensor, Tensor]] = []

    def nothing(_: object, x: Tensor, sigma: Tensor, ids: Tensor) -> Tensor:
        asked.append((x, sigma))
        return torch.zeros_like(x)

    monkeypatch.setattr(teacher, "velocity", nothing)
    config = teacher.TeacherConfig(sigma_shift=0.75, seed=11)
    data = torch.randn(4000, 2, 3, generator=torch.Generator().manual_seed(1))
    parts: Any = None
    found = teacher.loss(parts, data, torch.zeros(4000, 1), config, 3)
    x, sigma_B = asked[0]
    noise = (x - (1 - sigma_B)[:, None, None] * data) / sigma_B[:, None, None]
    assert float(found) == pytest.approx(float((noise - data).square().mean()), rel=1e-3)
    assert noise.mean().abs() < 0.03 and float(noise.std()) == pytest.approx(1, abs=0.02)
    times = torch.logit(sigma_B)
    assert float(times.mean()) == pytest.approx(0.75, abs=0.06) and float(times.std()) == pytest.approx(1, abs=0.05)
    for step, seed in ((3, 11), (4, 11), (3, 12)):
        teacher.loss(parts, data, torch.zeros(4000, 1), teacher.TeacherConfig(sigma_shift=0.75, seed=seed), step)
    assert [torch.equal(x, other) for other, _ in asked[1:]] == [True, False, False]


def test_the_velocity_that_is_trained_is_that_of_the_pipeline(tmp_path: Path) -> None:
    vae = autoencoder.build(autoencoder.AutoencoderConfig(width=8, latent_channels=4))
    torch.manual_seed(5)
    parts = teacher.build(teacher.TeacherConfig(width=32, single_blocks=1), 4)
    parts.modules().eval()
    model = Flux(teacher.pipeline(parts, vae), max_tokens=vocabulary.MAX_TOKENS)
    texts = ["a red heart", "", "a blue star above a green ring on a mint background"]
    x = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(2))
    sigma_B = torch.tensor([1.0, 0.6, 0.1])
    with torch.no_grad():
        found = teacher.velocity(parts, pack(x), sigma_B, torch.tensor(vocabulary.encode(TOKENIZER, texts)))
        torch.testing.assert_close(found, pack(model.velocity(x, sigma_B, model.encode(texts))), atol=1e-5, rtol=1e-4)
    assert found.std() > 1e-3


def test_muon_has_the_matrices_inside_of_blocks_and_adam_the_rest() -> None:
    parts = teacher.build(teacher.TeacherConfig(width=32, single_blocks=1), 4)
    every = {id(value): name for name, value in parts.modules().named_parameters()}
    [(adam, rate)] = teacher.optimizers(parts, teacher.TeacherConfig(lr=3e-3))
    assert rate == 3e-3 and {id(p) for p in adam.param_groups[0]["params"]} == set(every)
    shown = {name: adam.param_groups[0][name] for name in ("lr", "betas", "weight_decay")}
    assert shown == {"lr": 3e-3, "betas": (0.9, 0.98), "weight_decay": 0.01}
    (muon, muon_rate), (adam, rate) = teacher.optimizers(parts, teacher.TeacherConfig(lr=3e-3, muon_lr=0.02))
    assert isinstance(muon, torch.optim.Muon) and (muon_rate, rate) == (0.02, 3e-3)
    inner, rest = ({every[id(p)] for p in one.param_groups[0]["params"]} for one in (muon, adam))
    assert inner | rest == set(every.values()) and not inner & rest
    assert {"transformer.transformer_blocks.0.attn.to_q.weight"} <= inner
    assert all("transformer_blocks" in name and name.endswith("weight") and "norm" not in name for name in inner)
    assert not [name for name in rest if "transformer_blocks" in name and "norm" not in name and name[-6:] == "weight"]
    assert teacher.num_parameters(torch.nn.Linear(3, 2)) == 8


def test_a_teachers_batch_is_of_its_share_of_singles_where_they_lie_and_some_captions_are_empty() -> None:
    vae = autoencoder.build(autoencoder.AutoencoderConfig(width=8, latent_channels=4))

    def source(**changes: Any) -> tuple[Tensor, list[str]]:
        config = teacher.TeacherConfig(**{"batch": 40, "cached_batches": 2, "seed": 9, **changes})
        return teacher.LatentSource(vae, config).batch(5)

    latents, texts = source(singles=0.25, spread=0.3, caption_dropout=0.0)
    scenes = prompts.training_scenes(40, 9, 1, singles=0.25, spread=0.3)  # 5 is the second visit of the second chunk
    assert torch.equal(latents, teacher.encode(vae, world.render_NCHW(scenes)).half().float())
    assert texts == pairs.captions(scenes, prompts.training_styles(scenes, world.rng(9, 5, 2)))
    assert "" not in texts and set(source(caption_dropout=1.0)[1]) == {""}
    shares = [source(batch=400, caption_dropout=share)[1].count("") / 400 for share in (0.1, 0.5)]
    assert shares == pytest.approx([0.1, 0.5], abs=0.06)


@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")  # fp32 norms under bf16, as wanted
def test_what_is_kept_of_the_teacher_is_its_average_and_its_rate_is_one_cycle(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rates: list[float] = []
    real = teacher.set_lr
    monkeypatch.setattr(teacher, "set_lr", lambda optimizer, lr: (rates.append(lr), real(optimizer, lr)))
    autoencoder.build(autoencoder.AutoencoderConfig(width=8, latent_channels=4)).save_pretrained(
        tmp_path / "autoencoder"
    )
    config = teacher.TeacherConfig(width=32, single_blocks=1, batch=2, cached_batches=1, steps=6, save_every=3, lr=2e-2)
    parts = teacher.train(config, tmp_path)
    assert rates == pytest.approx([one_cycle(step, 6, 2e-2) for step in range(6)])
    saved = checkpoint.load(tmp_path / "teacher.pt")
    assert saved is not None and saved["step"] == 6 and len(saved["optimizers"]) == 1
    shadow, last = saved["average"]["shadow_params"], list(saved["modules"].values())
    kept = list(parts.modules().parameters())
    assert all(torch.equal(a, b) for a, b in zip(kept, shadow, strict=True))
    assert any(not torch.equal(a, b) for a, b in zip(kept, last, strict=False))
    rows = read_log(tmp_path / "teacher.jsonl")
    assert [row["step"] for row in rows] == [0] and rows[0]["loss"] > 0 and rows[0]["grad_norm"] > 0


@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")  # fp32 norms under bf16, as wanted
def test_each_optimizer_of_a_teacher_has_a_rate_of_its_own_and_makes_each_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rates: list[tuple[str, float]] = []
    real = teacher.set_lr
    monkeypatch.setattr(
        teacher, "set_lr", lambda optimizer, lr: (rates.append((type(optimizer).__name__, lr)), real(optimizer, lr))
    )
    _vae().save_pretrained(tmp_path / "autoencoder")
    config = teacher.TeacherConfig(
        width=32, single_blocks=1, batch=2, cached_batches=1, steps=3, save_every=3, lr=2e-2, muon_lr=5e-3
    )
    torch.manual_seed(config.seed)
    before = dict(teacher.build(config, 4).modules().named_parameters())
    teacher.train(config, tmp_path)
    assert rates == [
        (name, pytest.approx(one_cycle(step, 3, peak)))
        for step in range(3)
        for name, peak in (("Muon", 5e-3), ("AdamW", 2e-2))
    ]
    saved = checkpoint.load(tmp_path / "teacher.pt")
    assert saved is not None and len(saved["optimizers"]) == 2
    for name in ("transformer.transformer_blocks.0.attn.to_q.weight", "transformer.proj_out.weight"):
        assert not torch.equal(saved["modules"][name], before[name]), name

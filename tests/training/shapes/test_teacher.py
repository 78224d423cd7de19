"""The teacher's loss, its data and its form on disk."""

from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline, FluxPipeline

from student.sampler import unpack
from tests.training.shapes import small
from training.shapes import autoencoder, teacher, vocabulary, world

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
def test_training_resumes_to_the_same_weights(tmp_path: Path) -> None:
    config = teacher.TeacherConfig(width=32, single_blocks=1, batch=4, cached_batches=2, steps=8, save_every=3)
    for name in ("whole", "cut"):
        _vae().save_pretrained(tmp_path / name / "autoencoder")
    whole = teacher.train(config, tmp_path / "whole").modules().state_dict()
    teacher.train(config, tmp_path / "cut", until=5)  # the checkpoint is of step 3: 3 and 4 are done again
    cut = teacher.train(config, tmp_path / "cut").modules().state_dict()
    assert all(torch.equal(value, cut[name]) for name, value in whole.items())

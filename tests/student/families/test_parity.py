"""Our loop, with each family's velocity and sigmas, against the diffusers pipeline's own output."""

from __future__ import annotations

import secrets
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu
from diffusers.pipelines.qwenimage.pipeline_qwenimage import calculate_shift
from torch import Tensor

from student.bundle import ImageSize
from student.families.family import Family
from student.families.find import family_of
from student.families.flux import Flux
from student.families.two_experts import joined
from student.noise import noise
from student.pipeline import reproduce, shift_no_more, steps_at
from student.sampler import denoise, pack, unpack
from student.schedule import sigmas
from tests.student.families import tiny
from training.sampler import velocity_of

TOLERANCE = 1e-4
STEPS = (3, 5, 8, 50)
SEEDS = [7, 8, 9]
HEIGHT_PX, WIDTH_PX = 64, 32  # not square, so that swapped sides show


def ours(family: Family, nfe: int, guidance: float = 1.0, frames: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """Start noise, latents at the end, and what is drawn of them."""
    shape = family.latent_shape(HEIGHT_PX, WIDTH_PX, frames)
    start = torch.from_numpy(noise(SEEDS, shape))
    condition, empty = family.encode(tiny.PROMPTS), family.encode([""] * len(SEEDS))
    field = velocity_of(family, condition, empty, guidance)  # type: ignore[arg-type]
    with torch.no_grad():
        end = denoise(field, start, family.sigmas(nfe, shape))
        return start, end, family.decode(end)


def theirs(pipe: Any, family: Family, nfe: int, start: Tensor, **arguments: Any) -> tuple[Tensor, Tensor]:
    """Latents and pictures of the image pipeline with the same sigmas and the same noise, both from its own loop."""
    shift_no_more(pipe)
    call = {
        "num_inference_steps": nfe,
        "sigmas": list(family.sigmas(nfe, start.shape[1:])),
        "height": HEIGHT_PX,
        "width": WIDTH_PX,
        "max_sequence_length": tiny.MAX_TOKENS,
        **arguments,
    }
    latents = pipe(prompt=list(tiny.PROMPTS), output_type="latent", **call).images
    assert [float(s) for s in pipe.scheduler.sigmas[:-1]] == pytest.approx(family.sigmas(nfe, start.shape[1:]))
    return latents, pipe(prompt=list(tiny.PROMPTS), output_type="pt", **call).images  # ZImagePipeline changes its list


def close(a: Tensor, b: Tensor) -> None:
    assert a.shape == b.shape
    assert (a - b).abs().max() <= TOLERANCE
    assert b.std() > 0.05  # nothing is compared with nothing


@pytest.mark.parametrize("name", sorted(tiny.MAKERS))
def test_weights_of_a_fresh_seed(name: str) -> None:
    seed, frames = secrets.randbelow(2**31), 5 if name.startswith("wan") else 1
    print(f"{name} of seed {seed}")  # shown if this fails
    pipe = tiny.MAKERS[name](seed=seed)
    family = family_of(pipe, max_tokens=tiny.MAX_TOKENS)
    _, _, drawn = ours(family, 3, frames=frames)
    size = ImageSize(HEIGHT_PX, WIDTH_PX, frames if frames > 1 else None)
    student = tiny.manifest(family, (3,), family.geometry(HEIGHT_PX, WIDTH_PX, frames), size)
    shift_no_more(pipe)
    close(drawn, torch.from_numpy(reproduce(pipe, student, tiny.PROMPTS, SEEDS, 3)))


@pytest.mark.parametrize("nfe, guidance", [(nfe, guidance) for nfe in STEPS for guidance in (None, 3.5)] + [(3, 1.5)])
def test_flux(nfe: int, guidance: float | None) -> None:
    pipe = tiny.flux(guidance_embeds=guidance is not None)
    family = family_of(pipe, max_tokens=tiny.MAX_TOKENS, guidance=guidance)
    start, end, images = ours(family, nfe)
    arguments = {} if guidance is None else {"guidance_scale": guidance}
    latents, pictures = theirs(pipe, family, nfe, start, latents=pack(start), **arguments)
    close(end, unpack(latents, *start.shape[-2:]))
    close(images, pictures)


@pytest.mark.parametrize("nfe", STEPS)
@pytest.mark.parametrize("guidance, with_t5", [(1.0, True), (4.5, True), (4.5, False)])
def test_sd3(nfe: int, guidance: float, with_t5: bool) -> None:
    pipe = tiny.sd3(with_t5=with_t5, dual=with_t5)
    family = family_of(pipe, max_tokens=tiny.MAX_TOKENS)
    start, end, images = ours(family, nfe, guidance)
    latents, pictures = theirs(pipe, family, nfe, start, latents=start, guidance_scale=guidance)
    close(end, latents)
    close(images, pictures)


@pytest.mark.parametrize("nfe", STEPS)
@pytest.mark.parametrize("guidance", [1.0, 5.0])
@pytest.mark.parametrize("make", [tiny.wan, tiny.wan_5b, tiny.wan_14b])
def test_wan(make: Callable[[], Any], nfe: int, guidance: float) -> None:
    pipe, frames = make(), 5
    family = family_of(pipe, max_tokens=tiny.MAX_TOKENS)
    start, end, video = ours(family, nfe, guidance, frames)
    call = {
        "prompt": list(tiny.PROMPTS),
        "num_inference_steps": nfe,
        "height": HEIGHT_PX,
        "width": WIDTH_PX,
        "num_frames": frames,
        "max_sequence_length": tiny.MAX_TOKENS,
        "guidance_scale": guidance,
        "latents": start,
    }
    with steps_at(pipe, family.sigmas(nfe, start.shape[1:])):
        theirs = pipe(output_type="latent", **call).frames
        close(end, theirs)
        close(video, pipe(output_type="pt", **call).frames)
        second = {"guidance_scale_2": 3.0} if family.boundary is not None and guidance != 1.0 else {}
        theirs = pipe(output_type="latent", **call, **second).frames
    if family.boundary is not None:
        joined(family).guidance_2 = second.get("guidance_scale_2", 0.0)
        close(ours(family, nfe, guidance, frames)[1], theirs)
    assert video.shape == (3, frames, 3, HEIGHT_PX, WIDTH_PX)


@pytest.mark.parametrize("nfe", STEPS)
@pytest.mark.parametrize("guidance", [1.0, 4.0])
@pytest.mark.parametrize("distilled", [True, False])
def test_flux2(nfe: int, guidance: float, distilled: bool) -> None:
    """The distilled one is never guided, whatever is asked."""
    pipe = tiny.flux2(is_distilled=distilled)
    family = family_of(pipe, max_tokens=tiny.MAX_TOKENS)
    start, end, images = ours(family, nfe, 1.0 if distilled else guidance)
    latents, pictures = theirs(pipe, family, nfe, start, latents=start, guidance_scale=guidance)
    std = torch.sqrt(pipe.vae.bn.running_var + pipe.vae.config.batch_norm_eps).view(1, -1, 1, 1)
    close(torch.pixel_shuffle(end * std + pipe.vae.bn.running_mean.view(1, -1, 1, 1), 2), latents)
    close(images, pictures)


@pytest.mark.parametrize("nfe", STEPS)
@pytest.mark.parametrize("guidance", [1.0, 4.0])
@pytest.mark.parametrize("max_tokens", [tiny.MAX_TOKENS, 100])
def test_z_image(nfe: int, guidance: float, max_tokens: int) -> None:
    """Prompts of 100 tokens, 35 and 22 are filled up to 128, 64 and 32 there; ours are all 128 long."""
    pipe = tiny.z_image()
    family = family_of(pipe, max_tokens=max_tokens)
    start, end, images = ours(family, nfe, guidance)
    arguments = {"guidance_scale": guidance - 1, "max_sequence_length": max_tokens}
    latents, pictures = theirs(pipe, family, nfe, start, latents=start, **arguments)
    close(end, latents)
    close(images, pictures)


@pytest.mark.parametrize("nfe", STEPS)
@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_qwen_image(nfe: int, guidance: float) -> None:
    pipe = tiny.qwen_image()
    family = family_of(pipe, max_tokens=tiny.MAX_TOKENS)
    start, end, images = ours(family, nfe, guidance)
    arguments = {"true_cfg_scale": guidance, **({"negative_prompt": [""] * len(SEEDS)} if guidance > 1 else {})}
    latents, pictures = theirs(pipe, family, nfe, start, latents=pack(start), **arguments)
    close(end, unpack(latents, *start.shape[-2:]))
    close(images, pictures)


def test_true_guidance_of_flux() -> None:
    """FluxPipeline's ``true_cfg_scale`` is the guidance of training."""
    pipe = tiny.flux()
    family = family_of(pipe, max_tokens=tiny.MAX_TOKENS)
    start, end, images = ours(family, 4, guidance=2.5)
    arguments = {"true_cfg_scale": 2.5, "negative_prompt": [""] * len(SEEDS)}
    latents, pictures = theirs(pipe, family, 4, start, latents=pack(start), **arguments)
    close(end, unpack(latents, *start.shape[-2:]))
    close(images, pictures)


def test_a_dev_pipeline_is_guided_by_default_as_diffusers_guides_it() -> None:
    assert Flux(tiny.flux(guidance_embeds=True)).guidance == 3.5
    assert Flux(tiny.flux(guidance_embeds=False), guidance=2.0).guidance is None
    unguided = Flux(tiny.flux(guidance_embeds=True), guidance=0.0)
    assert unguided.guidance == 0.0 and unguided.baked == {"guidance_scale": 0.0}, "0 is a guidance too"


SIZES = {"sd3": (64, 64), "z_image": (256, 256)}  # where positions end


@pytest.mark.parametrize("name", tiny.MAKERS)
def test_the_published_scheduler_shifts_even_steps_to_our_sigmas(name: str) -> None:
    """Even sigmas through the pipeline's own scheduler (which shifts once then) are those of the family."""
    pipe = tiny.MAKERS[name]()
    family = family_of(pipe)
    shape = family.latent_shape(*SIZES.get(name, (512, 512)), 5 if family.name == "wan" else 1)
    scheduler = pipe.scheduler
    mu = {
        "flux": calculate_shift(32 * 32),  # 0.63
        "flux2": compute_empirical_mu(32 * 32, 8),
        "qwen_image": calculate_shift(32 * 32, max_seq_len=8192, max_shift=0.9),
    }
    if name in mu:
        scheduler.set_timesteps(sigmas=list(sigmas(8)), mu=mu[name])
    else:
        scheduler.set_timesteps(sigmas=np.array(sigmas(8)), num_inference_steps=8)
    assert family.sigmas(8, shape) == pytest.approx(
        scheduler.sigmas[:-1].tolist(), abs=2e-6
    )  # UniPC starts at 1 - 1e-6


@pytest.mark.parametrize("name", tiny.MAKERS)
def test_a_sigma_for_each_picture_is_the_same_as_one_for_all(name: str) -> None:
    family = family_of(tiny.MAKERS[name](), max_tokens=tiny.MAX_TOKENS)
    x = torch.from_numpy(noise(SEEDS, family.latent_shape(HEIGHT_PX, WIDTH_PX)))
    condition = family.encode(tiny.PROMPTS)
    sigma_B = torch.tensor([1.0, 0.7, 0.2])
    together = family.velocity(x, sigma_B, condition)
    for b, sigma in enumerate(sigma_B.tolist()):
        alone = family.velocity(x[b : b + 1], sigma, condition.take(b))
        torch.testing.assert_close(together[b : b + 1], alone, atol=1e-5, rtol=0)
    assert (family.velocity(x, 0.5, condition) - family.velocity(x, 0.6, condition)).abs().max() > 1e-3

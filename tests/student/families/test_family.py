"""What every family promises beside parity: conditions, shapes, opening, saving, and the types in between."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from torch import Tensor
from torch.nn.functional import pad

from student.bundle import BundleError, ImageSize, Student, read_student
from student.families.family import Condition, Family, SizeError
from student.families.find import FAMILIES, family_of, open_family
from student.families.two_experts import networks, transformer_of
from student.files import hash_files, write_student
from student.noise import noise
from student.pipeline import open_pipeline, reproduce, save_pipeline, shift_no_more
from student.runtimes.sizes import SizeRange
from student.sampler import denoise
from tests.student.families import tiny


@pytest.fixture(params=list(tiny.MAKERS))
def pipe(request: pytest.FixtureRequest) -> Any:
    return tiny.MAKERS[request.param]()


def draw(family: Family, nfe: int = 3) -> Tensor:
    x = torch.from_numpy(noise([1, 2], family.latent_shape(32, 64)))
    condition = family.encode(tiny.PROMPTS[:2])
    with torch.no_grad():
        return family.decode(
            denoise(lambda x, sigma: family.velocity(x, sigma, condition), x, family.sigmas(nfe, x.shape))
        )


def theirs(pipe: Any) -> Condition:
    """The condition as the pipeline itself makes it."""
    prompts, length = list(tiny.PROMPTS), tiny.MAX_TOKENS
    if type(pipe).__name__ == "Flux2KleinPipeline":
        return Condition(pipe.encode_prompt(prompts, max_sequence_length=length)[0])
    if type(pipe).__name__ == "ZImagePipeline":
        rows, _ = pipe.encode_prompt(prompts, do_classifier_free_guidance=False, max_sequence_length=length)
        return Condition(torch.stack([pad(row, (0, 0, 0, length - len(row))) for row in rows]))
    if type(pipe).__name__ == "QwenImagePipeline":
        tokens, mask = pipe.encode_prompt(prompts, max_sequence_length=length)
        assert torch.equal(mask.bool(), Condition(tokens).mask_BL)
        return Condition(tokens)
    if type(pipe).__name__ == "FluxPipeline":
        tokens, pooled, _ = pipe.encode_prompt(prompts, None, max_sequence_length=length)
        return Condition(tokens, pooled)
    if type(pipe).__name__ == "WanPipeline":
        return Condition(pipe.encode_prompt(prompts, max_sequence_length=length)[0])
    tokens, _, pooled, _ = pipe.encode_prompt(prompts, None, None, max_sequence_length=length)
    return Condition(tokens, pooled)


def same(a: Condition, b: Condition) -> None:
    torch.testing.assert_close(a.tokens_BLE, b.tokens_BLE, atol=1e-6, rtol=1e-5)
    assert (a.pooled_BP is None) == (b.pooled_BP is None)
    if a.pooled_BP is not None and b.pooled_BP is not None:
        assert torch.equal(a.pooled_BP, b.pooled_BP)


def test_the_condition_is_the_pipelines_own_and_needs_no_gradient(pipe: Any) -> None:
    pipe.transformer.requires_grad_(True)
    condition = family_of(pipe, max_tokens=tiny.MAX_TOKENS).encode(tiny.PROMPTS)
    same(condition, theirs(pipe))
    assert not condition.tokens_BLE.requires_grad
    assert len(condition) == len(tiny.PROMPTS)


def test_conditions_are_kept_by_prompt_and_stacked_again(pipe: Any) -> None:
    condition = family_of(pipe, max_tokens=tiny.MAX_TOKENS).encode(tiny.PROMPTS)
    kept = [condition.take(i) for i in range(len(tiny.PROMPTS))]
    assert [len(row) for row in kept] == [1, 1, 1]
    same(Condition.stack(kept), condition)
    same(Condition.stack([kept[2], kept[0]]), condition.take([2, 0]))
    narrow = condition.to("cpu", torch.bfloat16)
    assert narrow.tokens_BLE.dtype == torch.bfloat16 and condition.tokens_BLE.dtype == torch.float32


def test_dropped_encoders_are_gone_and_the_rest_still_draws(pipe: Any) -> None:
    family = family_of(pipe, max_tokens=tiny.MAX_TOKENS)
    condition = family.encode(["star"])
    before = sum(weight.numel() for weight in family.parameters())
    family.drop_encoders()
    experts = [part for part in (family.transformer, getattr(family, "transformer_2", None)) if part is not None]
    rest = sum(weight.numel() for part in (*experts, family.vae) for weight in part.parameters())
    assert sum(weight.numel() for weight in family.parameters()) == rest < before
    with pytest.raises(RuntimeError, match="the text encoders were dropped"):
        family.encode(["star"])
    x = torch.from_numpy(noise([1], family.latent_shape(32, 32)))
    assert family.velocity(x, 1.0, condition).shape == x.shape


@pytest.mark.parametrize(
    "make, size, shape",
    [
        (tiny.flux, (64, 32), (4, 8, 4)),
        (tiny.sd3, (128, 16), (4, 16, 2)),
        (tiny.wan, (64, 32, 9), (4, 3, 8, 4)),
        (tiny.wan, (16, 16), (4, 1, 2, 2)),
        (tiny.wan_5b, (64, 32, 9), (4, 3, 4, 2)),
        (tiny.flux2, (64, 32), (16, 4, 2)),
        (tiny.z_image, (256, 16), (4, 32, 2)),
        (tiny.qwen_image, (64, 32), (4, 8, 4)),
    ],
)
def test_latent_shapes(make: Callable[[], Any], size: tuple[int, ...], shape: tuple[int, ...]) -> None:
    assert family_of(make()).latent_shape(*size) == shape


EVERY = (tiny.flux, tiny.sd3, tiny.wan, tiny.wan_5b, tiny.flux2, tiny.z_image, tiny.qwen_image)


@pytest.mark.parametrize("make", EVERY)
def test_the_range_of_sizes_is_what_is_drawn(make: Callable[[], Any]) -> None:
    family = family_of(make())
    step, most = family.sides_px
    found, end = SizeRange(step, most), (most or 4 * step)
    for size in ((step, step), (end, step), (step, step + 1), (0, step), (end + step, step)):
        try:
            family.latent_shape(*size)
        except SizeError:
            assert size not in found, size
        else:
            assert size in found, size


@pytest.mark.parametrize(
    "make, size, complaint",
    [
        (tiny.flux, (64, 24), "width is 24: accepted are multiples of 16"),
        (tiny.flux, (0, 16), "height is 0: accepted are multiples of 16"),
        (tiny.flux, (64, 64, 5), "frames is 5: this family generates single images, accepted is 1"),
        (tiny.sd3, (144, 64), "height is 144: accepted are multiples of 16 up to 128"),
        (tiny.sd3, (64, -16), "width is -16: accepted are multiples of 16 up to 128"),
        (tiny.wan, (24, 64, 5), "height is 24: accepted are multiples of 16"),
        (tiny.wan, (64, 64, 4), "frames is 4: accepted is 1 plus a multiple of 4"),
        (tiny.wan, (64, 64, 0), "frames is 0: accepted is 1 plus a multiple of 4"),
        (tiny.wan_5b, (64, 48, 5), "width is 48: accepted are multiples of 32"),
        (tiny.flux2, (64, 24), "width is 24: accepted are multiples of 16"),
        (tiny.z_image, (272, 64), "height is 272: accepted are multiples of 16 up to 256"),
        (tiny.qwen_image, (64, 64, 5), "frames is 5: this family generates single images, accepted is 1"),
    ],
)
def test_bad_sizes_are_refused(make: Callable[[], Any], size: tuple[int, ...], complaint: str) -> None:
    with pytest.raises(ValueError, match=f"^{complaint}$"):
        family_of(make()).latent_shape(*size)


def test_the_gradient_reaches_transformer_and_noise_through_the_decoder(pipe: Any) -> None:
    family = family_of(pipe, max_tokens=tiny.MAX_TOKENS)
    family.transformer.requires_grad_(True)
    x = torch.from_numpy(noise([1], family.latent_shape(32, 32))).requires_grad_()
    condition = family.encode(["star"])
    family.decode(denoise(lambda x, s: family.velocity(x, s, condition), x, (1.0, 0.5))).square().mean().backward()
    gradients = [weight.grad for weight in family.transformer.parameters() if weight.grad is not None]
    assert len(gradients) > 10 and all(gradient.isfinite().all() for gradient in gradients)
    assert x.grad is not None and x.grad.abs().max() > 0


def test_in_bfloat16_the_path_stays_in_float32(pipe: Any) -> None:
    wide = family_of(pipe, max_tokens=tiny.MAX_TOKENS)
    narrow = copy.deepcopy(wide)
    for expert in (narrow.transformer, getattr(narrow, "transformer_2", None)):
        if expert is not None:
            expert.to(torch.bfloat16)
    x = torch.from_numpy(noise([1, 2], wide.latent_shape(32, 32)))
    condition = wide.encode(["star", "ring"])
    v, rounded = wide.velocity(x, 0.7, condition), narrow.velocity(x, 0.7, condition)
    assert rounded.dtype == torch.float32
    assert 0 < (v - rounded).norm() / v.norm() < 0.08  # Qwen-Image reads its time in bfloat16: 0.06


def test_a_copy_is_whole(pipe: Any) -> None:
    family = family_of(pipe, max_tokens=tiny.MAX_TOKENS)
    twin = copy.deepcopy(family)
    assert twin.transformer is not family.transformer
    assert torch.equal(draw(twin), draw(family))


def test_a_saved_student_opens_everywhere_and_draws_the_same(pipe: Any, tmp_path: Path) -> None:
    sigmas = family_of(pipe).sigmas(3, (4, 4, 6))
    shift_no_more(pipe)
    save_pipeline(pipe, tmp_path)
    family = open_family(tmp_path, local_files_only=True, max_tokens=tiny.MAX_TOKENS)
    assert type(family).name == family_of(pipe).name
    assert torch.equal(draw(family), draw(family_of(pipe, max_tokens=tiny.MAX_TOKENS)))
    theirs = DiffusionPipeline.from_pretrained(tmp_path)
    assert type(theirs) is type(pipe) and isinstance(theirs.scheduler, FlowMatchEulerDiscreteScheduler)
    theirs.scheduler.set_timesteps(sigmas=list(sigmas))
    assert theirs.scheduler.sigmas[:-1].tolist() == pytest.approx(sigmas)
    assert str(tmp_path) not in (tmp_path / "model_index.json").read_text("utf-8")
    assert any(name.startswith("transformer/") for name in hash_files(tmp_path))


def test_its_manifest_tells_diffusers_how_to_draw_the_same(pipe: Any, tmp_path: Path) -> None:
    family = family_of(pipe, max_tokens=tiny.MAX_TOKENS)
    frames = 5 if family.name == "wan" else 1
    latents = family.geometry(32, 64, frames)
    assert latents.shape == family.latent_shape(32, 64, frames)
    student = Student(
        id="tiny",
        version="1",
        family=family.name,
        steps=(3,),
        sigmas={3: family.sigmas(3, latents.shape)},
        latents=latents,
        image=ImageSize(32, 64, frames if family.name == "wan" else None),
        max_tokens=tiny.MAX_TOKENS,
        baked=family.baked,
        teacher="tiny",
        scorers={},
    )
    shift_no_more(pipe)
    save_pipeline(pipe, tmp_path)
    write_student(tmp_path, student)
    student = read_student(tmp_path)
    assert student.latents == latents
    prompts, seeds = list(tiny.PROMPTS), [4, 5, 6]
    theirs = reproduce(open_pipeline(tmp_path), student, prompts, seeds, 3)
    condition, x = family.encode(prompts), torch.from_numpy(noise(seeds, latents.shape))
    with torch.no_grad():
        end = denoise(lambda x, sigma: family.velocity(x, sigma, condition), x, student.sigmas[3])
    np.testing.assert_allclose(theirs, family.decode(end).numpy(), atol=1e-4)


def test_saving_rounds_what_is_saved_and_nothing_else(tmp_path: Path) -> None:
    """Wan's position table is no weight: rounded in passing, it would differ from the one that is made on opening."""
    pipe = tiny.wan()
    table = pipe.transformer.rope.freqs_cos.clone()
    save_pipeline(pipe, tmp_path)
    assert torch.equal(pipe.transformer.rope.freqs_cos, table)
    assert all(weight.dtype == torch.float32 for weight in pipe.transformer.parameters())
    again = open_pipeline(tmp_path)
    for name, value in pipe.transformer.state_dict().items():
        assert torch.equal(again.transformer.state_dict()[name], value), name


def test_a_student_may_be_saved_in_bfloat16(tmp_path: Path) -> None:
    pipe = tiny.sd3()
    with torch.no_grad():
        pipe.transformer.proj_out.bias.fill_(1e6)  # more than float16 holds
    save_pipeline(pipe, tmp_path, torch.bfloat16)
    again = open_pipeline(tmp_path, torch.bfloat16)
    assert again.transformer.dtype == again.text_encoder_3.dtype == torch.bfloat16
    assert again.transformer.proj_out.bias[0].item() == pytest.approx(1e6, rel=0.01)


def test_sd3_without_t5_is_saved_and_opened(tmp_path: Path) -> None:
    pipe = tiny.sd3(with_t5=False)
    save_pipeline(pipe, tmp_path)
    family = open_family(tmp_path, local_files_only=True, max_tokens=tiny.MAX_TOKENS)
    same(family.encode(tiny.PROMPTS), theirs(pipe))


def test_t5_may_be_left_out_on_opening(tmp_path: Path) -> None:
    save_pipeline(tiny.sd3(), tmp_path)
    without = {"text_encoder_3": None, "tokenizer_3": None}
    family = open_family(tmp_path, local_files_only=True, parts=without, max_tokens=tiny.MAX_TOKENS)
    tokens_BLE = family.encode(["star"]).tokens_BLE
    assert tokens_BLE[:, : tiny.CLIP_TOKENS].abs().max() > 0
    assert tokens_BLE[:, tiny.CLIP_TOKENS :].abs().max() == 0


@pytest.mark.parametrize("name", ["flux", "wan", "wan_14b"])
def test_the_trained_transformer_takes_the_place_of_the_saved_one(name: str, tmp_path: Path) -> None:
    save_pipeline(tiny.MAKERS[name](), tmp_path)
    trained = networks(transformer_of(tiny.MAKERS[name](seed=1)))
    opened = open_pipeline(tmp_path, **trained)
    assert all(getattr(opened, part) is transformer for part, transformer in trained.items())


def test_wan_decodes_in_float32_whatever_is_asked(tmp_path: Path) -> None:
    save_pipeline(tiny.wan(), tmp_path)
    family = open_family(tmp_path, torch.bfloat16, local_files_only=True, max_tokens=tiny.MAX_TOKENS)
    assert family.transformer.dtype == family.text_encoder.dtype == torch.bfloat16
    assert family.vae.dtype == torch.float32
    assert draw(family).dtype == torch.float32


def test_what_cannot_be_opened_is_said_in_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="is not a diffusers pipeline: it has no model_index.json$"):
        open_family(tmp_path)
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusionXLPipeline"}))
    supported = ", ".join(FAMILIES)
    assert "Flux2KleinPipeline" in supported and "ZImagePipeline" in supported
    with pytest.raises(BundleError, match=f"is a StableDiffusionXLPipeline: supported are {supported}$"):
        open_family(tmp_path)
    with pytest.raises(BundleError, match="^nobody/nothing cannot be opened as a folder or as a hub id: [^\n]*$"):
        open_family("nobody/nothing", local_files_only=True)


def test_a_schedule_that_cannot_be_followed_is_refused_at_once() -> None:
    pipe = tiny.flux(scheduler=FlowMatchEulerDiscreteScheduler(stochastic_sampling=True))
    with pytest.raises(BundleError, match="the scheduler's stochastic_sampling is True: accepted are steps without"):
        family_of(pipe)


def test_wan_with_half_of_its_experts_is_refused() -> None:
    for missing in ("transformer", "transformer_2"):
        pipe = tiny.wan_14b()
        setattr(pipe, missing, None)
        with pytest.raises(BundleError, match=f"this Wan pipeline has no {missing}: accepted are"):
            family_of(pipe)


def test_each_expert_of_wan_draws_its_part_of_the_path() -> None:
    pipe = tiny.wan_14b()
    family = family_of(pipe, max_tokens=tiny.MAX_TOKENS)
    x = torch.from_numpy(noise([1, 2, 3], family.latent_shape(32, 32)))
    condition = family.encode(tiny.PROMPTS)
    sigma_B = torch.tensor([0.9, 0.875, 0.874])
    both = family.velocity(x, sigma_B, condition)
    pipe.transformer_2 = family.transformer_2 = family.transformer
    high = family.velocity(x, sigma_B, condition)
    torch.testing.assert_close(both[:2], high[:2])
    assert (both[2] - high[2]).abs().max() > 1e-2


@pytest.mark.parametrize("name, make", [("flux2", tiny.flux2), ("z_image", tiny.z_image)])
def test_another_chat_than_the_published_one_is_refused(name: str, make: Callable[[], Any]) -> None:
    pipe = make()
    pipe.tokenizer.chat_template = pipe.tokenizer.chat_template.replace("assistant", "painter")
    with pytest.raises(BundleError, match="the tokenizer's chat template gives .*painter.*: accepted is .*assistant"):
        family_of(pipe)


def test_padding_stands_on_the_right_whatever_the_tokenizer_says() -> None:
    """Nothing reads it; what is compiled needs a prompt's tokens at the beginning."""
    left, right = (family_of(tiny.z_image(side), max_tokens=tiny.MAX_TOKENS) for side in ("left", "right"))
    same(left.encode(tiny.PROMPTS), right.encode(tiny.PROMPTS))

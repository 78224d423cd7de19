"""A decoder whose blocks or tiles are computed again gives the same pictures and gradients, and keeps less for them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models.autoencoders.vae import Decoder
from torch import Tensor

from student.families.find import family_of
from tests.student.families import tiny
from tests.training.rats.test_families import run, settings
from training.config import ConfigError, with_settings
from training.decoder import decode_tiles, recompute_blocks
from training.rats.config import RatsConfig
from training.rats.method import decoded_window


def gradient(model: object, x: Tensor) -> tuple[Tensor, Tensor, int]:
    """Pictures, the gradient on the latents, and the bytes that are kept between the two."""
    kept: dict[int, int] = {}

    def keep(value: Tensor) -> Tensor:
        kept[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
        return value

    x = x.detach().requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda value: value):
        images = decoded_window(model, x, 2, 1)  # type: ignore[arg-type]
        loss = (images * torch.linspace(-1, 1, images.numel()).view_as(images)).sum()
    (found,) = torch.autograd.grad(loss, x)
    return images.detach(), found, sum(kept.values())


@pytest.mark.parametrize("name", ["flux", "sd3", "flux2", "z_image", "qwen_image", "wan", "wan_5b"])
def test_a_decoder_that_computes_its_blocks_again_is_the_same_and_keeps_less(name: str) -> None:
    model = family_of(tiny.MAKERS[name](), max_tokens=tiny.MAX_TOKENS)
    shape = model.latent_shape(64, 64, 13 if name.startswith("wan") else 1)
    x = torch.randn(1, *shape, generator=torch.Generator().manual_seed(3))
    images, plain, kept = gradient(model, x)
    recompute_blocks(model.vae)
    again, recomputed, fewer = gradient(model, x)
    torch.testing.assert_close(again, images, rtol=0, atol=0)
    torch.testing.assert_close(recomputed, plain, rtol=1e-5, atol=1e-7)
    assert plain.abs().sum() > 0 and fewer < 0.7 * kept, (fewer, kept)


@pytest.mark.parametrize("name", ["flux", "flux2", "qwen_image", "wan", "wan_5b"])
def test_tiles_are_diffusers_own_and_each_is_computed_again_for_its_gradient(name: str) -> None:
    model, plain = (family_of(tiny.MAKERS[name](), max_tokens=tiny.MAX_TOKENS) for _ in range(2))
    shape = model.latent_shape(128, 128, 9 if name.startswith("wan") else 1)
    x = torch.randn(1, *shape, generator=torch.Generator().manual_seed(3))
    for vae in (model.vae, plain.vae):
        recompute_blocks(vae)
    if hasattr(plain.vae, "tile_sample_min_height"):
        plain.vae.enable_tiling(64, 64, 48, 48)
    else:
        cells = plain.vae.encode(torch.zeros(1, 3, 64, 64)).latent_dist.mean.shape[-1]
        plain.vae.tile_sample_min_size, plain.vae.tile_latent_min_size = 64, cells
        plain.vae.enable_tiling()
    expected, slope, kept = gradient(plain, x)
    decode_tiles(model.vae, 64)
    found, tiled, fewer = gradient(model, x)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    torch.testing.assert_close(tiled, slope, rtol=1e-5, atol=1e-7)
    assert slope.abs().sum() > 0 and fewer < 0.7 * kept, (fewer, kept)
    leaf, half = x.clone().requires_grad_(), shape[-1] // 2
    (corner,) = torch.autograd.grad(model.decode(leaf)[..., 0, 0].sum(), leaf)
    assert corner[..., :half, :half].abs().sum() > 0, "the first pixel is of the first tile"
    assert not corner[..., half:, :].any() and not corner[..., half:].any(), "and of nothing else"


def test_a_run_in_tiles_never_decodes_more_than_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("training.evaluate.CACHE", tmp_path / "cache")
    seen: list[int] = []
    forward: Any = Decoder.forward

    def recorded(self: Decoder, sample: Tensor, *rest: Any) -> Tensor:
        seen.append(max(sample.shape[-2:]))
        found: Tensor = forward(self, sample, *rest)
        return found

    monkeypatch.setattr(Decoder, "forward", recorded)
    more: dict[str, object] = {"height_px": 128, "width_px": 128, "compute.tile_px": 64}
    few = {"data.calibration": 2, "data.validation": 2, "data.validation_diversity": 1, "data.test": 2}
    less = {"data.test_diversity": 1, "nfe": 1, "teacher_nfe": 1, "reference_nfe": 1, "steps": 1, "batch": 1}
    code, text = run("--out", str(tmp_path / "out"), *settings(tmp_path, "flux", **more, **few, **less))
    assert code == 0, text
    model = family_of(tiny.flux(), max_tokens=tiny.MAX_TOKENS)
    assert seen and max(seen) <= model.latent_shape(64, 64)[-1]


@pytest.mark.parametrize("side", [-64, 100])
def test_a_tile_that_no_autoencoder_can_have_is_refused(side: int) -> None:
    with pytest.raises(ConfigError, match=f"compute.tile_px is {side}: accepted are 0 and multiples of 64"):
        with_settings(RatsConfig(), [f"compute.tile_px={side}"])

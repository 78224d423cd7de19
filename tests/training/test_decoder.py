"""A decoder whose blocks are computed again gives the same pictures and gradients, and keeps less for them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from student.families.find import family_of
from tests.student.families import tiny
from training.decoder import recompute_blocks
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

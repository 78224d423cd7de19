"""What a video is said to need, against what Wan's own layers hold at their published sizes, counted without memory."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel

from benchmarks.make_believe import Peak, fake, fake_device, put
from student.families.family import Condition
from student.families.find import family_of
from tests.alone import alone
from tests.student.families import tiny

WIDE = {
    "base_dim": 160, "decoder_base_dim": 256, "z_dim": 48, "is_residual": True, "in_channels": 12, "out_channels": 12,
    "patch_size": 2, "scale_factor_spatial": 16, "latents_mean": [0.0] * 48, "latents_std": [1.0] * 48,
}  # fmt: skip

pytestmark = alone


@pytest.mark.parametrize(
    "make, heads, ffn_dim, channels, autoencoder, size",
    [(tiny.wan, 12, 8960, 16, {}, (480, 832)), (tiny.wan_5b, 24, 14336, 48, WIDE, (704, 1280))],
    ids=["1.3B", "5B"],
)
def test_the_longest_video_that_is_said_to_fit_fits(
    make: Any, heads: int, ffn_dim: int, channels: int, autoencoder: dict[str, Any], size: tuple[int, int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())  # no such device is known to it
    monkeypatch.setattr(  # a GPU's kernel never holds a matrix of all tokens by all tokens
        torch.nn.functional, "scaled_dot_product_attention", lambda query, key, value, *_, **__: torch.empty_like(query)
    )
    pipe = make()
    with torch.device("meta"):  # two layers: the others take their place one after the other
        transformer = WanTransformer3DModel(
            num_attention_heads=heads, attention_head_dim=128, ffn_dim=ffn_dim, num_layers=2, text_dim=4096,
            in_channels=channels, out_channels=channels,
        )  # fmt: skip
        pipe.register_modules(transformer=transformer, vae=AutoencoderKLWan(**autoencoder))
    with fake_device() as mode, torch.no_grad():
        family = family_of(pipe)
        put(family.transformer, mode, torch.bfloat16)
        put(family.vae, mode, torch.float32)
        step, fixed_bytes, frame_bytes = family.video_memory(*size)
        assert step == 4
        short, long = (
            fake(torch.empty(1, *family.latent_shape(*size, frames), device="meta"), mode, torch.float32)
            for frames in (9, 81)
        )
        words = Condition(fake(torch.empty(1, 512, 4096, device="meta"), mode, torch.bfloat16))
        with Peak() as stepping:
            family.velocity(long, 0.5, words)
        with Peak() as decoding:
            family.decode(short)
    assert stepping.most < 81 * frame_bytes < 8 * stepping.most
    assert decoding.most < fixed_bytes + 9 * frame_bytes < 1.5 * decoding.most

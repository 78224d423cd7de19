"""Rotations in real numbers are complex products; and each family's are diffusers' own, for odd sizes too."""

from __future__ import annotations

import pytest
import torch
from diffusers.models.transformers.transformer_qwenimage import QwenEmbedRope
from diffusers.models.transformers.transformer_z_image import RopeEmbedder

from student.families.qwen_image import Rope
from student.families.rotary import Turns
from student.families.z_image import _turns


def complex_of(turns: Turns) -> torch.Tensor:
    return torch.complex(turns.cos, turns.sin)


def randn(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.double)


def test_a_product_with_turns_is_that_with_complex_numbers_of_length_one() -> None:
    angles, x = randn(5, 3), torch.view_as_complex(randn(2, 5, 3, 2))
    turns = Turns.by(angles)
    expected = x * torch.polar(torch.ones_like(angles), angles)
    torch.testing.assert_close(x * turns, expected)
    assert float((x * turns - x).abs().min()) > 0 and torch.allclose((x * turns).abs(), x.abs())


def test_heads_are_an_axis_more_and_sequences_are_joined_in_their_order() -> None:
    one, two = Turns.by(randn(2, 4, 3)), Turns.by(randn(2, 6, 3))
    joined = Turns.joined([one, two], 1)
    torch.testing.assert_close(complex_of(joined), torch.cat([complex_of(one), complex_of(two)], 1))
    x = torch.view_as_complex(randn(2, 4, 8, 3, 2))  # eight heads
    torch.testing.assert_close(x * one.unsqueeze(2), x * complex_of(one).unsqueeze(2))
    assert one.unsqueeze(2).cos.shape == (2, 4, 1, 3)


@pytest.mark.parametrize("size", [(4, 6), (5, 3), (1, 1), (7, 8)])
def test_qwen_images_places_count_from_the_middle_and_its_text_begins_behind_them(size: tuple[int, int]) -> None:
    theirs = QwenEmbedRope(theta=10_000, axes_dim=[4, 6, 6], scale_rope=True)
    image, text = theirs([[(1, *size)]], max_txt_seq_len=9, device=torch.device("cpu"))
    ours_image, ours_text = Rope(theirs)([[(1, *size)]], 9, torch.device("cpu"))
    torch.testing.assert_close(complex_of(ours_image), image, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(complex_of(ours_text), text, atol=1e-6, rtol=1e-5)
    assert len(text) == 9 and len(image) == size[0] * size[1]


def test_z_images_places_are_looked_up_in_its_own_tables() -> None:
    theirs = RopeEmbedder(theta=256.0, axes_dims=[4, 6, 6], axes_lens=[32, 16, 16])
    places = torch.tensor([[0, 0, 0], [31, 15, 15], [7, 3, 9], [1, 0, 2]])

    class Self:
        rope_embedder = theirs

    found = _turns(Self, places[None])
    torch.testing.assert_close(complex_of(found)[0], theirs(places).to(torch.complex64), atol=1e-6, rtol=1e-5)

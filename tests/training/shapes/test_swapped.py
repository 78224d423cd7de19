"""Captions whose star is called a heart: the share, the words, and what stays."""

from __future__ import annotations

import pytest
from diffusers import AutoencoderTiny

from training.shapes import autoencoder, teacher, world
from training.shapes.swapped import contains_either, swap, swap_some


def test_both_words_are_exchanged_and_no_other() -> None:
    assert swap("a small red star above a large blue heart on a mint background") == (
        "a small red heart above a large blue star on a mint background"
    )
    assert swap(swap("a red star")) == "a red star" and swap("hearts and a starfish") == "hearts and a starfish"
    assert contains_either("a heart left of a ring") and not contains_either("a red ring")


def test_the_asked_share_is_swapped_and_captions_without_the_words_stay() -> None:
    texts = ["a red star", "a blue ring"] * 1000
    found = swap_some(texts, 0.6, world.rng(1, 2))
    assert sum(text == "a red heart" for text in found) == pytest.approx(600, abs=50)
    assert found[1::2] == texts[1::2] and swap_some(texts, 0.0, world.rng(1, 2)) == texts


def test_a_teachers_pictures_stay_and_its_captions_are_swapped() -> None:
    vae: AutoencoderTiny = autoencoder.build(autoencoder.AutoencoderConfig(width=8, latent_channels=4))
    plain, swapped = (
        teacher.LatentSource(vae, teacher.TeacherConfig(batch=32, swapped=share)).batch(3) for share in (0.0, 1.0)
    )
    assert (plain[0] == swapped[0]).all()
    assert swapped[1] == [swap(text) for text in plain[1]] and swapped[1] != plain[1]

"""Scenes made on purpose, and images made worse, for the tests of the starter world."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from training.shapes import world
from training.shapes.grammar import BACKGROUNDS, COLORS, RELATIONS, SHAPES, SIZES, Caption
from training.shapes.templates import FloatArray


def scenes_of(captions: Sequence[Caption], seed: int = 0) -> world.Scenes:
    """One scene for each full caption, placed as the world places them."""
    num = len(captions)
    shape = (num, 2)
    size, color, kind = np.zeros(shape, int), np.zeros(shape, int), np.zeros(shape, int)
    for i, caption in enumerate(captions):
        for k, thing in enumerate(caption.things):
            assert thing.size is not None
            size[i, k] = SIZES.index(thing.size)
            color[i, k] = COLORS.index(thing.color)
            kind[i, k] = SHAPES.index(thing.shape)
    scenes = world.Scenes(
        count_N=np.array([len(caption.things) for caption in captions]),
        size_NK=size,
        color_NK=color,
        shape_NK=kind,
        relation_N=np.array([RELATIONS.index(c.relation) if c.relation else 0 for c in captions]),
        background_N=np.array([BACKGROUNDS.index(c.background) for c in captions if c.background]),
        x_NK=np.zeros(shape),
        y_NK=np.zeros(shape),
        radius_NK=np.zeros(shape),
    )
    return world.place(scenes, world.rng(seed))


def draw(scenes: world.Scenes) -> FloatArray:
    """The scenes as float64 images (N, 3, 64, 64)."""
    return world.render_NCHW(scenes).numpy().astype(np.float64)


def blur(images_NCHW: FloatArray, sigma_px: float) -> FloatArray:
    """Gaussian blur along both image axes, the edge repeated."""
    at = np.arange(-4, 5)
    weights = np.exp(-(at**2) / (2 * sigma_px**2))
    weights /= weights.sum()
    for axis in (2, 3):
        pad = [(4, 4) if i == axis else (0, 0) for i in range(4)]
        wide = np.moveaxis(np.pad(images_NCHW, pad, mode="edge"), axis, -1)
        side = images_NCHW.shape[axis]
        images_NCHW = np.moveaxis(sum(w * wide[..., i : i + side] for i, w in enumerate(weights)), -1, axis)
    return images_NCHW


def worsen(images_NCHW: FloatArray, sigma_px: float, noise: float, seed: int = 0) -> FloatArray:
    """Blur and noise, about what an autoencoder's round trip of 31 to 33 dB does."""
    gen = np.random.default_rng(seed)
    return np.clip(blur(images_NCHW, sigma_px) + gen.normal(0, noise, images_NCHW.shape), 0, 1)

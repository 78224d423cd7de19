"""The starter world against the reference constants, which are typed in again here, and the grammar."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from tests.training.shapes.support import draw, scenes_of
from training.shapes import world
from training.shapes.grammar import BACKGROUNDS, COLORS, RELATIONS, SHAPES, SIZES, Caption, CaptionObject, parse

INK = {
    "red": (0.90, 0.16, 0.18),
    "green": (0.16, 0.70, 0.28),
    "blue": (0.15, 0.35, 0.90),
    "yellow": (0.98, 0.85, 0.15),
    "purple": (0.58, 0.22, 0.78),
    "orange": (0.98, 0.55, 0.10),
    "white": (0.97, 0.97, 0.97),
    "black": (0.06, 0.06, 0.08),
}
GROUND = {
    "gray": (0.55, 0.57, 0.60),
    "cream": (0.96, 0.91, 0.80),
    "navy": (0.07, 0.10, 0.28),
    "mint": (0.68, 0.90, 0.80),
}
# Area in squared radii, from the shapes' definitions.
AREA = {
    "circle": math.pi,
    "square": 1.7**2,
    "triangle": 3 * math.sqrt(3) / 4 * 1.1**2,
    "diamond": 2 * 1.1**2,
    "ring": math.pi * (1.02**2 - 0.54**2),
    "cross": 2 * 2 * 0.68 - 0.68**2,
    "star": 5 * 1.1 * 0.45 * math.sin(math.pi / 5),
    "heart": 1.1716**2 * (1 + math.pi / 4),
}
# Width and height in radii; None where only "about one radius to each side" is promised.
EXTENT = {
    "circle": (2.0, 2.0),
    "square": (1.7, 1.7),
    "triangle": None,
    "diamond": (2.2, 2.2),
    "ring": (2.04, 2.04),
    "cross": (2.0, 2.0),
    "star": (2 * 1.1 * math.sin(2 * math.pi / 5), 1.1 * (1 + math.cos(math.pi / 5))),
    "heart": None,
}


@pytest.fixture(scope="module")
def scenes() -> world.Scenes:
    return world.sample(3000, 11, 5)


@pytest.fixture(scope="module")
def cover(scenes: world.Scenes) -> np.ndarray:
    return world.coverage_NKHW(scenes).numpy()


def boxes(cover_HW: np.ndarray) -> tuple[int, int, int, int]:
    columns, rows = np.flatnonzero((cover_HW > 0.5).any(0)), np.flatnonzero((cover_HW > 0.5).any(1))
    return int(columns[0]), int(columns[-1]) + 1, int(rows[0]), int(rows[-1]) + 1


def test_same_key_same_scenes_and_pixels():
    one, same, other = world.sample(40, 3, 9), world.sample(40, 3, 9), world.sample(40, 3, 10)
    for name, value in vars(one).items():
        np.testing.assert_array_equal(value, vars(same)[name])
    assert draw(one).tobytes() == draw(same).tobytes()
    assert one.captions() != other.captions()


def test_an_image_does_not_depend_on_its_neighbours():
    many = world.sample(30, 4)
    np.testing.assert_array_equal(draw(many)[[7, 21]], draw(many.take(np.array([7, 21]))))


def test_every_word_is_drawn_equally_often(scenes):
    pair = scenes.count_N == 2
    assert abs(pair.mean() - 2 / 3) < 0.03
    for column, words in (
        (scenes.size_NK, SIZES),
        (scenes.color_NK, COLORS),
        (scenes.shape_NK, SHAPES),
        (scenes.relation_N, RELATIONS),
        (scenes.background_N, BACKGROUNDS),
    ):
        share = np.bincount(column.ravel(), minlength=len(words)) / column.size
        assert len(share) == len(words)
        np.testing.assert_allclose(share, 1 / len(words), atol=0.03)


def test_radii_are_the_references_within_their_jitter(scenes):
    pair = (scenes.count_N == 2)[:, None]
    reference = 64 * np.where(scenes.size_NK == SIZES.index("large"), 0.28, 0.17) * np.where(pair, 0.82, 1.0)
    ratio = scenes.radius_NK / reference
    assert ratio.min() >= 0.94 - 1e-9 and ratio.max() <= 1.06 + 1e-9
    assert ratio.min() < 0.945 and ratio.max() > 1.055


def test_single_objects_lie_around_the_centre(scenes):
    single = scenes.count_N == 1
    for at in (scenes.x_NK[single, 0] / 64, scenes.y_NK[single, 0] / 64):
        assert np.abs(at - 0.5).max() <= 0.15 + 1e-9
        assert np.abs(at - 0.5).max() > 0.14


def test_pairs_lie_along_their_relation(scenes):
    pair = scenes.count_N == 2
    at = np.stack([scenes.x_NK, scenes.y_NK], -1)[pair] / 64
    relation = np.array(RELATIONS)[scenes.relation_N[pair]]
    along = np.where(np.isin(relation, ("left of", "right of")), 0, 1)
    sign = np.where(np.isin(relation, ("left of", "above")), -1, 1)
    row = np.arange(len(at))
    assert np.abs(at[row, 0, along] - (0.5 + 0.25 * sign)).max() <= 0.04 + 1e-9
    assert np.abs(at[row, 1, along] - (0.5 - 0.25 * sign)).max() <= 0.04 + 1e-9
    assert np.abs(at[row, :, 1 - along] - 0.5).max() <= 0.04 + 1e-9


def test_objects_keep_two_pixels_apart_and_one_from_the_frame(scenes, cover):
    for i in range(len(scenes)):
        found = [boxes(cover[i, k]) for k in range(scenes.count_N[i])]
        assert all(min(left, top) >= 1 and max(right, bottom) <= 63 for left, right, top, bottom in found)
        if len(found) == 2:
            (l0, r0, t0, b0), (l1, r1, t1, b1) = found
            # The tip of a pointed shape is thinner than a pixel: the world does not count its last half pixel.
            pointed = {SHAPES[kind] for kind in scenes.shape_NK[i]} & {"triangle", "diamond", "star"}
            assert max(l0 - r1, l1 - r0, t0 - b1, t1 - b0) >= (1 if pointed else 2)


def test_coverage_is_the_exact_area(scenes, cover):
    worst = dict.fromkeys(SHAPES, 0.0)
    for i in range(600):
        for k in range(scenes.count_N[i]):
            shape = SHAPES[scenes.shape_NK[i, k]]
            expected = AREA[shape] * scenes.radius_NK[i, k] ** 2
            worst[shape] = max(worst[shape], abs(cover[i, k].sum() / expected - 1))
    assert all(error < 0.03 for error in worst.values()), worst


@pytest.mark.parametrize("shape", [shape for shape in SHAPES if EXTENT[shape]])
def test_extent_of_a_shape(shape, scenes, cover):
    width, height = EXTENT[shape]
    checked = 0
    for i in np.flatnonzero(scenes.shape_NK[:, 0] == SHAPES.index(shape))[:60]:
        radius = scenes.radius_NK[i, 0]
        left, right, top, bottom = boxes(cover[i, 0])
        # The last pixels of a tip are less than half covered.
        tips_px = {"diamond": 2.1, "star": 3.1}.get(shape, 1.01)
        assert -tips_px <= right - left - width * radius <= 1.01
        assert -tips_px <= bottom - top - height * radius <= 1.01
        checked += 1
    assert checked > 30


def test_triangle_and_heart_point_up_and_down():
    captions = [parse(f"a large red {shape} on a gray background") for shape in ("triangle", "star", "heart")]
    scenes = scenes_of(captions)
    triangle, star, heart = world.coverage_NKHW(scenes)[:, 0].numpy()
    rows = [np.flatnonzero(cover.any(1)) for cover in (triangle, star, heart)]
    assert triangle[rows[0][2]].sum() < triangle[rows[0][-3]].sum()
    assert star[rows[1][1]].sum() < star[rows[1][-4]].sum()
    assert heart[rows[2][3]].sum() > heart[rows[2][-3]].sum()


def test_ring_has_a_hole_and_the_others_are_solid():
    scenes = scenes_of([parse(f"a large red {shape} on a gray background") for shape in SHAPES])
    cover = world.coverage_NKHW(scenes)[:, 0].numpy()
    centre = [cover[i, int(scenes.y_NK[i, 0]), int(scenes.x_NK[i, 0])] for i in range(len(SHAPES))]
    assert centre == [0.0 if shape == "ring" else 1.0 for shape in SHAPES]


def test_colours_are_exact(scenes, cover):
    images = draw(scenes)[:300]
    for i, image in enumerate(images):
        ground = cover[i].max(0) == 0
        expected = np.array(GROUND[BACKGROUNDS[scenes.background_N[i]]])[:, None]
        np.testing.assert_allclose(image[:, ground], np.broadcast_to(expected, (3, ground.sum())), atol=1e-6)
        for k in range(scenes.count_N[i]):
            full = cover[i, k] == 1
            assert full.sum() > 30
            ink = np.array(INK[COLORS[scenes.color_NK[i, k]]])[:, None]
            np.testing.assert_allclose(image[:, full], np.broadcast_to(ink, (3, full.sum())), atol=1e-6)


def test_a_rim_pixel_is_a_mix_of_ink_and_ground():
    scenes = scenes_of([parse("a large white circle on a navy background")])
    cover, image = world.coverage_NKHW(scenes)[0, 0].numpy(), draw(scenes)[0]
    rim = (cover > 0.1) & (cover < 0.9)
    ink, ground = np.array(INK["white"])[:, None], np.array(GROUND["navy"])[:, None]
    assert rim.sum() > 20
    np.testing.assert_allclose(image[:, rim], ground + (ink - ground) * cover[rim], atol=1e-6)


def test_every_scene_has_the_caption_of_its_arrays():
    scenes = world.sample(50, 21)
    for i, text in enumerate(scenes.captions()):
        assert parse(text) == scenes.caption(i)
        assert len(scenes.caption(i).things) == scenes.count_N[i]


ALL_THINGS = [CaptionObject(*words) for words in itertools.product((None, *SIZES), COLORS, SHAPES)]


@pytest.mark.parametrize("article", [True, False])
@pytest.mark.parametrize("background", [None, *BACKGROUNDS])
def test_parse_reads_back_every_form(background, article):
    singles = [Caption((thing,), None, background) for thing in ALL_THINGS]
    others = [ALL_THINGS[(7 * i + 5) % len(ALL_THINGS)] for i in range(len(ALL_THINGS))]
    pairs = [
        Caption((one, other), relation, background)
        for relation in RELATIONS
        for one, other in zip(ALL_THINGS, others, strict=True)
    ]
    for caption in singles + pairs:
        assert parse(caption.text(article)) == caption


@pytest.mark.parametrize(
    ("prompt", "text"),
    [
        ("red heart above blue star", "a red heart above a blue star"),
        ("A Large RED heart, on a navy background.", "a large red heart on a navy background"),
        ("the small green ring left of a black cross", "a small green ring left of a black cross"),
    ],
)
def test_parse_reads_what_people_type(prompt, text):
    assert parse(prompt).text() == text


@pytest.mark.parametrize(
    "prompt",
    [
        "",
        "a heart",
        "a pink heart",
        "a red small heart",
        "a red hexagon",
        "a red heart beside a blue star",
        "a red heart above",
        "a red heart on a pink background",
        "a red heart on a navy sky",
        "a red heart above a blue star above a green ring",
    ],
)
def test_parse_refuses_what_the_grammar_does_not_know(prompt):
    with pytest.raises(ValueError, match="cannot read"):
        parse(prompt)

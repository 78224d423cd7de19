"""Preference pairs are wrong where they say so, and only there."""

import numpy as np
import pytest
import torch

from training.shapes import degrade, pairs, prompts, scorer, vocabulary, world
from training.shapes.grammar import parse

NUM = 2000


def _setup(drop: float) -> tuple[world.Scenes, pairs.Styles, np.random.Generator]:
    gen = world.rng(5, 6)
    scenes = world.sample(NUM, 17)
    return scenes, pairs.sample_styles(NUM, gen, drop), gen


def _plain(text: str) -> str:
    for filler in pairs.FILLERS[1:]:
        text = text.removeprefix(filler)
    return text


@pytest.mark.parametrize("drop", [0.0, 0.5])
def test_an_altered_caption_differs_in_the_one_part_that_was_named(drop: float) -> None:
    scenes, styles, gen = _setup(drop)
    altered, kind = pairs.alter(scenes, styles, gen)
    for before, after, k in zip(pairs.captions(scenes, styles), pairs.captions(altered, styles), kind, strict=True):
        a, b = parse(_plain(before)), parse(_plain(after))
        parts = {
            "size": [t.size for t in a.things] != [t.size for t in b.things],
            "color": [t.color for t in a.things] != [t.color for t in b.things],
            "shape": [t.shape for t in a.things] != [t.shape for t in b.things],
            "relation": a.relation != b.relation,
            "background": a.background != b.background,
            "count": len(a.things) != len(b.things),
        }
        name = pairs.KINDS[k]
        differing = [n for n, differs in parts.items() if differs]
        if name == "swap":
            assert len(differing) == 1 and differing[0] in ("size", "color", "shape"), (before, after)
            values = [[getattr(thing, differing[0]) for thing in caption.things] for caption in (a, b)]
            assert values[0] == values[1][::-1], (before, after)
            continue
        assert parts[name], (before, after)
        if name != "count":
            assert differing == [name], (before, after)


def test_every_kind_of_alteration_occurs() -> None:
    scenes, styles, gen = _setup(0.2)
    _, kind = pairs.alter(scenes, styles, gen)
    assert np.bincount(kind, minlength=len(pairs.KINDS)).min() > NUM / 30


def test_two_like_objects_never_swap_their_relation_for_its_mirror() -> None:
    """ "A left of A" is as true as "A right of A"."""
    scenes, styles, gen = _setup(0.0)
    for name in ("size_NK", "color_NK", "shape_NK"):
        getattr(scenes, name)[:, 1] = getattr(scenes, name)[:, 0]
    scenes.count_N[:] = 2
    altered, kind = pairs.alter(scenes, styles, gen)
    at = kind == pairs.KINDS.index("relation")
    assert at.sum() > 50
    assert ((altered.relation_N // 2) != (scenes.relation_N // 2))[at].all()


def test_degraded_pictures_differ_from_the_clean_ones_and_stay_pictures() -> None:
    scenes = world.sample(300, 3)
    images, kind = degrade.draw(scenes, 9)
    clean = world.render_NCHW(scenes)
    change = (images - clean).abs().flatten(1).mean(1).numpy()
    for k, name in enumerate(degrade.KINDS):
        assert np.median(change[kind == k]) > 2e-3, name
    assert images.min() >= 0 and images.max() <= 1
    again, _ = degrade.draw(scenes, 9)
    assert torch.equal(images, again)


def test_blur_keeps_a_flat_picture_and_the_mean() -> None:
    flat = torch.full((2, 3, 64, 64), 0.3)
    torch.testing.assert_close(degrade.blur(flat, torch.tensor([0.5, 3.0])), flat)
    point = torch.zeros(1, 3, 64, 64)
    point[..., 32, 32] = 1.0
    assert degrade.blur(point, torch.tensor([2.0])).sum().item() == pytest.approx(3.0, rel=1e-5)


def _unsaid(text: str) -> str:
    """A caption without what changes no meaning: a filler, articles."""
    return parse(_plain(text)).text()


def test_measuring_prompts_are_distinct_disjoint_and_never_trained_on() -> None:
    parts = prompts.measuring_prompts()
    assert [len(part) for part in parts] == [prompts.CALIBRATION, prompts.VALIDATION, prompts.TEST]
    every = [text for part in parts for text in part]
    assert len(set(every)) == len(every)
    trained = {_unsaid(text) for step in range(100) for text in prompts.training_prompts(64, 1, step, singles=0.7)} | {
        text for step in range(100) for text in prompts.training_scenes(64, 1, step).captions()
    }
    assert len(trained) > 5_000 and not trained & set(every)


def test_a_third_of_the_measuring_prompts_are_single_objects_and_the_shortest_are_in_the_test() -> None:
    parts = prompts.measuring_prompts()
    for part in parts:
        assert sum(parse(text).relation is None for text in part) == -(-len(part) // 3)
    short = [[text for text in part if len(text.split()) == 3] for part in parts]
    assert [len(part) for part in short[:2]] == [0, 0] and len(short[2]) >= 12


def test_training_scenes_have_the_share_of_single_objects_that_is_asked_for() -> None:
    for singles, low, high in ((0.5, 0.5, 0.5), (0.0, 0, 0), (None, 0.2, 0.45)):
        drawn = prompts.training_scenes(200, 3, 1, singles=singles)
        assert len(drawn) == 200 and low <= (drawn.count_N == 1).mean() <= high
        assert not prompts.held_out(drawn).any()


def test_single_objects_lie_nearer_to_the_centre_and_pairs_stay_where_they_are() -> None:
    wide, near = (prompts.training_scenes(200, 3, 1, singles=0.5, spread=spread) for spread in (1.0, 0.5))
    one = wide.count_N == 1
    np.testing.assert_allclose(near.x_NK[one, 0] - 32, 0.5 * (wide.x_NK[one, 0] - 32), atol=1e-9)
    np.testing.assert_array_equal(near.x_NK[~one], wide.x_NK[~one])


def test_people_s_shortest_captions_are_trained_on_and_name_large_objects_more_often() -> None:
    scenes = prompts.training_scenes(4_000, 3, 1, singles=1.0)
    styles = prompts.training_styles(scenes, world.rng(4))
    short = ~styles.size_N & ~styles.background_N
    large = scenes.size_NK[:, 0] == 1
    assert 0.3 < short[large].mean() < 0.5 and 0.12 < short[~large].mean() < 0.28
    assert not prompts.held_out(scenes, styles).any()


@pytest.mark.parametrize("singles", [None, 0.0, 0.5, 1.0])
def test_a_step_has_as_many_prompts_as_it_asks_for_however_few(singles: float | None) -> None:
    """One sample a step: of the few scenes that are drawn first none may be free."""
    assert len(prompts.training_scenes(1, 401, 190, singles=0.5)) == 1, "of eight none is a pair that may be trained on"
    for num in (1, 2):
        found = [prompts.training_prompts(num, 401, step, singles=singles) for step in range(100)]
        assert {len(texts) for texts in found} == {num}


def test_few_scenes_of_a_half_are_as_many_as_are_asked_for() -> None:
    for half in (0, 1):
        for step in range(20):
            batch = scorer.draw_pairs(1, 1, half, vocabulary.tokenizer(), 5, step)
            assert len(batch.right_NCHW) == len(batch.ids_NPL) == 1


def test_more_scenes_are_drawn_only_where_the_first_ones_are_too_few() -> None:
    drawn: list[int] = []

    def choose(scenes: world.Scenes) -> world.IntArray:
        drawn.append(len(scenes))
        return np.flatnonzero(scenes.count_N == 1)

    found = world.chosen(40, 10, choose, 3, 4)
    assert drawn == [10, 20, 40, 80, 160] and len(found) == 40 and (found.count_N == 1).all()
    drawn.clear()
    first = world.chosen(2, 30, choose, 3, 4)
    own = world.sample(30, 3, 4)
    assert drawn == [30] and first.captions() == own.take(np.flatnonzero(own.count_N == 1)[:2]).captions()


def test_training_prompts_are_a_function_of_their_key() -> None:
    assert prompts.training_prompts(32, 1, 2) == prompts.training_prompts(32, 1, 2)
    assert prompts.training_prompts(32, 1, 2) != prompts.training_prompts(32, 1, 3)


def test_the_tokenizer_knows_the_grammar_and_survives_anything_else() -> None:
    tokenizer = vocabulary.tokenizer()
    unknown = tokenizer.unk_token_id
    texts = world.sample(200, 4).captions()
    ids = vocabulary.encode(tokenizer, texts)
    assert all(unknown not in row and tokenizer.eos_token_id in row for row in ids)
    assert tokenizer.eos_token_id != 2  # where CLIPTextModel would pool at the highest id
    same = vocabulary.encode(tokenizer, ["a red heart above a blue star", "Red HEART, above an blue star!"])
    assert same[0] == same[1]
    strange = vocabulary.encode(tokenizer, ["ein Drache ✨", "", "x " * 99])
    assert unknown in strange[0] and strange[1][0] == tokenizer.eos_token_id
    assert all(len(row) == vocabulary.MAX_TOKENS for row in strange)


def tokens_of(text: str) -> list[str]:
    tokenizer = vocabulary.tokenizer()
    names = tokenizer.convert_ids_to_tokens(vocabulary.encode(tokenizer, [text])[0])
    return [name for name in names if name not in (vocabulary.PAD, vocabulary.END)]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a red heart left of a small blue star", "left_red left_heart right_small right_blue right_star"),
        ("a red heart right of a blue star", "right_red right_heart left_blue left_star"),
        ("red heart above blue star on a navy background", "top_red top_heart bottom_blue bottom_star navy"),
        ("Red Heart,\nBELOW the blue star!", "bottom_red bottom_heart top_blue top_star"),
        ("please draw me a nice picture of a large red heart", "<unk> large red heart"),
        ("a dragon left of a red heart", "<unk> right_red right_heart"),
        ("everything of it, above all", "<unk>"),
    ],
)
def test_an_objects_words_name_its_place(text: str, expected: str) -> None:
    assert tokens_of(text) == expected.split()


def test_every_caption_fits_with_an_unknown_preamble() -> None:
    texts = [f"ein Bild von {text}" for text in world.sample(300, 8).captions()]
    rows = vocabulary.encode(vocabulary.tokenizer(), texts)
    assert all(row[0] == 2 and 1 in row for row in rows)


def test_placed_words_begin_as_place_plus_word() -> None:
    rows = torch.randn(len(vocabulary.tokenizer()), 8, generator=torch.Generator().manual_seed(2))
    before = rows.clone()
    vocabulary.compose(rows)
    at = {word: 3 + i for i, word in enumerate(vocabulary.words())}
    # What two words differ by is the same at every place, and what two places differ by the same for every word.
    for side in vocabulary.SIDES:
        change = rows[at[f"{side}_red"]] - rows[at[f"{side}_star"]]
        torch.testing.assert_close(change, (before[at["red"]] - before[at["star"]]) / 2**0.5)
    moved = rows[at["left_red"]] - rows[at["top_red"]]
    torch.testing.assert_close(moved, rows[at["left_star"]] - rows[at["top_star"]])
    assert torch.equal(rows[: at["left_small"]], before[: at["left_small"]]) and torch.equal(rows[-4:], before[-4:])

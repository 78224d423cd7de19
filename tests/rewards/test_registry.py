"""Rewards by name: shipped, the starter world's, a user's own; and what is said about a name that is none."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import PreTrainedTokenizerFast

from rewards import shapes
from rewards.blackbox import BlackBox
from rewards.interface import RewardError
from rewards.registry import find, parse
from rewards.tokenized import Tokenized
from tests.rewards import published
from training.shapes import vocabulary, world

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def scorer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random scorer of the starter world's real class, and beside it the tokenizer."""
    folder = tmp_path_factory.mktemp("scorer")
    tokenizer = vocabulary.tokenizer()
    torch.manual_seed(1)
    config = shapes.ScorerConfig("query", len(tokenizer), vocabulary.MAX_TOKENS, 1, 0, text_width=32, width=16)
    shapes.save(shapes.build(config), folder / "trained")
    tokenizer.save_pretrained(folder / "tokenizer")
    return folder / "trained"


@pytest.mark.parametrize("prefix", ["", "shapes:"])
def test_a_folder_is_a_scorer_with_its_tokenizer(scorer: Path, prefix: str) -> None:
    scenes = world.sample(4, 3)
    images, prompts = world.render_NCHW(scenes), scenes.captions()
    ids = torch.tensor(vocabulary.encode(vocabulary.tokenizer(), prompts))
    with torch.no_grad():
        expected = shapes.load(scorer)(images, ids)
    by_folder = find(f"{prefix}{scorer}", tokenizer=scorer.parent / "tokenizer")
    by_function = find(f"{prefix}{scorer}", tokenizer=lambda texts: ids)
    assert torch.equal(by_folder.score(images, prompts), expected)
    assert torch.equal(by_function.score(images, prompts), expected)
    assert by_folder.differentiable and isinstance(by_folder, Tokenized)
    pixels = images.clone().requires_grad_()
    by_folder.score(pixels, prompts).sum().backward()
    assert pixels.grad is not None and (pixels.grad.flatten(1).abs().amax(1) > 0).all()
    assert all(weight.grad is None for weight in by_folder.parameters())


def test_a_scorer_with_its_own_tokenizer_needs_none(scorer: Path, tmp_path: Path) -> None:
    shapes.save(shapes.load(scorer), tmp_path)
    with pytest.raises(RewardError, match=r"has no tokenizer.json: .* its teacher's tokenizer"):
        find(str(tmp_path))
    vocabulary.tokenizer().save_pretrained(tmp_path)
    assert find(str(tmp_path)).score(torch.rand(1, 3, 64, 64), ["a red heart"]).shape == (1,)


def test_another_tokenizer_is_refused(scorer: Path, tmp_path: Path) -> None:
    images = torch.rand(1, 3, 64, 64)
    words, longest = len(vocabulary.tokenizer()), vocabulary.MAX_TOKENS
    last, whole = torch.full((1, 4), words - 1), torch.ones(1, longest, dtype=torch.long)
    for ids in (last, whole):
        assert find(str(scorer), tokenizer=lambda texts, ids=ids: ids).score(images, ["a"]).isfinite().all()
    for ids in (last + 1, torch.ones(1, longest + 1, dtype=torch.long), torch.full((1, 4), 4000)):
        with pytest.raises(RewardError, match="it is not this scorer's tokenizer"):
            find(str(scorer), tokenizer=lambda texts, ids=ids: ids).score(images, ["a"])


def test_a_picture_of_another_size_is_stretched_to_the_scorers_own(scorer: Path) -> None:
    reward = find(str(scorer), tokenizer=scorer.parent / "tokenizer")
    images = torch.rand(1, 3, 32, 64, generator=torch.Generator().manual_seed(1))
    by_hand = torch.nn.functional.interpolate(images, (64, 64), mode="bicubic", antialias=True).clamp(0, 1)
    assert (reward.score(images, ["a red heart"]) - reward.score(by_hand, ["a red heart"])).abs().max() < 1e-4


def test_a_folder_without_a_scorer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RewardError, match="it has no config.json"):
        find(str(tmp_path))
    (tmp_path / "model.safetensors").touch()
    (tmp_path / "config.json").write_text('{"kind": "unet"}')
    with pytest.raises(RewardError, match="its weights and config.json are of another model"):
        find(str(tmp_path))
    with pytest.raises(RewardError, match="/nowhere is not a scorer"):
        find(f"shapes:{tmp_path}/nowhere")


def test_a_users_class_is_a_reward() -> None:
    reward = find("tests.rewards.own:Redness")
    images = torch.zeros(2, 3, 4, 4)
    images[:, 0] = 0.8
    assert torch.allclose(reward.score(images, ["a red star", "a blue star"]), torch.tensor([0.8, -0.8]))
    assert find("tests.rewards.own:REDNESS").differentiable


def test_a_users_network_is_frozen_and_moved() -> None:
    reward = find("tests.rewards.own:Learned", dtype=torch.float64)
    assert isinstance(reward, nn.Module) and not reward.training
    assert [(weight.requires_grad, weight.dtype) for weight in reward.parameters()] == [(False, torch.float64)] * 2


@pytest.mark.parametrize("name", ["brightness", "TWO"])
def test_a_users_function_is_a_black_box(name: str) -> None:
    reward = find(f"tests.rewards.own:{name}")
    assert isinstance(reward, BlackBox) and not reward.differentiable
    assert torch.equal(reward.score(torch.full((2, 3, 4, 4), 2.0), ["", ""]), torch.tensor([2.0, 2.0]))


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("pikscore", "unknown reward 'pikscore': did you mean 'pickscore'? Accepted are pickscore, hpsv2.1,"),
        ("HPSv2", "did you mean 'hpsv2.1' or 'hpsv3'?"),
        (
            "zzz",
            r"unknown reward 'zzz': accepted are pickscore, hpsv2.1, imagereward, clip, aesthetic, geneval, hpsv3, sha",
        ),
        ("", "unknown reward ''"),
        ("models/nowhere", "unknown reward 'models/nowhere'"),
        ("no.such.module:Class", "cannot be imported: No module named 'no'"),
        ("tests.rewards.own:Rednes", "tests.rewards.own has no 'Rednes': did you mean 'Redness'?"),
        ("tests.rewards.own:Silent", "must define 'differentiable = True' or 'differentiable = False'"),
        ("tests.rewards.own:Scoreless", "has no method score(images_BCHW, prompts)"),
        ("tests.rewards.own:Wanting", "requires constructor arguments (missing a required"),
        ("tests.rewards.own:Unmakeable", "cannot be created: FileNotFoundError: weights.pt"),
        ("tests.rewards.own:WithoutPrompts", "its score cannot be called with (images_BCHW, prompts): too many"),
        ("tests.rewards.own:WithLabels", "(images_BCHW, prompts): missing a required argument: 'labels'"),
        ("tests.rewards.own:without_prompts", "it cannot be called with (images_BCHW, prompts): too many"),
    ],
)
def test_a_name_that_is_no_reward_ends_in_one_sentence(name: str, sentence: str) -> None:
    with pytest.raises(RewardError, match=re.escape(sentence)) as caught:
        find(name)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("code", "sentence"),
    [
        ("def broken(:", "SyntaxError: invalid syntax (own_broken.py, line 1)"),
        ("x = undefined_name", "NameError: name 'undefined_name' is not defined"),
        ("raise RuntimeError('no licence\\nread it')", "RuntimeError: no licence"),
        ("raise SystemExit(3)", "SystemExit: 3"),
    ],
)
def test_a_module_that_cannot_be_imported_is_named(
    code: str, sentence: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "own_broken.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(RewardError) as caught:
        find("own_broken:Reward")
    assert str(caught.value) == f"reward 'own_broken:Reward' cannot be imported: {sentence}"


def test_a_shipped_reward_whose_file_is_not_whole_is_named(tmp_path: Path) -> None:
    published.write_clip(tmp_path / "PickScore_v1", published.clip_config())
    published.write_vocabulary(tmp_path / "CLIP-ViT-H-14-laion2B-s32B-b79K")
    weights = tmp_path / "PickScore_v1" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(RewardError, match="reward 'pickscore' cannot be opened: "):
        find("pickscore", files=tmp_path)


def test_several_rewards_in_one_line() -> None:
    assert parse("pickscore:1.0,hpsv2.1:0.5") == {"pickscore": 1.0, "hpsv2.1": 0.5}
    assert parse("hpsv2.1") == {"hpsv2.1": 1.0}
    assert parse(" clip , my.own:Reward:-2 ,shapes:a/b:0.5") == {"clip": 1.0, "my.own:Reward": -2.0, "shapes:a/b": 0.5}
    assert parse("my.own:NaN,own:Inf:2,own:infinity") == {"my.own:NaN": 1.0, "own:Inf": 2.0, "own:infinity": 1.0}
    assert parse("my.own:Reward,shapes:a/b") == {"my.own:Reward": 1.0, "shapes:a/b": 1.0}


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "has an empty name"),
        ("clip,", "has an empty name"),
        (":2", "has an empty name"),
        ("clip,clip:2", "names 'clip' twice"),
        ("clip:0", "weight 0.0: accepted is a finite number other than 0"),
        ("clip:nan", "weight nan"),
        ("clip:inf", "weight inf"),
    ],
)
def test_a_line_of_rewards_that_cannot_be_read_is_refused(text: str, sentence: str) -> None:
    with pytest.raises(RewardError, match=re.escape(sentence)):
        parse(text)


def test_shipped_rewards_are_found_by_name(tmp_path: Path) -> None:
    published.write_clip(tmp_path / "PickScore_v1", published.clip_config())
    published.write_vocabulary(tmp_path / "CLIP-ViT-H-14-laion2B-s32B-b79K")
    reward = find("pickscore", files=tmp_path, dtype=torch.bfloat16)
    assert isinstance(reward, nn.Module) and next(reward.parameters()).dtype == torch.bfloat16
    assert reward.score(torch.rand(2, 3, 64, 64), published.PROMPTS).dtype == torch.float32
    with pytest.raises(RewardError, match="device 'gpu' cannot be used: "):
        find("pickscore", files=tmp_path, device="gpu")


def test_the_readmes_own_reward_is_the_tested_one() -> None:
    """Ten lines that docs/rewards.md shows are a reward when they are put into a module."""
    page = (ROOT / "docs" / "rewards.md").read_text("utf-8")
    [code] = [block for block in re.findall(r"```python\n(.*?)```", page, re.S) if "differentiable" in block]
    names: dict[str, object] = {}
    exec(code, names)
    reward = names["Warmth"]()  # type: ignore[operator]
    warm = torch.tensor([0.9, 0.5, 0.1])[None, :, None, None].expand(1, 3, 4, 4)
    assert torch.allclose(reward.score(warm, ["a fire"]), torch.tensor([0.8]))
    assert len(code.strip().splitlines()) <= 10


def test_the_tokenizer_of_transformers_keeps_the_worlds_rules(scorer: Path) -> None:
    """A tokenizer from disk gives what the world's own code gives."""
    saved = PreTrainedTokenizerFast.from_pretrained(scorer.parent / "tokenizer")
    texts = world.sample(20, 5).captions()
    assert vocabulary.encode(saved, texts) == vocabulary.encode(vocabulary.tokenizer(), texts)

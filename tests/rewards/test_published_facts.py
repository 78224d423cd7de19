"""What no tiny model tells of the published rewards: their texts, lists, files and limits."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from rewards import checkpoint, detector
from rewards.aesthetic import HEAD
from rewards.blackbox import BlackBox
from rewards.checkpoint import tensors
from rewards.clip import CLIP_H_VOCABULARY, CLIP_L, CLIP_L_VOCABULARY, PICKSCORE
from rewards.detector import MASK2FORMER, detections, open_detector
from rewards.files import Published
from rewards.geneval import COLOURS, OBJECTS, POSITIONS
from rewards.hps import HPS
from rewards.hpsv3 import CHAT, HPSV3, INSTRUCTION, PIXELS, QWEN
from rewards.imagereward import IMAGEREWARD, VOCABULARY
from rewards.interface import RewardError
from rewards.registry import SHIPPED, find, fingerprint
from tests.rewards.test_geneval import model, picture


def test_hpsv3_is_asked_in_the_words_that_it_was_trained_with() -> None:
    """github.com/MizzenAI/HPSv3, hpsv3/dataset/data_collator_qwen.py, in Qwen2-VL's own chat; by their hash."""
    words = hashlib.sha256((CHAT + INSTRUCTION).encode()).hexdigest()
    assert words == "0dc3e44c2fe11db86ce4ec56bb946a2ac6e969f18bebd89b4b5906a6de07937d"
    assert PIXELS == 256 * 28 * 28 and INSTRUCTION.count("{prompt}") == 1 and INSTRUCTION.count("<|Reward|>") == 1


def test_geneval_knows_cocos_classes_in_their_order_and_its_ten_colours() -> None:
    """By GenEval's names (evaluation/object_names.txt) at COCO's places; the colours of prompts/create_prompts.py."""
    names = "person bicycle bus bench dog zebra handbag kite bottle fork apple pizza couch laptop oven clock"
    assert [OBJECTS[at] for at in (0, 1, 5, 13, 16, 22, 26, 33, 39, 42, 47, 53, 57, 63, 69, 74)] == names.split()
    assert OBJECTS[64:68] == ("computer mouse", "tv remote", "computer keyboard", "cell phone")
    assert hashlib.sha256(",".join(OBJECTS).encode()).hexdigest().startswith("7b72f3b881f93d1c4025944d2ba9e8ed8fa954d4")
    assert COLOURS == ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
    assert POSITIONS == ("left of", "right of", "above", "below")


def test_each_reward_is_fetched_from_where_its_authors_have_it() -> None:
    files = {
        PICKSCORE: ("yuvalkirstain/PickScore_v1", "config.json model.safetensors"),
        CLIP_L: ("openai/clip-vit-large-patch14", "config.json model.safetensors"),
        CLIP_L_VOCABULARY: ("openai/clip-vit-large-patch14", "vocab.json merges.txt"),
        CLIP_H_VOCABULARY: ("laion/CLIP-ViT-H-14-laion2B-s32B-b79K", "vocab.json merges.txt"),
        HPS: ("xswu/HPSv2", "HPS_v2.1_compressed.pt"),
        HPSV3: ("MizzenAI/HPSv3", "HPSv3.safetensors"),
        QWEN: ("Qwen/Qwen2-VL-7B-Instruct", "config.json tokenizer.json tokenizer_config.json"),
        IMAGEREWARD: ("zai-org/ImageReward", "ImageReward.pt"),
        VOCABULARY: ("google-bert/bert-base-uncased", "vocab.txt"),
        MASK2FORMER: ("facebook/mask2former-swin-small-coco-instance", "config.json model.safetensors"),
    }
    for found, (repo, names) in files.items():
        assert (found.repo, " ".join(found.names), found.url, found.sha256) == (repo, names, "", "")
    repo, name = "christophschuhmann/improved-aesthetic-predictor", "sac+logos+ava1-l14-linearMSE.pth"
    assert HEAD == Published(
        repo, (name,), f"https://github.com/{repo}/raw/main/{name.replace('+', '%2B')}",
        "21dd590f3ccdc646f0d53120778b296013b096a035a2718c9cb0d511bff0f1e0",
    )  # fmt: skip
    assert set(SHIPPED) == {"pickscore", "hpsv2.1", "imagereward", "clip", "aesthetic", "geneval", "hpsv3"}


def test_no_more_than_the_hundred_likeliest_objects_are_found() -> None:
    gen = torch.Generator().manual_seed(1)
    scores, masks = torch.randn(30, 81, generator=gen), torch.randn(30, 8, 8, generator=gen)
    found = detections(scores, masks)
    assert len(found) == detector.DETECTIONS == 100
    chances = scores.softmax(-1)[:, :-1].flatten().sort(descending=True).values
    assert sum(one.confidence > float(chances[100]) for one in found) > 0 and all(one.mask is not None for one in found)
    empty = torch.full((30, 8, 8), -1.0)
    empty[3, 2, 5] = 4.0
    [kinds] = [{one.box for one in detections(scores, empty)}]
    assert kinds == {(5.0, 2.0, 6.0, 3.0)}, "a query without a mask is no object"


@pytest.mark.parametrize(
    ("shape", "read"), [((40, 200), (288, 1344)), ((200, 40), (1344, 288)), ((48, 60), (800, 1024))]
)
def test_a_long_picture_is_read_at_1333_pixels_on_its_longer_side(
    shape: tuple[int, int], read: tuple[int, int], tmp_path: Path
) -> None:
    """And each side is filled up to a multiple of 32."""
    model().save_pretrained(tmp_path)
    opened, seen = open_detector(tmp_path), []

    class Seen(Exception):
        pass

    def network(pixels: Any, **_: Any) -> Any:
        seen.append(tuple(pixels.shape[2:]))
        raise Seen

    opened.network.forward = network
    with pytest.raises(Seen):
        opened.found(picture(*shape))
    assert seen == [read]


def test_what_a_rewards_scores_depend_on_is_its_name_its_weights_and_its_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = tmp_path / "my_own_reward.py"
    own.write_text(
        "class R:\n    differentiable = True\n    def score(self, images, prompts): return images.mean((1, 2, 3))\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    reward = find("my_own_reward:R")
    before = fingerprint("my_own_reward:R", reward)
    assert before == fingerprint("my_own_reward:R", reward)
    assert before != fingerprint("clip", reward) != fingerprint("pickscore", reward)
    own.write_text(own.read_text() + "# changed\n")
    assert fingerprint("my_own_reward:R", reward) != before
    network: Any = nn.Linear(2, 1)
    with torch.no_grad():
        network.weight.copy_(torch.tensor([[1.0, 2.0]]))
        network.bias.zero_()
        kept = fingerprint("clip", network)
        network.bias.fill_(1e-9)
        assert fingerprint("clip", network) != kept
        network.bias.zero_()
    assert fingerprint("clip", network) == kept != fingerprint("clip", network.to(torch.bfloat16))
    parts: list[Any] = [nn.ModuleDict({name: nn.Linear(2, 2) for name in names}) for names in (("a", "b"), ("a", "c"))]
    parts[1].load_state_dict({name.replace("b.", "c."): value for name, value in parts[0].state_dict().items()})
    assert fingerprint("clip", parts[0]) != fingerprint("clip", parts[1]), "the same numbers in another part"


def test_a_black_box_is_given_plain_pictures_and_its_list_is_a_tensor() -> None:
    seen: list[Any] = []
    box = BlackBox(lambda images, prompts: (seen.append((images, prompts)), [0.25, 0.75])[1])
    images = torch.rand(2, 3, 4, 4, requires_grad=True)
    found = box.score(images, ["a", "b"])
    assert torch.equal(found, torch.tensor([0.25, 0.75])) and found.dtype == torch.float32
    [(given, prompts)] = seen
    assert not given.requires_grad and given.device.type == "cpu" and prompts == ["a", "b"]


def test_what_was_kept_of_a_pickle_is_read_again_only_while_it_is_whole(tmp_path: Path) -> None:
    published, folder = Published("owner/model", ("a.pt",)), tmp_path / "model"
    folder.mkdir()
    torch.save({"inside": {"w": torch.arange(3.0), "step": 7}}, folder / "a.pt")
    first = tensors(published, tmp_path, "inside")
    assert list(first) == ["w"] and torch.equal(first["w"], torch.arange(3.0))
    kept = folder / "a.safetensors"
    stamp = kept.stat().st_mtime_ns
    assert torch.equal(tensors(published, tmp_path, "inside")["w"], torch.arange(3.0))
    assert kept.stat().st_mtime_ns == stamp, "nothing is written again"
    kept.write_bytes(b"broken")
    assert torch.equal(tensors(published, tmp_path, "inside")["w"], torch.arange(3.0)), "the pickle is still there"
    (folder / "a.pt").unlink()
    save_file({"w": torch.ones(1)}, kept)
    assert torch.equal(tensors(published, tmp_path, "inside")["w"], torch.ones(1))
    kept.write_bytes(b"broken")
    with pytest.raises(RewardError, match=r"a.safetensors is not a valid safetensors file .*: delete it and try again"):
        tensors(published, tmp_path, "inside")


@pytest.mark.parametrize(
    ("state", "sentence"),
    [
        ({"a": (2,), "b": (3, 1)}, ""),
        ({"a": (2,)}, "f.pt: b is missing"),
        ({"a": (2,), "b": (3, 1), "c": ()}, "f.pt: c is unknown"),
        ({"a": (2,), "b": (1, 3)}, r"f.pt: b has shape (1, 3), not (3, 1)"),
    ],
)
def test_a_checkpoint_has_the_weights_of_its_model_and_no_others(state: dict[str, Any], sentence: str) -> None:
    expected = {"a": torch.zeros(2), "b": torch.zeros(3, 1)}
    given = {name: torch.zeros(shape) for name, shape in state.items()}
    if not sentence:
        return checkpoint.check_names(expected, given, "f.pt")
    with pytest.raises(RewardError, match=f"^{re.escape(sentence)}$"):
        checkpoint.check_names(expected, given, "f.pt")


def test_what_cannot_be_kept_is_said_and_leaves_no_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(state: Any, path: Path, metadata: Any) -> None:
        Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(RewardError, match="x.safetensors cannot be written: .*No space left"):
        checkpoint.keep({}, tmp_path / "x.safetensors", "origin")
    assert list(tmp_path.iterdir()) == []

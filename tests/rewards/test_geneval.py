"""GenEval: its rules on detections by hand, its detector and colours against transformers' own and PIL."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    CLIPModel,
    CLIPTokenizer,
    Mask2FormerConfig,
    Mask2FormerForUniversalSegmentation,
    Mask2FormerImageProcessorPil,
    SwinConfig,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.mask2former import modeling_mask2former

from rewards.detector import detections, geneval, open_detector
from rewards.geneval import COLOURS, OBJECTS, Found, Task, Wanted, places, read, right
from rewards.interface import RewardError
from rewards.registry import find
from tests.rewards import published

BENCH, CAT = OBJECTS.index("bench"), OBJECTS.index("cat")


@pytest.mark.parametrize(
    ("prompt", "task"),
    [
        ("a photo of a bench", Task((Wanted("bench"),))),
        ("a photo of an orange orange", Task((Wanted("orange", colour="orange"),))),
        ("a photo of an orange", Task((Wanted("orange"),))),
        ("a photo of a tv remote and a tv", Task((Wanted("tv remote"), Wanted("tv")))),
        ("a photo of three buses", Task((Wanted("bus", 3),), counts=True)),
        ("a photo of four skises", Task((Wanted("skis", 4),), counts=True)),
        ("a photo of a dog right of a teddy bear", Task((Wanted("teddy bear"), Wanted("dog", position="right of")))),
        ("a photo of a red car and a blue bird", Task((Wanted("car", colour="red"), Wanted("bird", colour="blue")))),
    ],
)
def test_each_of_the_six_tasks_is_read(prompt: str, task: Task) -> None:
    assert read(prompt) == task and read(f" {prompt}.") == task


@pytest.mark.parametrize("prompt", ["a red heart", "a photo of five cats", "a photo of a red car and a bird", ""])
def test_another_prompt_is_refused(prompt: str) -> None:
    with pytest.raises(RewardError, match="is none of GenEval's: accepted are"):
        read(prompt)
    assert len(OBJECTS) == 80 and (OBJECTS[0], OBJECTS[-1], OBJECTS[67]) == ("person", "toothbrush", "cell phone")


def at(name: str, confidence: float, x: float = 0, y: float = 0, side: float = 10) -> Found:
    return Found(name, confidence, (x, y, x + side, y + side))


@pytest.mark.parametrize(
    ("prompt", "found", "holds"),
    [
        ("a photo of a cat", [at("cat", 0.31)], True),
        ("a photo of a cat", [at("cat", 0.3), at("dog", 0.99)], False),
        ("a photo of a cat and a dog", [at("cat", 0.5), at("dog", 0.4)], True),
        ("a photo of a cat and a dog", [at("cat", 0.5), at("cat", 0.4)], False),
        ("a photo of two cats", [at("cat", 0.95), at("cat", 0.91)], True),
        ("a photo of two cats", [at("cat", 0.95), at("cat", 0.89)], False),
        ("a photo of two cats", [at("cat", 0.95), at("cat", 0.91), at("cat", 0.92)], False),
        ("a photo of two cats", [at("cat", 0.95), at("cat", 0.91), at("cat", 0.89), at("dog", 0.99)], True),
        # Of two cats the surer one is asked, where it is and which colour it has.
        ("a photo of a cat left of a dog", [at("dog", 0.9, 50), at("cat", 0.5), at("cat", 0.4, 90)], True),
        ("a photo of a cat left of a dog", [at("dog", 0.9, 50), at("cat", 0.4), at("cat", 0.5, 90)], False),
        ("a photo of a cat left of a dog", [at("cat", 0.9)], False),
        # Of two dogs too: the cat is left of the surer one, and right of the other.
        ("a photo of a cat left of a dog", [at("dog", 0.9, 50), at("dog", 0.4, -90), at("cat", 0.5)], True),
        ("a photo of a red cat", [at("cat", 0.9, 1), at("cat", 0.5, 2)], True),
        ("a photo of a red cat", [at("cat", 0.5, 1), at("cat", 0.9, 2)], False),
        ("a photo of a red cat and a blue dog", [at("cat", 0.9, 1), at("dog", 0.9, 2)], True),
        ("a photo of a red cat and a blue dog", [at("cat", 0.9, 2), at("dog", 0.9, 1)], False),
    ],
)
def test_the_rules(prompt: str, found: list[Found], holds: bool) -> None:
    assert right(read(prompt), found, lambda one: {1.0: "red", 2.0: "blue"}.get(one.box[0], "pink")) is holds


def test_only_the_surest_sixteen_of_a_class_are_counted() -> None:
    many = [at("cat", 0.9 + at_ / 1000) for at_ in range(1, 30)]
    assert not right(read("a photo of four cats"), many, lambda one: "")
    assert right(Task((Wanted("cat", 16),), counts=True), many, lambda one: "")


@pytest.mark.parametrize(
    ("x", "y", "expected"),
    [
        (-30, 0, {"left of"}),
        (30, 0, {"right of"}),
        (0, -30, {"above"}),
        (0, 30, {"below"}),
        (1.9, 1.9, set()),  # within a tenth of both sides together, 2 px
        (2.1, 0, set()),  # 0.1 of 2.1 is left: no more than half
        (4.1, 0, {"right of"}),  # 2.1 of 4.1
        (30, 30, {"right of", "below"}),  # 28 / 42.4 = 0.66 of each
        (30, -17, {"right of"}),  # 15 / 34.5 = 0.43
    ],
)
def test_where_one_lies_seen_from_the_other(x: float, y: float, expected: set[str]) -> None:
    assert places(at("cat", 1, 100 + x, 100 + y), at("dog", 1, 100, 100)) == expected
    assert places(at("cat", 1, 100 + 2 * x, 100 + 2 * y, 20), at("dog", 1, 100, 100, 20)) == expected


def model(classes: int = 80) -> Mask2FormerForUniversalSegmentation:
    """Random, of the real class, whose loss alone wants scipy."""
    swin = SwinConfig(
        image_size=64, embed_dim=8, depths=[1, 1, 1, 1], num_heads=[1, 1, 1, 1], window_size=4,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )  # fmt: skip
    config = Mask2FormerConfig(
        backbone_config=swin, feature_size=32, mask_feature_size=32, hidden_dim=32, encoder_feedforward_dim=16,
        dim_feedforward=16, num_attention_heads=2, num_queries=12, encoder_layers=1, decoder_layers=3,
        num_labels=classes,
    )  # fmt: skip
    torch.manual_seed(3)
    with patch.object(modeling_mask2former, "requires_backends"):
        return Mask2FormerForUniversalSegmentation(config).eval()


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("files")
    model().save_pretrained(folder / "mask2former-swin-small-coco-instance")
    clip = CLIPModel(published.clip_config("quick_gelu"))
    published.randomise(clip, 4)
    clip.save_pretrained(folder / "clip-vit-large-patch14")
    published.write_vocabulary(folder / "clip-vit-large-patch14")
    return folder


def picture(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(5).integers(0, 256, (height, width, 3), dtype=np.uint8)


def test_detections_are_those_of_transformers_own_processor() -> None:
    """Where it reads pictures: at 384 x 384, which is all that it knows."""
    gen = torch.Generator().manual_seed(6)
    scores, coarse = 3 * torch.randn(12, 81, generator=gen), torch.randn(12, 6, 6, generator=gen)
    masks = torch.nn.functional.interpolate(coarse[None], (384, 384), mode="bilinear")[0]

    class Out:
        class_queries_logits, masks_queries_logits = scores[None], masks[None]

    [theirs] = Mask2FormerImageProcessorPil().post_process_instance_segmentation(
        Out, threshold=0.0, target_sizes=[(384, 384)], return_binary_maps=True
    )
    ours = sorted(detections(scores, masks), key=lambda one: -one.confidence)
    info = sorted(zip(theirs["segments_info"], theirs["segmentation"], strict=True), key=lambda one: -one[0]["score"])
    for (segment, mask), one in zip(info[:5], ours[:5], strict=True):
        assert OBJECTS[segment["label_id"]] == one.name and one.confidence == pytest.approx(segment["score"], abs=1e-4)
        assert one.mask is not None and np.array_equal(one.mask, mask.numpy() > 0)
        rows, columns = one.mask.any(1).nonzero()[0], one.mask.any(0).nonzero()[0]
        assert one.box == (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1)
    assert len(ours) > 12


@pytest.mark.parametrize("shape", [(48, 48), (40, 50)])
def test_a_picture_is_read_at_800_px_and_its_masks_are_its_own_size(files: Path, shape: tuple[int, int]) -> None:
    """The second one's width becomes 1,000, which is filled up to a multiple of 32."""
    whole, pixels = model(), picture(*shape)
    detector = open_detector(files / "mask2former-swin-small-coco-instance")
    width = 800 * shape[1] // shape[0]
    image = Image.fromarray(pixels).resize((width, 800), 2)
    mean, std = (np.array(one, np.float32) for one in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
    x = torch.from_numpy(((np.asarray(image, np.float32) / 255 - mean) / std).transpose(2, 0, 1).copy())[None]
    x = torch.nn.functional.pad(x, (0, -width % 32))
    with torch.no_grad():
        out = whole(x)
        masks = torch.nn.functional.interpolate(out.masks_queries_logits, x.shape[2:], mode="bilinear")
        masks = torch.nn.functional.interpolate(masks[..., :width], shape, mode="bilinear")[0]
        expected = detections(out.class_queries_logits[0], masks)
        found = detector.found(pixels)
    for one, other in zip(found[:8], expected[:8], strict=True):
        assert one.name == other.name and one.confidence == pytest.approx(other.confidence, abs=1e-4)
        assert one.mask is not None and other.mask is not None and one.mask.shape == shape
        assert (one.mask == other.mask).mean() > 0.99


@torch.no_grad()
def test_a_colour_is_clips_of_the_object_before_grey(files: Path) -> None:
    reward = geneval(files)
    clip = CLIPModel.from_pretrained(files / "clip-vit-large-patch14")
    tokenizer = CLIPTokenizer.from_pretrained(files / "clip-vit-large-patch14")
    processor = CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    named = []
    for seed in range(6):
        pixels = np.random.default_rng(seed).integers(0, 256, (40, 50, 3), dtype=np.uint8)
        pixels[..., seed % 3] //= 4
        mask = np.zeros((40, 50), bool)
        mask[5:30, 10:40] = np.random.default_rng(seed).random((25, 30)) > 0.3
        bench = Found("bench", 0.9, (10.0, 5.0, 40.0, 30.0), mask)
        crop = Image.fromarray(np.where(mask[..., None], pixels, 153).astype(np.uint8)).crop((10, 5, 40, 30))
        seen = clip.get_image_features(**processor(crop, return_tensors="pt")).pooler_output
        scores = []
        for colour in COLOURS:
            words = (f"{colour} bench", f"{colour}-colored bench", f"{colour} object")
            texts = [tokenizer(f"a photo of a {one}", return_tensors="pt") for one in words]
            said = [clip.get_text_features(**text).pooler_output[0] for text in texts]
            mean = torch.stack([vector / vector.norm() for vector in said]).mean(0)
            scores.append(float(seen[0] @ mean / mean.norm()))
        named.append(COLOURS[int(np.argmax(scores))])
        assert reward.colour(pixels, bench) == named[-1]
    assert len(set(named)) > 1


@torch.no_grad()
def test_the_sentences_about_a_colour_are_those_of_the_object(files: Path) -> None:
    """They are kept by the object's class: a cat's are not a bench's."""
    reward, fresh = geneval(files), geneval(files)
    bench, cat = reward._of_colours("bench"), reward._of_colours("cat")
    assert torch.equal(cat, fresh._of_colours("cat")) and torch.equal(bench, reward._of_colours("bench"))
    assert (bench - cat).abs().max() > 1e-3 and bench.shape == (len(COLOURS), cat.shape[1])
    torch.testing.assert_close(cat.norm(dim=1), torch.ones(len(COLOURS)))


def test_the_reward_is_1_where_the_task_is_met_and_reads_one_picture_after_the_other(files: Path) -> None:
    reward = find("geneval", files=files)
    assert not reward.differentiable
    with torch.no_grad():
        reward.detector.classes.weight.zero_()  # type: ignore[attr-defined]
        reward.detector.classes.bias.copy_(20.0 * torch.nn.functional.one_hot(torch.tensor(BENCH), 81))  # type: ignore[attr-defined]
    images = torch.stack([torch.rand(3, 48, 48, generator=torch.Generator().manual_seed(seed)) for seed in range(2)])
    names = {one.name for one in reward.detector.found(picture(48, 48)) if one.confidence > 0.3}  # type: ignore[attr-defined]
    assert names == {"bench"}
    assert reward.score(images, ["a photo of a bench", "a photo of a cat"]).tolist() == [1.0, 0.0]
    assert reward.score(images, ["a photo of a cat", "a photo of a bench"]).tolist() == [0.0, 1.0]
    with pytest.raises(RewardError, match="prompt 'a red heart' is none of GenEval's"):
        reward.score(images, ["a photo of a bench", "a red heart"])


def test_what_is_found_does_not_depend_on_the_type_that_a_run_computes_in(
    files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reward: Any = find("geneval", files=files)
    types: list[torch.dtype] = []

    def found(picture: np.ndarray) -> list[Found]:
        types.append((torch.ones(1, 1) @ torch.ones(1, 1)).dtype)
        return []

    monkeypatch.setattr(reward.detector, "found", found)
    with torch.autocast("cpu", torch.bfloat16):
        assert reward.score(torch.rand(1, 3, 8, 8), ["a photo of a bench"]).tolist() == [0.0]
    assert types == [torch.float32]


def test_another_model_is_refused(files: Path, tmp_path: Path) -> None:
    model(classes=3).save_pretrained(tmp_path)
    with pytest.raises(RewardError, match="has 3 classes: accepted are COCO's 80"):
        open_detector(tmp_path)
    folder = files / "mask2former-swin-small-coco-instance"
    state: dict[str, Tensor] = load_file(folder / "model.safetensors")
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    save_file({**state, "model.odd": torch.zeros(1)}, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(RewardError, match="odd is unknown"):
        open_detector(tmp_path)
    state.pop("model.transformer_module.queries_features.weight")
    save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(RewardError, match="queries_features.weight is missing"):
        open_detector(tmp_path)

"""DINOv2's features against transformers' own processor and network, and what a run reports of them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import BitImageProcessorPil, Dinov2Config, Dinov2Model, ViTConfig, ViTModel

from rewards.interface import RewardError
from student.bundle import read_student
from student.families.find import family_of
from tests.student.families import tiny
from tests.training.rats.test_families import run, settings
from training import features as module
from training.features import dinov2_features, open_dinov2, source
from training.steplog import read_log

# facebook/dinov2-base's preprocessor_config.json
PUBLISHED = {
    "size": {"shortest_edge": 256},
    "crop_size": {"height": 224, "width": 224},
    "resample": 3,
    "image_mean": [0.485, 0.456, 0.406],
    "image_std": [0.229, 0.224, 0.225],
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    torch.manual_seed(1)
    config = Dinov2Config(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, mlp_ratio=2, image_size=70, patch_size=14
    )
    network = Dinov2Model(config)
    with torch.no_grad():  # at its start every block's part is scaled by a small number, and says little
        for value in network.parameters():
            value.copy_(torch.randn_like(value) * 0.3)
    network.save_pretrained(tmp_path / "dinov2")
    return tmp_path / "dinov2"


@pytest.mark.parametrize("shape", [(64, 64), (300, 420), (512, 256)])
def test_features_are_the_class_token_of_the_published_processors_pixels(folder: Path, shape: tuple[int, int]) -> None:
    images = torch.rand(2, 3, *shape, generator=torch.Generator().manual_seed(2))
    network = open_dinov2(str(folder))
    as_bytes = [(one.permute(1, 2, 0).numpy() * 255).round().astype(np.uint8) for one in images]
    pixels = BitImageProcessorPil(**PUBLISHED)(as_bytes, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        expected = network(pixels).last_hidden_state[:, 0]
    found = dinov2_features(network, family_of(tiny.flux(), max_tokens=tiny.MAX_TOKENS))(images)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    assert (found[0] - found[1]).norm() > 1e-3


def test_a_videos_frames_lie_side_by_side(folder: Path) -> None:
    videos = torch.rand(2, 3, 3, 32, 32, generator=torch.Generator().manual_seed(3))
    features = dinov2_features(open_dinov2(str(folder)), family_of(tiny.flux(), max_tokens=tiny.MAX_TOKENS))
    each = torch.cat([features(videos[:, at]) for at in range(3)], 1)
    torch.testing.assert_close(features(videos), each, atol=1e-5, rtol=1e-4)


def test_something_else_than_a_whole_dinov2_is_refused(folder: Path, tmp_path: Path) -> None:
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    ViTModel(ViTConfig(**sizes)).save_pretrained(tmp_path / "vit")
    with pytest.raises(RewardError, match="is a model of type 'vit': accepted is 'dinov2'"):
        open_dinov2(str(tmp_path / "vit"))
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    weights.pop("layernorm.weight")
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(RewardError, match="lacks layernorm.weight: it is not complete"):
        open_dinov2(str(folder))


def test_a_users_own_files_are_found_by_the_models_name(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "files").mkdir()
    folder.rename(tmp_path / "files" / "dinov2-tiny")
    network = open_dinov2("someone/dinov2-tiny", tmp_path / "files")
    assert source(network).startswith("dinov2 ") and not any(p.requires_grad for p in network.parameters())
    with torch.no_grad():
        next(network.parameters()).add_(1)
    assert source(network) != source(open_dinov2("someone/dinov2-tiny", tmp_path / "files"))


def test_a_run_reports_it_beside_the_latents_and_nothing_depends_on_it(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("training.evaluate.CACHE", tmp_path / "cache")
    outs = {}
    for name in ("", str(folder)):
        outs[name] = tmp_path / f"out-{bool(name)}"
        more = settings(tmp_path, "flux", steps=2, lora_rank=2, **{"validation.dinov2": name})
        code, text = run("--out", str(outs[name]), *more)
        assert code == 0, text
    plain, out = outs.values()
    rows = [read_log(where / "run" / "log.jsonl") for where in (plain, out)]
    figures = ["loss", "grad_norm", "heldout_validation", "diversity_validation", "best_at"]
    assert [[row.get(name) for name in figures] for row in rows[0]] == [
        [row.get(name) for name in figures] for row in rows[1]
    ]
    validated = [row for row in rows[1] if "heldout_validation" in row]
    assert validated and all(1 <= row["diversity_dinov2_validation"] <= 8 for row in validated)
    assert not any("diversity_dinov2_validation" in row for row in rows[0])
    for row in read_student(out).evaluation:
        mean = row["diversity_dinov2"]["mean"]
        assert mean != pytest.approx(row["diversity"]["mean"], abs=1e-6)
        assert row["diversity_dinov2"]["error"] > 0 and 1 < mean < 8
    card = (out / "README.md").read_text()
    assert "| diversity | diversity (DINOv2) |" in card and "on autoencoder latents, diversity (DINOv2) that" in card
    assert "DINOv2" not in (plain / "README.md").read_text().partition("```json")[0]


@pytest.mark.parametrize("name", ["flux", "wan"])
def test_latents_as_features_are_the_autoencoders_mean_of_any_number_of_pictures(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is drawn: two looks at a picture are the same; of a video its frames' lie side by side."""
    monkeypatch.setattr(module, "PIXELS_AT_ONCE", 2 * 32 * 32)
    model = family_of(tiny.MAKERS[name](), max_tokens=tiny.MAX_TOKENS)
    images = torch.rand(5, 3, 32, 32, generator=torch.Generator().manual_seed(2))
    x = images * 2 - 1
    encode, sizes = model.vae.encode, []
    with torch.no_grad():
        expected = torch.cat([encode(one[None, :, None] if name == "wan" else one[None]).latent_dist.mean for one in x])
    monkeypatch.setattr(model.vae, "encode", lambda part: (sizes.append(len(part)), encode(part))[1])
    features = module.latent_features(model)
    found = features(images)
    torch.testing.assert_close(found, expected.flatten(1), rtol=1e-4, atol=1e-5)
    assert torch.equal(found, features(images)) and found.dtype == torch.float32 and not found.requires_grad
    assert sizes == [2, 2, 1] * 2, "no more at once than there is room for"
    video = torch.stack([images[:2], images[2:4]])
    torch.testing.assert_close(features(video), torch.stack([found[:2].flatten(), found[2:4].flatten()]))


def test_large_pictures_are_encoded_one_by_one_and_small_ones_at_most_64_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, sizes = family_of(tiny.flux(), max_tokens=tiny.MAX_TOKENS), []
    monkeypatch.setattr(module, "_latents", lambda _, part: (sizes.append(len(part)), part.flatten(1)[:, :1])[1])
    for num, side in ((3, 4096), (17, 512), (130, 8)):
        module.latent_features(model)(torch.zeros(num, 3, side, side, device="meta"))
    assert sizes == [1, 1, 1, 16, 1, 64, 64, 2]

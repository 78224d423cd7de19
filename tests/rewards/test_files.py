"""Where published files are looked for, and what is said when they are nowhere."""

from __future__ import annotations

import hashlib
from pathlib import Path

import huggingface_hub.constants
import pytest

from rewards.files import Published, locate
from rewards.interface import RewardError
from rewards.registry import SHIPPED, find


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))


def test_the_users_folder_comes_first(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "a.bin").touch()
    assert locate(Published("owner/model", ("a.bin",)), tmp_path) == tmp_path / "model"


@pytest.mark.parametrize("there", [("a.bin",), ("b.bin",)])
def test_a_folder_that_lacks_one_of_several_files_is_not_taken_and_each_of_them_is_asked_for(
    there: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "model").mkdir()
    for name in there:
        (tmp_path / "model" / name).touch()
    asked = list[tuple[str, str]]()

    def download(repo: str, name: str) -> str:
        asked.append((repo, name))
        return str(tmp_path / "hub" / name)

    monkeypatch.setattr("rewards.files.hf_hub_download", download)
    assert locate(Published("owner/model", ("a.bin", "b.bin")), tmp_path) == tmp_path / "hub"
    assert asked == [("owner/model", "a.bin"), ("owner/model", "b.bin")]


def test_the_hubs_cache_comes_second(tmp_path: Path) -> None:
    commit = "a" * 40
    snapshot = tmp_path / "hub" / "models--owner--model" / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (snapshot / "a.bin").touch()
    refs = tmp_path / "hub" / "models--owner--model" / "refs"
    refs.mkdir()
    (refs / "main").write_text(commit)
    assert locate(Published("owner/model", ("a.bin",)), tmp_path) == snapshot


@pytest.mark.parametrize(
    ("name", "file", "page", "folder"),
    [
        ("pickscore", "model.safetensors", "huggingface.co/yuvalkirstain/PickScore_v1", "PickScore_v1"),
        ("hpsv2.1", "HPS_v2.1_compressed.pt", "huggingface.co/xswu/HPSv2", "HPSv2"),
        ("imagereward", "ImageReward.pt", "huggingface.co/zai-org/ImageReward", "ImageReward"),
        ("clip", "model.safetensors", "huggingface.co/openai/clip-vit-large-patch14", "clip-vit-large-patch14"),
        ("aesthetic", "model.safetensors", "huggingface.co/openai/clip-vit-large-patch14", "clip-vit-large-patch14"),
    ],
)
def test_without_files_and_network_one_sentence_says_what_goes_where(
    name: str, file: str, page: str, folder: str, tmp_path: Path
) -> None:
    assert name in SHIPPED
    with pytest.raises(RewardError) as caught:
        find(name, files=tmp_path)
    sentence = str(caught.value)
    assert file in sentence and f"https://{page} " in sentence and sentence.endswith(f"into {tmp_path / folder}")
    assert "\n" not in sentence and ". " not in sentence


def test_a_file_by_address_is_fetched_and_held_to_its_hash(tmp_path: Path) -> None:
    original = tmp_path / "original.bin"
    original.write_bytes(b"weights")
    sha256 = hashlib.sha256(b"weights").hexdigest()
    files = tmp_path / "files"
    folder = locate(Published("owner/head", ("head.pth",), original.as_uri(), sha256), files)
    assert (folder / "head.pth").read_bytes() == b"weights"
    original.write_bytes(b"changed")
    with pytest.raises(RewardError, match=r"head.pth of https://github.com/owner/other cannot be downloaded .*put it"):
        locate(Published("owner/other", ("head.pth",), original.as_uri(), sha256), files)
    assert list((files / "other").iterdir()) == []

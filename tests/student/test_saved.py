"""Which variant of a pipeline's weights is opened, and which files are refused, by their names and first bytes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from student import saved
from student.bundle import BundleError
from student.saved import check_files, components, variant_of

INDEX: dict[str, Any] = {
    "_class_name": "X", "_name_or_path": ["a", "b"][0], "transformer": ["d", "T"], "vae": ["d", "V"],
    "text_encoder_3": [None, None], "flag": False,
}  # fmt: skip
PLAIN, SHARDS = "model.safetensors", ("model-00001-of-00002{}.safetensors", "model{}-00002-of-00002.safetensors")
CASES: list[tuple[dict[str, tuple[str, ...]], str | None]] = [
    ({"transformer": (PLAIN,), "vae": (PLAIN,)}, None),
    ({"transformer": (PLAIN, "model.fp16.safetensors"), "vae": (PLAIN,)}, None),
    ({"transformer": (PLAIN,), "vae": ("model.fp16.safetensors",)}, "fp16"),
    ({"transformer": ("model.fp16.safetensors", "model.bf16.safetensors"), "vae": (PLAIN,)}, "bf16"),
    ({"transformer": ("model.fp16.safetensors",), "vae": ("model.bf16.safetensors",)}, "bf16"),
    ({"transformer": ("model.ema.safetensors",), "vae": ("model.fp16.safetensors",)}, "fp16"),
    ({"transformer": ("model.non_ema.safetensors", "model.ema.safetensors"), "vae": (PLAIN,)}, "ema"),
    ({"transformer": tuple(name.format("") for name in SHARDS), "vae": (PLAIN,)}, None),
    ({"transformer": tuple(name.format(".fp16") for name in SHARDS), "vae": (PLAIN,)}, "fp16"),
    ({"transformer": ("model-00001-of-00001.fp16.safetensors",), "vae": (PLAIN,)}, "fp16"),
    ({"transformer": ("model.fp16-00001-of-00001.safetensors",), "vae": (PLAIN,)}, "fp16"),
    ({"transformer": ("model.fp16.safetensors",), "transformer_2": (PLAIN,), "vae": (PLAIN,)}, "fp16"),
    ({"transformer": ("config.json", "model.bin"), "vae": (PLAIN,)}, None),
    ({"text_encoder_3": ("model.fp16.safetensors",), "vae": (PLAIN,), "transformer": (PLAIN,)}, None),
    ({"transformer_2": ("model.fp16.safetensors",), "vae": (PLAIN,), "transformer": (PLAIN,)}, None),
]


def paths(there: dict[str, tuple[str, ...]]) -> list[str]:
    return [f"{part}/{name}" for part, names in there.items() for name in names]


@pytest.mark.parametrize(("there", "variant"), CASES)
def test_a_variant_is_opened_where_a_part_has_no_plain_weights(
    there: dict[str, tuple[str, ...]], variant: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in paths(there):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert variant_of(tmp_path, INDEX) == variant
    monkeypatch.setattr(saved, "list_repo_files", lambda model: paths(there) if model == "owner/name" else [])
    assert variant_of("owner/name", INDEX, local_files_only=False) == variant
    asked: list[Any] = []

    def cached(model: str, **options: Any) -> str:
        asked.append((model, options["local_files_only"]))
        return str(tmp_path)

    monkeypatch.setattr(saved, "snapshot_download", cached)
    assert variant_of("owner/name", INDEX) == variant and asked == [("owner/name", True)]


def test_a_hub_that_is_away_says_nothing_of_variants(monkeypatch: pytest.MonkeyPatch) -> None:
    def away(*model: str, **options: Any) -> list[str]:
        raise OSError("no network")

    for name in ("list_repo_files", "snapshot_download"):
        monkeypatch.setattr(saved, name, away)
    for local in (True, False):
        assert variant_of("owner/name", INDEX, local) is None


def test_components_are_the_pairs_that_are_not_none() -> None:
    assert list(components(INDEX)) == ["transformer", "vae"]
    assert list(components({"a": ["x"], "b": ["x", "Y", "z"], "c": "xY", "d": [None, "Y"]})) == ["d"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for part in ("transformer", "vae"):
        (tmp_path / part).mkdir()
        (tmp_path / part / "model.safetensors").write_bytes(bytes(2000))
    return tmp_path


@pytest.mark.parametrize("ending", [".bin", ".pt", ".pth", ".ckpt"])
def test_a_pickle_is_refused_only_where_it_is_all_there_is(folder: Path, ending: str) -> None:
    pickle = folder / "vae" / f"model{ending}"
    pickle.write_bytes(bytes(2000))
    check_files(folder, INDEX)
    (folder / "vae" / "model.safetensors").unlink()
    with pytest.raises(BundleError, match=f"^{pickle} is a pickle, which may run code as it is read"):
        check_files(folder, INDEX)
    check_files(folder, INDEX, given=["vae"])


@pytest.mark.parametrize(("size", "refused"), [(135, True), (1023, True), (1024, False)])
def test_a_small_file_that_begins_as_a_pointer_is_one(folder: Path, size: int, refused: bool) -> None:
    file = folder / "vae" / "words.txt"
    file.write_bytes(b"version https://git-lfs.github.com/spec/v1\n".ljust(size, b"x"))
    if not refused:
        check_files(folder, INDEX)
        return
    with pytest.raises(BundleError, match=f"^{file} is a Git LFS pointer, not the file itself"):
        check_files(folder, INDEX)


def test_a_configuration_of_any_size_is_plain_json(folder: Path) -> None:
    file = folder / "transformer" / "config.json"
    file.write_bytes(b"\xef\xbb\xbf{}".ljust(5000))
    with pytest.raises(BundleError, match=f"^{file} begins with a byte order mark"):
        check_files(folder, INDEX)

"""How the parts of an adopted pipeline are written: linked under plain names, or anew in the type that they had."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file, save_file

from export import parts
from export.lora import Lora
from export.parts import _link_weights, _stored_type, rewrites, write_pipeline
from export.single_file import find_model
from export.source import Source, Weights, hollow_pipeline
from tests.export.adopting import a_lora, edit, published, schnell
from tests.student.families import tiny


@pytest.mark.parametrize(
    ("sizes", "dtype"),
    [
        ({"bfloat16": 9, "float32": 4}, torch.bfloat16),
        ({"bfloat16": 7, "float32": 4}, torch.float32),  # in bytes
        ({"float16": 9, "bfloat16": 8}, torch.float16),
        ({"float32": 1}, torch.float32),
        ({"int64": 9, "bfloat16": 1}, torch.float32),
        ({}, torch.float32),
    ],
)
def test_the_type_is_that_of_most_bytes_over_all_files(
    sizes: dict[str, int], dtype: torch.dtype, tmp_path: Path
) -> None:
    files = []
    for name, count in sizes.items():
        for half in (count // 2, count - count // 2):
            files.append(tmp_path / f"{name}-{len(files)}.safetensors")
            save_file({"x": torch.zeros(half, dtype=getattr(torch, name))}, files[-1])
    assert _stored_type(Weights(tuple(files))) is dtype


def test_only_what_is_merged_or_of_a_single_file_is_written_anew(tmp_path: Path) -> None:
    plain, single = (Source("a", tmp_path, {}, {}, base) for base in ("", "its pipeline"))
    assert [rewrites(plain, ()), rewrites(plain, (Lora("x"),)), rewrites(single, ())] == [False, True, True]


@pytest.fixture
def halves(tmp_path: Path) -> Path:
    """A pipeline in bf16 as a variant, its transformer in shards, and configurations that say more than they should."""
    folder = published(tmp_path / "half", schnell().to(torch.bfloat16), variant="bf16", max_shard_size="20KB")
    edit(folder / "text_encoder" / "config.json", lambda c: c.update(dtype="bfloat16", _name_or_path="/home/me"))
    edit(folder / "text_encoder_2" / "config.json", lambda c: (c.pop("dtype", None), c.update(torch_dtype="bfloat16")))
    edit(folder / "model_index.json", lambda c: c.update(_name_or_path="/home/me"))
    return folder


def test_linked_weights_have_plain_names_and_their_configuration_says_float32(halves: Path, tmp_path: Path) -> None:
    source = find_model(str(halves))
    for name in ("transformer", "text_encoder", "text_encoder_2"):
        (tmp_path / name).mkdir()
        _link_weights(source, name, tmp_path / name)
        theirs, ours = sorted((halves / name).iterdir()), sorted((tmp_path / name).iterdir())
        assert [path.name for path in ours] == sorted(path.name.replace(".bf16", "") for path in theirs)
        kept = {path.stat().st_ino for path in theirs if path.suffix == ".safetensors"}
        assert {path.stat().st_ino for path in ours if path.suffix == ".safetensors"} == kept
    index = json.loads((tmp_path / "transformer" / "diffusion_pytorch_model.safetensors.index.json").read_text())
    assert all((tmp_path / "transformer" / file).is_file() for file in index["weight_map"].values())
    assert (
        not any("bf16" in file for file in index["weight_map"].values()) and len(set(index["weight_map"].values())) > 1
    )
    first, second = (json.loads((tmp_path / f"text_encoder{n}" / "config.json").read_text()) for n in ("", "_2"))
    assert first["dtype"] == second["torch_dtype"] == "float32" and "_name_or_path" not in first
    assert first["hidden_size"] == json.loads((halves / "text_encoder" / "config.json").read_text())["hidden_size"]


def written(source: Source, loras: list[Lora], folder: Path) -> list[str]:
    said: list[str] = []
    folder.mkdir()
    write_pipeline(source, loras, hollow_pipeline(source), folder, said.append)
    return said


def test_a_pipeline_is_written_with_a_schedule_that_does_not_shift_and_without_where_it_lay(
    halves: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    assert written(find_model(str(halves)), [], out) == []
    index = json.loads((out / "model_index.json").read_text())
    expected = json.loads((halves / "model_index.json").read_text())
    expected.pop("_name_or_path")
    assert index == {**expected, "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"]}
    assert json.loads((out / "scheduler" / "scheduler_config.json").read_text())["shift"] == 1.0
    assert sorted(path.name for path in out.iterdir() if path.is_dir()) == sorted(
        name for name, value in index.items() if isinstance(value, list) and value != [None, None]
    )
    pipe = DiffusionPipeline.from_pretrained(out)
    assert pipe.tokenizer("a red heart").input_ids == schnell().tokenizer("a red heart").input_ids


def test_a_merged_transformer_keeps_the_type_that_it_had_and_each_lora_is_said(halves: Path, tmp_path: Path) -> None:
    """Of a variant in shards, too."""
    save_file(a_lora(schnell()), tmp_path / "one.safetensors")
    loras = [Lora(str(tmp_path / "one.safetensors"), 0.5), Lora(str(tmp_path / "one.safetensors"), -0.25)]
    said = written(find_model(str(halves)), loras, tmp_path / "out")
    assert [line.partition(" into ")[0] for line in said] == [
        "merged one.safetensors with weight 0.5",
        "merged one.safetensors with weight -0.25",
    ]
    after = load_file(tmp_path / "out" / "transformer" / "diffusion_pytorch_model.safetensors")
    before = schnell().to(torch.bfloat16).transformer.state_dict()
    assert {value.dtype for value in after.values()} == {torch.bfloat16} and after.keys() == before.keys()
    factors = a_lora(schnell())
    for name, value in before.items():
        change = torch.zeros(value.shape)
        if f"transformer.{name.removesuffix('.weight')}.lora_A.weight" in factors:
            layer = f"transformer.{name.removesuffix('.weight')}"
            change = 0.25 * factors[f"{layer}.lora_B.weight"] @ factors[f"{layer}.lora_A.weight"]
        torch.testing.assert_close(after[name].float(), value.float() + change, atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_single_file_is_read_in_the_type_that_it_is_in(
    dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = published(tmp_path / "sd3", tiny.sd3())
    file = tmp_path / "tuned.safetensors"
    save_file({key: value.to(dtype) for key, value in tiny.sd3(seed=2).transformer.state_dict().items()}, file)
    source = find_model(str(file), str(base))
    asked: list[Any] = []
    real: Callable[..., Any] = parts.open_checkpoint
    monkeypatch.setattr(parts, "open_checkpoint", lambda *given: (asked.append(given[2]), real(*given))[1])
    assert written(source, [], tmp_path / "out") == ["read tuned.safetensors as sd3's transformer"]
    kept = load_file(tmp_path / "out" / "transformer" / "diffusion_pytorch_model.safetensors")
    assert asked == [dtype] and {value.dtype for value in kept.values()} == {dtype}

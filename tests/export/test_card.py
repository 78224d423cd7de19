"""The model card of a student that is exported or adopted, line by line."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from export.card import HEAD, add_rewards_to_card, adopted_card, front_matter, licence, row_of, update_card
from export.compile import Made, Outcome
from export.lora import Lora
from export.source import MULTISTEP, Source
from student.bundle import ImageSize, Scorer
from student.runtimes.manifest import Change, Graph, Parity, RuntimeManifest
from tests import tiny


def _graph(file: str, data: str = "") -> Graph:
    return Graph(file, "0", (), {}, {}, data=data)


def _outcome(bundle: Path, name: str, **fields: Any) -> Outcome:
    """A runtime of one graph of 1.2 MB with 0.5 MB of weights beside it, and a decoder of 0.3 MB; made in 61.6 s."""
    folder = bundle / "runtimes" / name
    folder.mkdir(parents=True)
    for file, size in (("2.onnx", 1_200_000), ("2.data", 500_000), ("decoder.onnx", 300_000), ("other", 9_000_000)):
        (folder / file).write_bytes(bytes(size))
    graphs, stages = {2: _graph("2.onnx", "2.data")}, {"decoder": _graph("decoder.onnx")}
    found: dict[str, Any] = {"graphs": graphs, "stages": stages, "parity": {}, **fields}
    manifest = RuntimeManifest(name, "staged", "fp32", "tiny 1", "0", opset=18, versions={}, **found)
    return Outcome(folder, manifest, (Made("2-steps", 1, 60.4, False), Made("decoder", 1, 1.2, False)))


def test_a_row_has_the_bytes_of_every_file_and_the_worst_of_every_step_count(tmp_path: Path) -> None:
    parity = {
        2: Parity({1: 1e-5, 8: 3e-5}, 1e-3, psnr_db=71.2, reward={"a": Change(0.02, 0.001, 8), "b": Change(-9, 1, 8)}),
        4: Parity({1: 2e-5}, 1e-3, psnr_db=64.8, reward={"a": Change(-0.0123, 0.0045, 16)}),
    }
    row = row_of(_outcome(tmp_path, "onnx", parity=parity))
    assert row == "| onnx | 2.0 MB | 62 s | 3.0e-05 | 65 dB | -0.0123 ± 0.0045 (16 prompts) |"
    none = {2: replace(parity[2], reward={}, psnr_db=None)}
    assert row_of(_outcome(tmp_path, "a", parity=none)) == "| a | 2.0 MB | 62 s | 3.0e-05 | 0 dB | - |"
    assert row_of(_outcome(tmp_path, "b")) == "| b | 2.0 MB | 62 s | not verified | - | - |"


def test_a_row_goes_when_its_runtime_is_removed_and_what_stands_around_the_table_stays(tmp_path: Path) -> None:
    card = tmp_path / "README.md"
    update_card(tmp_path, one := _outcome(tmp_path, "onnx"))
    assert not card.exists()
    card.write_text("# tiny\n\n## Runtimes\n\n| removed | - |\n\n## Use\n\n| a | table |\n")
    update_card(tmp_path, replace(one, made=()))
    assert "| removed |" in card.read_text()
    for outcome in (one, _outcome(tmp_path, "another"), one):
        update_card(tmp_path, outcome)
    rows = [row_of(replace(one, manifest=replace(one.manifest, name=name))) for name in ("another", "onnx")]
    table = "\n".join((*HEAD, *rows))
    assert card.read_text() == f"# tiny\n\n## Runtimes\n\n{table}\n\n## Use\n\n| a | table |\n"


def test_the_table_of_scores_has_each_scorers_own_numbers(tmp_path: Path) -> None:
    scorers = {
        "ours": Scorer("scorers/ours.onnx", 0.123456, 0.0234567, "trained"),
        "theirs": Scorer("scorers/theirs.onnx", -1.5, 2.0, "heldout", reward="pickscore"),
    }
    student = tiny.student(scorers)
    add_rewards_to_card(tmp_path, student)
    card = tmp_path / "README.md"
    assert not card.exists()
    card.write_text("# tiny\n\ntext\n\n## Runtimes\n\nnone\n")
    add_rewards_to_card(tmp_path, replace(student, scorers={}))
    assert card.read_text() == "# tiny\n\ntext\n\n## Runtimes\n\nnone\n"
    for _ in range(2):
        add_rewards_to_card(tmp_path, student)
        before, _, after = card.read_text().partition("\n## Rewards\n")
        assert before.count("## Runtimes") + after.count("## Runtimes") == 1 and "text" in before
        assert [line for line in after.splitlines() if line.startswith("| ")] == [
            "| scorer | reward | raw mean on its own pictures (0) | standard deviation (1) |",
            "| ours | scorers/ours.onnx | 0.12346 | 0.02346 |",
            "| theirs | pickscore | -1.5 | 2 |",
        ]


@pytest.mark.parametrize(
    ("front", "terms", "expected"),
    [
        ("license: apache-2.0", "", "apache-2.0"),
        ("license: apache-2.0\nlicense_name: x", "", "apache-2.0"),
        ("license: other\nlicense_name: flux-1-dev", "", "flux-1-dev"),
        ("license: other", "", "other"),
        ("license: 'mit'  ", "", "mit"),
        ("tags: [a]", "", "unknown"),
        ("tags: [a]", "LICENSE.md", "see LICENSE"),
        ("tags: [a]", "LICENSE", "see LICENSE"),
        ("tags: [a]", "LICENSE.txt", "see LICENSE"),
        ("tags: [a]", "NOTICE", "see LICENSE"),
    ],
)
def test_the_licence_is_the_one_that_the_authors_card_names(
    tmp_path: Path, front: str, terms: str, expected: str
) -> None:
    (tmp_path / "README.md").write_text(f"---\n{front}\n---\n# model\nlicense: not this\n")
    if terms:
        (tmp_path / terms).write_text("terms")
    assert licence(Source("m", tmp_path, {}, {})) == expected


def test_front_matter_is_the_plain_lines_between_the_rules(tmp_path: Path) -> None:
    card = tmp_path / "README.md"
    assert front_matter(card) == {}
    card.write_text("# no front\nlicense: mit\n")
    assert front_matter(card) == {}
    card.write_text('---\nlicense: "mit"\ntags:\n- license: x\nlicense_link:  https://a.b/c \n---\nlicense: gpl\n')
    assert front_matter(card) == {"license": "mit", "license_link": "https://a.b/c"}


def test_an_adopted_card_says_origin_terms_sampling_and_limits(tmp_path: Path) -> None:
    front = "license: other\nlicense_name: terms\nlicense_link: https://a.b\nbase_model: older"
    (tmp_path / "README.md").write_text(f"---\n{front}\n---\n")
    student = replace(tiny.student({}), sigmas={4: (1.0, 0.75, 0.5, 1 / 3), 2: (1.0, 2 / 3)})
    source = Source("model", tmp_path, {"scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"]}, {})
    assert adopted_card(source, (Lora("gone/a.safetensors", -0.5),), student).split("\n") == [
        "---",
        "license: other",
        "license_name: terms",
        "license_link: https://a.b",
        "library_name: diffusers",
        "pipeline_tag: text-to-image",
        "base_model: model",
        "tags:",
        "- fewstep",
        "---",
        "",
        "# tiny",
        "",
        "model, adopted by fewstep without any training.",
        "Merged into it: gone/a.safetensors, weight -0.5.",
        "Licence: terms, according to its authors' card; it applies to this copy too.",
        "",
        "| steps | sigmas of its own scheduler |",
        "|---|---|",
        "| 4 | 1, 0.75, 0.5, 0.333333 |",
        "| 2 | 1, 0.666667 |",
        "",
        f"It generates 64x64 pixels, with no guidance and prompts of up to {student.max_tokens} tokens.",
        "",
    ]


@pytest.mark.parametrize(("frames", "said"), [(1, "1 frame,"), (9, "9 frames,")])
def test_an_adopted_videos_card_has_its_length_its_base_and_its_replaced_scheduler(
    tmp_path: Path, frames: int, said: str
) -> None:
    picture = tiny.student({})
    student = replace(
        picture,
        latents=replace(picture.latents, frames=1),
        image=ImageSize(32, 64, frames, 16),
        baked={"guidance_scale": 1.0, "shift": 3.5},
    )
    source = Source("a.safetensors", tmp_path, {"scheduler": ["diffusers", MULTISTEP]}, {}, base="wan")
    text = adopted_card(source, (), student)
    assert "\npipeline_tag: text-to-video\nbase_model: wan\n" in text and "\nlicense" not in text
    assert "\nEverything but its transformer is that of wan.\nLicence: unknown, " in text
    assert "\nIts UniPC steps are replaced by Euler steps at the same sigmas.\n\n| steps |" in text
    assert f"It generates 64x32 pixels and {said} played at 16 a second, with guidance_scale 1, shift 3.5 and" in text

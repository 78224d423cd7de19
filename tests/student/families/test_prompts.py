"""How many tokens of a prompt count, against what transformers' own tokenizer gives the family's encoder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from student.bundle import BundleError
from student.families.find import family_of
from student.prompts import CHATS, token_counter
from tests.student.families import tiny

LONG = 200


def read_by_the_encoder(pipe: Any, family: str, prompt: str) -> int:
    """The tokens that stand before the padding where there is room for all of them."""
    *others, last = family_of(pipe, max_tokens=LONG).tokenise([prompt])
    if others and family in (*CHATS, "wan"):
        return int(last.sum()) - (CHATS[family].dropped if family in CHATS else 0)  # the mask
    return int(last.ne(0).sum())  # T5 pads with 0


@pytest.mark.parametrize("name", sorted(tiny.MAKERS))
def test_every_token_that_the_encoder_reads_counts(name: str, tmp_path: Path) -> None:
    pipe = tiny.MAKERS[name]()
    family = family_of(pipe).name
    for part, tokenizer in pipe.components.items():
        if part.startswith("tokenizer") and tokenizer is not None:
            tokenizer.save_pretrained(tmp_path / part)
    count = token_counter(tmp_path, family)
    for prompt in (
        "a red heart",
        "a red heart above a blue star",
        "",
        "Ring &amp; circle,   left of it",
        "a &amp;lt; b",
    ):
        assert count(prompt) == read_by_the_encoder(pipe, family, prompt), prompt


@pytest.mark.parametrize("name", sorted(tiny.MAKERS))
def test_a_prompt_is_cut_where_it_has_more_tokens_than_count(name: str, tmp_path: Path) -> None:
    """Training says of the same prompts that they are cut which a service refuses."""
    pipe = tiny.MAKERS[name]()
    for part, tokenizer in pipe.components.items():
        if part.startswith("tokenizer") and tokenizer is not None:
            tokenizer.save_pretrained(tmp_path / part)
    model = family_of(pipe, max_tokens=40)
    count = token_counter(tmp_path, model.name)
    prompts = ["".join("abcdefghij"[i % 10] for i in range(length)) for length in range(45)]
    expected = [count(prompt) > 40 for prompt in prompts]
    assert model.cuts(prompts) == expected and {True, False} == set(expected)
    assert (model.most_tokens, model.max_tokens) == (40, 40), "it is asked about more, and stays as it was"


def test_without_t5_a_prompt_is_cut_where_clip_ends() -> None:
    """Letter by letter, with the marks of start and end."""
    model = family_of(tiny.sd3(with_t5=False))
    assert model.most_tokens == tiny.CLIP_TOKENS < model.max_tokens
    assert model.cuts(["", "a" * (tiny.CLIP_TOKENS - 2), "a" * (tiny.CLIP_TOKENS - 1)]) == [False, False, True]


@pytest.mark.parametrize("name", ["flux", "flux2", "wan"])
def test_a_tokenizer_that_was_saved_as_it_cuts_and_pads_counts_all_the_same(name: str, tmp_path: Path) -> None:
    pipe = tiny.MAKERS[name]()
    for part, tokenizer in pipe.components.items():
        if part.startswith("tokenizer"):
            tokenizer.save_pretrained(tmp_path / part)
    plain = token_counter(tmp_path, name)
    expected = [plain(prompt) for prompt in ("", "a red heart above a blue star")]
    for file in tmp_path.glob("*/tokenizer.json"):
        saved = Tokenizer.from_file(str(file))
        saved.enable_truncation(5)
        saved.enable_padding(length=64)
        saved.save(str(file))
    count = token_counter(tmp_path, name)
    assert [count(prompt) for prompt in ("", "a red heart above a blue star")] == expected
    assert 5 < expected[1] < 64 and expected[0] < expected[1]


def test_a_bundle_without_its_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="tokenizer.json is missing: without it a prompt's tokens cannot be counted"):
        token_counter(tmp_path, "wan")
    with pytest.raises(BundleError, match="family is 'fake': accepted are flux"):
        token_counter(tmp_path, "fake")

"""Token ids without transformers, against the ids that diffusers' pipeline feeds its encoders."""

from pathlib import Path

import numpy as np
import pytest
from diffusers import FluxPipeline

from student.tokens import PromptTokens
from tests import tiny


@pytest.fixture(scope="module")
def tokens(bundle: Path) -> PromptTokens:
    return PromptTokens(bundle, tiny.MAX_TOKENS)


def test_equal_to_what_the_pipeline_feeds_its_encoders(bundle: Path, tokens: PromptTokens) -> None:
    """Both encoders are spied upon while the pipeline itself encodes the prompts."""
    pipe = FluxPipeline.from_pretrained(bundle)
    seen: dict[str, np.ndarray] = {}
    for name in ("text_encoder", "text_encoder_2"):
        encoder = getattr(pipe, name)
        encoder.register_forward_pre_hook(lambda m, args, name=name: seen.update({name: args[0].numpy()}))
    pipe.encode_prompt(list(tiny.PROMPTS), max_sequence_length=tiny.MAX_TOKENS)
    ids_clip, ids_t5 = tokens.encode(tiny.PROMPTS)
    np.testing.assert_array_equal(ids_clip, seen["text_encoder"])
    np.testing.assert_array_equal(ids_t5, seen["text_encoder_2"])
    np.testing.assert_array_equal(tokens.encode_clip(tiny.PROMPTS), ids_clip)


def test_words_by_hand(tokens: PromptTokens) -> None:
    vocabulary = {word: i for i, word in enumerate([*tiny.SPECIALS, *tiny.WORDS])}
    ids = tokens.encode(["A red ZEBRA"])[0]
    words = ["a", "red", "<unk>", "<eos>"] + ["<pad>"] * (tiny.CLIP_TOKENS - 4)
    assert ids.dtype == np.int64
    assert ids.tolist() == [[vocabulary[word] for word in words]]


def test_long_and_empty_prompts_have_the_same_length(tokens: PromptTokens) -> None:
    for ids, length in zip(tokens.encode(["red " * 400, ""]), (tiny.CLIP_TOKENS, tiny.MAX_TOKENS), strict=True):
        assert ids.shape == (2, length)
        assert ids[0, -1] == 1 and set(ids[0, :-1]) == {3 + tiny.WORDS.index("red")}
        assert ids[1].tolist() == [1] + [0] * (length - 1)


def test_no_prompts(tokens: PromptTokens) -> None:
    assert tokens.encode([])[1].shape == (0, tiny.MAX_TOKENS)


def test_a_prompt_does_not_depend_on_its_batch_mates(tokens: PromptTokens) -> None:
    alone = tokens.encode(["star"])[0]
    np.testing.assert_array_equal(tokens.encode(["red " * 50, "star"])[0][1:], alone)

"""The starter world's tokenizers: one word, one token; what the world does not know is ``<unk>``.

A word of the first of two objects has a token of its own (``red`` before a relation is ``red:1``), so that which
object is which need not be read from word order. Whether that is enough is open: see docs/experiments.md.
"""

from __future__ import annotations

from tokenizers import Regex, Tokenizer, normalizers, pre_tokenizers, processors
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from training.shapes.grammar import BACKGROUNDS, COLORS, RELATIONS, SHAPES, SIZES

MAX_TOKENS = 16  # the longest caption has 11 words that count, and an end token
PAD, UNK, END = "<pad>", "<unk>", "</s>"
OBJECT_WORDS = (*SIZES, *COLORS, *SHAPES)
_BEFORE_RELATION = r"(?=.*\b(left|right|above|below)\b)"


def words() -> list[str]:
    """Every word that the captions use, in a fixed order; articles carry no meaning and are dropped."""
    relation_words = [word for relation in RELATIONS for word in relation.split()]
    ordered = [*SIZES, *COLORS, *SHAPES, *relation_words, *BACKGROUNDS, "on", "background"]
    return [*dict.fromkeys(ordered), *(f"{word}:1" for word in OBJECT_WORDS)]


def tokenizer() -> PreTrainedTokenizerFast:
    """Lower-case words, articles and punctuation dropped, an end token, padding on the right."""
    # CLIPTextModel pools at the highest id, not at the end token, when the end token's id is 2.
    vocabulary = {token: i for i, token in enumerate([PAD, END, UNK, *words()])}
    core = Tokenizer(WordLevel(vocabulary, unk_token=UNK))
    core.normalizer = normalizers.Sequence(
        [
            normalizers.Lowercase(),
            normalizers.Replace(Regex(r"[^\w\s]+"), " "),
            normalizers.Replace(Regex(r"\b(a|an|the)\b"), " "),
            *(normalizers.Replace(Regex(rf"\b{word}\b{_BEFORE_RELATION}"), f"{word}:1") for word in OBJECT_WORDS),
        ]
    )
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    core.post_processor = processors.TemplateProcessing(single=f"$A {END}", special_tokens=[(END, vocabulary[END])])
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token=PAD,
        unk_token=UNK,
        eos_token=END,
        model_max_length=MAX_TOKENS,
        padding_side="right",
    )


def encode(text_tokenizer: PreTrainedTokenizerFast, prompts: list[str]) -> list[list[int]]:
    """Token ids of each prompt, cut and padded to MAX_TOKENS."""
    batch = text_tokenizer(prompts, padding="max_length", max_length=MAX_TOKENS, truncation=True)
    ids: list[list[int]] = batch["input_ids"]
    return ids

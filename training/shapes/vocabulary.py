"""The starter world's tokenizers: one token per word; unknown words become ``<unk>``.

The words of an object include its place: "red heart above blue star" becomes ``top_red top_heart bottom_blue
bottom_star``. So no meaning depends on word order, which small text encoders learn last (docs/experiments.md).
"""

from __future__ import annotations

import torch
from tokenizers import Regex, Tokenizer, normalizers, pre_tokenizers, processors
from tokenizers.models import WordLevel
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from training.shapes.grammar import BACKGROUNDS, COLORS, RELATIONS, SHAPES, SIZES

MAX_TOKENS = 12  # a caption has at most 7 words that count, an end token, and room for words that are unknown
PAD, UNK, END = "<pad>", "<unk>", "</s>"
OBJECT_WORDS = (*SIZES, *COLORS, *SHAPES)
SIDES = ("left", "right", "top", "bottom")
PLACES = {"left of": ("left", "right"), "right of": ("right", "left"), "above": ("top", "bottom")}
PLACES["below"] = ("bottom", "top")
_NEAR = ".{0,60}"  # unbounded, a prompt of 3,000 characters took 1.3 s
_OBJECT_WORD = rf"\b(?=(?:{'|'.join(OBJECT_WORDS)})\b)"
_WITHOUT_MEANING = rf"\b(a|an|the|on|background|{'|'.join(RELATIONS)})\b"


def words() -> list[str]:
    """Every word that the tokenizer knows, in a fixed order."""
    placed = [f"{place}_{word}" for place in SIDES for word in OBJECT_WORDS]
    return [*OBJECT_WORDS, *placed, *BACKGROUNDS]


def tokenizer() -> PreTrainedTokenizerFast:
    """Lower case, places added to object words, words without meaning dropped, an end token, padding on the right."""
    # CLIPTextModel pools at the highest id, not at the end token, when the end token's id is 2.
    vocabulary = {token: i for i, token in enumerate([PAD, END, UNK, *words()])}
    core = Tokenizer(WordLevel(vocabulary, unk_token=UNK))
    core.normalizer = normalizers.Sequence(
        [
            normalizers.Lowercase(),
            normalizers.Replace(Regex(r"[^\w\s]+"), " "),
            normalizers.Replace(Regex(r"\s+"), " "),
            *_place_marks(),
            normalizers.Replace(Regex(_WITHOUT_MEANING), " "),
            # One unknown token for a run of unknown words, so that a long preamble crowds nothing out.
            normalizers.Replace(Regex(rf"(?:\b(?!(?:{'|'.join(words())})\b)\w+\b\s*)+"), f" {UNK} "),
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


@torch.no_grad()
def compose(embedding_VD: Tensor) -> None:
    """Initialise embeddings from their parts: ``left_red`` is (the place's vector + the word's) / sqrt(2)."""
    first = 3 + len(OBJECT_WORDS)  # after the three special tokens and the plain words
    plain_WD = embedding_VD[3:first].clone()
    for i, _ in enumerate(SIDES):
        rows = slice(first + i * len(OBJECT_WORDS), first + (i + 1) * len(OBJECT_WORDS))
        place_D = embedding_VD[rows][0].clone()
        embedding_VD[rows] = (plain_WD + place_D) / 2**0.5


def _place_marks() -> list[normalizers.Replace]:
    """Before a relation an object word gets the first place, after it the second."""
    marks = []
    for relation, (first, second) in PLACES.items():
        marks.append(normalizers.Replace(Regex(rf"{_OBJECT_WORD}(?={_NEAR}\b{relation}\b)"), f"{first}_"))
        marks.append(normalizers.Replace(Regex(rf"(?<=\b{relation}\b{_NEAR}){_OBJECT_WORD}"), f"{second}_"))
    return marks


def encode(text_tokenizer: PreTrainedTokenizerFast, prompts: list[str]) -> list[list[int]]:
    """Token ids of each prompt, cut and padded to MAX_TOKENS."""
    batch = text_tokenizer(prompts, padding="max_length", max_length=MAX_TOKENS, truncation=True)
    ids: list[list[int]] = batch["input_ids"]
    return ids

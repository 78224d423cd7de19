"""How each family reads a prompt: the template around it, the tokenizer, and its length in tokens.

The HTTP process counts tokens with this module, so it imports neither numpy nor torch.
"""

from __future__ import annotations

import html
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer

from student.bundle import BundleError

# Of each family: the input that an encoder's ids are called by in a compiled graph, and the folder of its tokenizer.
TOKENIZERS = {
    "flux": {"clip_ids": "tokenizer", "t5_ids": "tokenizer_2"},
    "sd3": {"clip_ids": "tokenizer", "clip_2_ids": "tokenizer_2", "t5_ids": "tokenizer_3"},
    "wan": {"t5_ids": "tokenizer"},
    "flux2": {"chat_ids": "tokenizer"},
    "z_image": {"chat_ids": "tokenizer"},
    "qwen_image": {"chat_ids": "tokenizer"},
}


@dataclass(frozen=True)
class Chat:
    """A language model's template around a prompt; the family drops the states of its first ``dropped`` tokens.

    ``ends_are_cut``: nothing reads what follows a prompt's end, so that padding may be on the right whatever the
    tokenizer's configuration says.
    """

    before: str
    after: str
    dropped: int = 0
    ends_are_cut: bool = True

    def of(self, prompt: str) -> str:
        """The text that is tokenised."""
        return f"{self.before}{prompt}{self.after}"


USER, ASSISTANT = "<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n"
CHATS = {
    "flux2": Chat(USER, f"{ASSISTANT}<think>\n\n</think>\n\n", ends_are_cut=False),
    "z_image": Chat(USER, ASSISTANT),
    "qwen_image": Chat(
        "<|im_start|>system\nDescribe the image by detailing the color, shape, size, texture, quantity, text, spatial "
        f"relationships of the objects and background:<|im_end|>\n{USER}",
        ASSISTANT,
        dropped=34,
    ),
}


def cleaned(prompt: str) -> str:
    """A prompt as WanPipeline reads it: HTML entities resolved twice, white space collapsed to single spaces."""
    return re.sub(r"\s+", " ", html.unescape(html.unescape(prompt)).strip()).strip()


def token_counter(bundle: Path, family: str) -> Callable[[str], int]:
    """A function that counts a prompt's tokens for the encoder that reads all of it.

    That is the family's last; CLIP before it has a fixed length of its own and cuts the rest off. A chat template
    counts too, except for the part that the family drops (``Chat.dropped``).

    Raises:
        BundleError: the bundle has no such tokenizer, or its family is unknown.
    """
    if family not in TOKENIZERS:
        raise BundleError(f"family is {family!r}: accepted are {', '.join(TOKENIZERS)}")
    paths = [bundle / folder / "tokenizer.json" for folder in TOKENIZERS[family].values()]
    found = [path for path in paths if path.is_file()]
    if not found:
        raise BundleError(f"{paths[-1]} is missing: without it a prompt's tokens cannot be counted")
    tokenizer = Tokenizer.from_file(str(found[-1]))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    chat = CHATS.get(family)
    if chat is not None:
        return lambda prompt: len(tokenizer.encode(chat.of(prompt)).ids) - chat.dropped
    read = cleaned if family == "wan" else str
    return lambda prompt: len(tokenizer.encode(read(prompt)).ids)

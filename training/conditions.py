"""What the text encoders made of prompts, kept on disk: one file for each prompt, mapped into memory when it is read.

A run encodes its prompts once (FLUX: 4 MB each), its processes share the work and the files, and neither a run that
goes on nor the next one on the same prompts encodes them again. Files are whole or not there. Nothing but time is lost
when the folder is deleted.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from safetensors.torch import load_file, save

from student.families.family import Condition, Family
from training.disk import unless_full

TOKENS, POOLED = "tokens", "pooled"
AT_ONCE = 16


class Conditions(Mapping[str, Condition]):
    """The conditions of prompts by one set of encoders; ``folder`` is named after all that they depend on."""

    def __init__(self, folder: Path, prompts: Sequence[str]) -> None:
        self._folder, self._prompts = folder, tuple(dict.fromkeys(prompts))
        self._unwritten: dict[str, Condition] = {}  # the disk had no room for them

    def __getitem__(self, prompt: str) -> Condition:
        if prompt in self._unwritten:
            return self._unwritten[prompt]
        path = self._path(prompt)
        if not path.is_file():
            raise KeyError(prompt)
        found = load_file(path)
        return Condition(found[TOKENS], found.get(POOLED))

    def __iter__(self) -> Iterator[str]:
        return (prompt for prompt in self._prompts if prompt in self)

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __contains__(self, prompt: object) -> bool:
        return isinstance(prompt, str) and (prompt in self._unwritten or self._path(prompt).is_file())

    def missing(self, first: int = 0, every: int = 1) -> list[str]:
        """Of every so many prompts, from the first of them on, those that nobody has encoded yet."""
        return [prompt for prompt in self._prompts[first::every] if prompt not in self]

    def encode(self, model: Family, prompts: Sequence[str]) -> None:
        """Encode prompts and keep what comes of it; what the disk has no room for stays in this process."""
        for at in range(0, len(prompts), AT_ONCE):
            part = prompts[at : at + AT_ONCE]
            found = model.encode(part).to("cpu")
            for i, prompt in enumerate(part):
                self._keep(prompt, found.take(i))

    def _keep(self, prompt: str, condition: Condition) -> None:
        self._unwritten[prompt] = condition
        with unless_full("copies of its encoded prompts", self._folder):
            self._folder.mkdir(parents=True, exist_ok=True)
            self._write(prompt, condition)
            del self._unwritten[prompt]

    def _write(self, prompt: str, condition: Condition) -> None:
        path = self._path(prompt)
        part = path.with_suffix(f".{os.getpid()}.part")  # several runs may encode the same prompt
        tensors = {TOKENS: condition.tokens_BLE.contiguous()}
        if condition.pooled_BP is not None:
            tensors[POOLED] = condition.pooled_BP.contiguous()
        try:
            part.write_bytes(save(tensors))  # not save_file, whose errors are not the disk's
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)

    def _path(self, prompt: str) -> Path:
        return self._folder / f"{hashlib.sha256(prompt.encode()).hexdigest()[:32]}.safetensors"

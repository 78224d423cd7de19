"""The bundle's scorers, compiled to ONNX, for whatever runtime drew the pictures.

``scorers/NAME.onnx`` is written by export beside ``scorers/NAME.json``, which ties it to the scorer that the student
names (its calibration belongs to exactly those weights) and to the tokenizer whose ids the scorer reads.
Legend: B images, C = 3 colour channels, H x W pixels.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from student.bundle import BundleError, Scorer, Student, sha256
from student.runtimes.runtime import FloatArray
from student.runtimes.session import Session, open_session
from student.tokens import PromptTokens

TOKENIZER = "tokenizer/tokenizer.json"


class Scorers:
    """The scorers of ``student`` that are compiled; one whose files do not match the student is refused."""

    def __init__(self, bundle: Path, student: Student, tokens: PromptTokens, threads: int) -> None:
        self._tokens = tokens
        self._scorers = student.scorers
        self._sessions: dict[str, Session] = {}
        for name, scorer in student.scorers.items():
            if (bundle / scorer.file).is_file():
                check_scorer(bundle, student, name)
                self._sessions[name] = open_session(bundle / scorer.file, threads)

    def score(self, images_BCHW: FloatArray, prompts: Sequence[str]) -> dict[str, FloatArray]:
        """Standardised scores_B by scorer name; row by row, so that a score does not depend on batch mates."""
        if not self._sessions:  # nor, in most families, a tokenizer that a scorer would read
            return {}
        ids_BL = self._tokens.encode_clip(prompts)
        scores: dict[str, FloatArray] = {}
        for name, session in self._sessions.items():
            feeds = [
                {"images": images_BCHW[b : b + 1], "token_ids": ids_BL[b : b + 1]} for b in range(len(images_BCHW))
            ]
            raw_B = np.array([session.run(["score"], feed)[0][0] for feed in feeds], dtype=np.float32)
            scores[name] = standardised(raw_B, self._scorers[name])
        return scores


def standardised(raw_B: FloatArray, scorer: Scorer) -> FloatArray:
    """``(raw - mean) / std`` with the teacher's mean and standard deviation: 0 is the teacher's mean."""
    return ((raw_B - scorer.mean) / scorer.std).astype(np.float32)


def check_scorer(bundle: Path, student: Student, name: str) -> None:
    """Refuse a compiled scorer that is not the student's.

    Raises:
        BundleError: says what does not match.
    """
    scorer = student.scorers[name]
    path = bundle / scorer.file
    manifest_path = path.with_suffix(".json")
    if not manifest_path.is_file():
        raise BundleError(f"{path} has no manifest {manifest_path.name}: run export.run again")
    manifest = json.loads(manifest_path.read_text("utf-8"))
    for what, expected, found in (
        ("the scorer that the student was calibrated on", scorer.source_sha256, manifest["source_sha256"]),
        ("the student's tokenizer", student.files[TOKENIZER], manifest["tokenizer_sha256"]),
        ("its manifest", sha256(path), manifest["sha256"]),
    ):
        if expected != found:
            raise BundleError(f"{path} does not match {what} (sha256 differs): run export.run again")

"""The bundle's scorers, compiled to ONNX or run by torch, for pictures of any runtime.

Export writes ``scorers/NAME.onnx`` together with ``scorers/NAME.json``, which ties it to the scorer in the student's
manifest (its calibration belongs to exactly those weights) and says how to feed it pictures and prompts, and
``scorers/NAME.tokenizer.json``. A scorer without these files is opened by its ``reward``'s name, if possible.
Legend: B images, C = 3 colour channels, F frames, H x W pixels, L tokens.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from student.bundle import BundleError, Scorer, Student
from student.files import sha256
from student.runtimes.resize import matrices
from student.runtimes.runtime import FloatArray
from student.runtimes.session import OrtSession, open_session

FORMAT = 2
AT_ONCE = 16  # images that a scorer gets in one call
IMAGES, ROWS, COLUMNS, IDS, MASK = "images", "rows", "columns", "token_ids", "token_mask"
log = logging.getLogger(__name__)


class ScoreFn(Protocol):
    """Raw scores_B of images_BCHW in [0, 1] and their prompts; it may raise."""

    def __call__(self, images_BCHW: FloatArray, prompts: Sequence[str], /) -> FloatArray: ...


OpenReward = Callable[[str], ScoreFn]


class Scorers:
    """The scorers of ``student`` that are available here; one whose files do not match the student is refused.

    ``open_reward`` opens a scorer that is not compiled, by the reward's name (it may need torch); if it raises, that
    scorer is left out, with a line in the log.
    """

    def __init__(self, bundle: Path, student: Student, threads: int, open_reward: OpenReward | None = None) -> None:
        self._student = student
        self._functions: dict[str, ScoreFn] = {}
        self._left_out: set[str] = set()
        for name, scorer in student.scorers.items():
            if (bundle / scorer.file).is_file():
                check_scorer(bundle, student, name)
                self._functions[name] = CompiledScorer(bundle / scorer.file, threads)
        if open_reward is not None:
            self.open_named(open_reward)

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the available scorers."""
        return tuple(self._functions)

    def open_named(self, open_reward: OpenReward) -> None:
        """Open the scorers that have a reward's name and are not compiled; each is tried once."""
        for name, scorer in self._student.scorers.items():
            if name in self._functions or name in self._left_out or scorer.reward is None:
                continue
            try:
                self._functions[name] = open_reward(scorer.reward)
            except Exception as error:  # a user's reward may fail in any way, and pictures are served without it
                log.warning("the scorer %s (%s) is left out: %s", name, scorer.reward, error)
                self._left_out.add(name)

    def score(self, images: FloatArray, prompts: Sequence[str]) -> dict[str, FloatArray]:
        """Standardised scores_B by scorer name, of the pictures as they are served, in bytes.

        A video's score is the mean over its frames. It never raises: where a scorer fails on a picture, that score is
        NaN.
        """
        images_BCHW, each = _frames(served(images), prompts)
        return {
            name: standardised(_of_videos(_isolated(name, function, images_BCHW, each), len(images)), scorer)
            for name, function in self._functions.items()
            for scorer in (self._student.scorers[name],)
        }


class CompiledScorer:
    """One graph with its preprocessing inside and its tokenizer beside it."""

    def __init__(self, path: Path, threads: int) -> None:
        manifest = json.loads(path.with_suffix(".json").read_text("utf-8"))
        self._session: OrtSession = open_session(path, threads)
        self._fit, self._side, self._inputs = manifest["fit"], int(manifest["side"]), frozenset(manifest["inputs"])
        words = tokenizer_of(path)
        self._tokenizer = Tokenizer.from_file(str(words)) if IDS in self._inputs else None
        self._placed: dict[tuple[int, ...], tuple[Any, Any]] = {}

    def __call__(self, images_BCHW: FloatArray, prompts: Sequence[str], /) -> FloatArray:
        """Raw scores_B."""
        rows, columns = self._matrices(*images_BCHW.shape[-2:])
        feed = {IMAGES: images_BCHW, ROWS: rows, COLUMNS: columns, **self._words(prompts)}
        raw_B: FloatArray = self._session.run(["score"], feed)[0]
        return raw_B

    def _matrices(self, *size: int) -> tuple[Any, Any]:
        if size not in self._placed:
            rows, columns = matrices(self._fit, self._side, *size)
            self._placed[size] = self._session.place(rows), self._session.place(columns)
        return self._placed[size]

    def _words(self, prompts: Sequence[str]) -> dict[str, NDArray[np.int64]]:
        if self._tokenizer is None:
            return {}
        encodings = self._tokenizer.encode_batch(list(prompts))
        found = {
            IDS: np.array([row.ids for row in encodings], np.int64),
            MASK: np.array([row.attention_mask for row in encodings], np.int64),
        }
        return {name: rows_BL for name, rows_BL in found.items() if name in self._inputs}


def served(images: FloatArray) -> FloatArray:
    """The pictures rounded to bytes, as in a file: the score is of what is served."""
    bytes_BCHW: FloatArray = np.rint(np.clip(images, 0, 1) * np.float32(255))
    return bytes_BCHW.astype(np.float32) / np.float32(255)


def _frames(images: FloatArray, prompts: Sequence[str]) -> tuple[FloatArray, list[str]]:
    if images.ndim == 4:
        return images, list(prompts)
    each = [prompt for prompt in prompts for _ in range(images.shape[1])]
    return images.reshape(-1, *images.shape[2:]), each


def _of_videos(raw: FloatArray, count: int) -> FloatArray:
    if len(raw) == count:
        return raw
    mean_B: FloatArray = raw.reshape(count, -1).mean(axis=1).astype(np.float32)
    return mean_B


def _isolated(name: str, function: ScoreFn, images_BCHW: FloatArray, prompts: Sequence[str]) -> FloatArray:
    """Raw scores in calls of ``AT_ONCE``; a call that fails is repeated picture by picture."""
    parts = [
        _call(name, function, images_BCHW[at : at + AT_ONCE], prompts[at : at + AT_ONCE])
        for at in range(0, len(images_BCHW), AT_ONCE)
    ]
    return np.concatenate(parts) if parts else np.zeros(0, np.float32)


def _call(name: str, function: ScoreFn, images_BCHW: FloatArray, prompts: Sequence[str]) -> FloatArray:
    try:
        raw_B = np.asarray(function(images_BCHW, prompts), np.float32)
        if raw_B.shape != (len(images_BCHW),):
            raise ValueError(f"it returned the shape {raw_B.shape} for {len(images_BCHW)} pictures")
        return raw_B
    except Exception as error:  # a reward may fail in any way; its picture was drawn well
        if len(images_BCHW) == 1:
            log.warning("the scorer %s failed on a picture: %s: %s", name, type(error).__name__, error)
            return np.full(1, np.nan, np.float32)
    rows = [_call(name, function, images_BCHW[b : b + 1], prompts[b : b + 1]) for b in range(len(images_BCHW))]
    return np.concatenate(rows)


def standardised(raw_B: FloatArray, scorer: Scorer) -> FloatArray:
    """``(raw - mean) / std`` with the teacher's mean and standard deviation: 0 is the teacher's mean."""
    return ((raw_B.astype(np.float64) - scorer.mean) / scorer.std).astype(np.float32)


def tokenizer_of(path: Path) -> Path:
    """The file of a compiled scorer's tokenizer, with its padding and length."""
    return path.with_name(f"{path.stem}.tokenizer.json")


def check_scorer(bundle: Path, student: Student, name: str) -> None:
    """Refuse a compiled scorer that is not the student's.

    Raises:
        BundleError: it is not; the message says what differs.
    """
    scorer = student.scorers[name]
    path = bundle / scorer.file
    manifest_path, words, weights = path.with_suffix(".json"), tokenizer_of(path), path.with_name(f"{path.name}.data")
    if not manifest_path.is_file():
        raise BundleError(f"{path} has no manifest {manifest_path.name}: run export.run again")
    manifest: Mapping[str, Any] = json.loads(manifest_path.read_text("utf-8"))
    if manifest.get("format") != FORMAT:
        raise BundleError(f"{path} was compiled by another version: run export.run again")
    for what, expected, found in (
        ("the scorer that the student was calibrated on", scorer.source_sha256, manifest["source_sha256"]),
        ("its tokenizer", manifest["tokenizer_sha256"], sha256(words) if words.is_file() else ""),
        ("its manifest", manifest["sha256"], sha256(path)),
        ("its weights", manifest["data_sha256"], sha256(weights) if weights.is_file() else ""),
    ):
        if expected != found:
            raise BundleError(f"{path} does not match {what} (sha256 differs): run export.run again")

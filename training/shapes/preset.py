"""The starter world's own networks: what ``training.pretrain --preset shapes`` makes, in order."""

from __future__ import annotations

from dataclasses import dataclass, field

from training.shapes.autoencoder import AutoencoderConfig
from training.shapes.failures import FailuresConfig
from training.shapes.reader import ReaderConfig
from training.shapes.refine import RefineConfig
from training.shapes.scorer import HELDOUT, TRAINED, ScorerTraining
from training.shapes.sharpen import SharpenConfig
from training.shapes.teacher import TeacherConfig


@dataclass(frozen=True)
class ShapesPretraining:
    """Autoencoder, two scorers, the teacher, a sharper decoder, generators' failures and the bounded scorers; and, once
    there is a student, its failures too and a scorer that only reports.

    ``guidance`` is the guidance at which the teacher is evaluated.
    """

    autoencoder: AutoencoderConfig = field(default_factory=AutoencoderConfig)
    trained: ScorerTraining = TRAINED
    heldout: ScorerTraining = HELDOUT
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    decoder: SharpenConfig = field(default_factory=SharpenConfig)
    failures: FailuresConfig = field(default_factory=FailuresConfig)
    refine: RefineConfig = field(default_factory=RefineConfig)
    students: FailuresConfig = FailuresConfig(models=("models/shapes-teacher", "models/shapes"), seed=53)
    reader: ReaderConfig = field(default_factory=ReaderConfig)
    guidance: float = 2.5
    evaluate_prompts: int = 512

"""The starter world's own networks: what ``training.pretrain --preset shapes`` makes, in order."""

from __future__ import annotations

from dataclasses import dataclass, field

from training.shapes.autoencoder import AutoencoderConfig
from training.shapes.scorer import HELDOUT, TRAINED, ScorerTraining
from training.shapes.teacher import TeacherConfig


@dataclass(frozen=True)
class ShapesPretraining:
    """Autoencoder, two scorers and the teacher. ``guidance`` is the strength at which the teacher is measured."""

    autoencoder: AutoencoderConfig = field(default_factory=AutoencoderConfig)
    trained: ScorerTraining = TRAINED
    heldout: ScorerTraining = HELDOUT
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    guidance: float = 2.5
    evaluate_prompts: int = 512

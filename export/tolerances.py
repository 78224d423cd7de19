"""How far a compiled student may be from torch in float32, by precision."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Tolerance:
    """Most that is accepted of each.

    ``stage``: relative norm of a stage's answer, fed what torch's stage was fed. ``image``: absolute difference of one
    value of a picture in [0, 1]; ``psnr_db``: floor over all pictures; ``picture_db``: floor of every single one, so
    that a broken picture among good ones is seen. ``reward``: fall of the mean paired reward, in
    the teacher's deviations. ``score``: difference of one standardised score of a compiled scorer.
    """

    stage: float
    image: float
    psnr_db: float | None
    reward: float
    score: float = 1e-3
    picture_db: float | None = None


FP32 = Tolerance(stage=1e-4, image=1e-3, psnr_db=None, reward=0.01)
FP16 = Tolerance(stage=1e-2, image=0.25, psnr_db=40.0, reward=0.03, picture_db=30.0)
BF16 = Tolerance(stage=5e-2, image=1.0, psnr_db=30.0, reward=0.05, picture_db=20.0)
INT8 = Tolerance(stage=1e-1, image=1.0, psnr_db=25.0, reward=0.05, picture_db=16.0)
FP8 = Tolerance(stage=1e-1, image=1.0, psnr_db=25.0, reward=0.05, picture_db=16.0)
TOLERANCES: Mapping[str, Tolerance] = {"fp32": FP32, "fp16": FP16, "bf16": BF16, "int8": INT8, "fp8": FP8}

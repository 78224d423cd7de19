"""A reward for serving: numpy in, numpy out, on this machine's device (needs torch).

Shape suffixes: B batch, C channels, H/W pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from rewards.files import FILES
from rewards.interface import scored
from rewards.registry import find
from rewards.twostage import TwoStage

FloatArray = NDArray[np.float32]


def open_reward(name: str, files: Path = FILES) -> Callable[[FloatArray, Sequence[str]], FloatArray]:
    """The reward called ``name`` (see ``rewards.registry.find``) on the GPU, where there is one.

    A published reward gets pictures rounded to bytes, as in its authors' code.

    Raises:
        RewardError: there is no reward of that name, or it cannot be opened.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    reward = find(name, files=files, device=device)
    if isinstance(reward, TwoStage):
        reward.preprocess = replace(reward.preprocess, in_bytes=True)

    def score(images_BCHW: FloatArray, prompts: Sequence[str]) -> FloatArray:
        with torch.inference_mode():
            raw_B: FloatArray = scored(name, reward, torch.from_numpy(images_BCHW), prompts, device).cpu().numpy()
        return raw_B

    return score

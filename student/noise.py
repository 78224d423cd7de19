"""The noise that a picture starts from: a function of its own seed alone.

Legend: B images, C latent channels, F latent frames, H x W latent cells.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

SEED_LIMIT = 2**32


def noise(seeds: Sequence[int], shape: tuple[int, ...]) -> NDArray[np.float32]:
    """Standard normal noise for each seed, float32 (B, *shape): (C, H, W) for a picture, (C, F, H, W) for a video.

    Philox is counter-based and keyed by the seed, so row b depends on ``seeds[b]`` alone: not on the rest of the batch,
    its order, the device or the runtime.

    Raises:
        ValueError: a seed outside 0 <= seed < 2^32.
    """
    x = np.empty((len(seeds), *shape), dtype=np.float32)
    for row, seed in zip(x, seeds, strict=True):
        if not 0 <= seed < SEED_LIMIT:
            raise ValueError(f"seed is {seed}: accepted is 0 <= seed < 2^32")
        np.random.Generator(np.random.Philox(key=int(seed))).standard_normal(dtype=np.float32, out=row)
    return x

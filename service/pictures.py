"""From an array to the bytes of a picture file."""

from __future__ import annotations

import io

import numpy as np
from numpy.typing import NDArray
from PIL import Image

# PNG is lossless at any level; level 6 and above cost several times as much for a few per cent.
OPTIONS: dict[str, dict[str, int | bool]] = {
    "png": {"compress_level": 4},
    "jpeg": {"quality": 95, "subsampling": 0},
    "webp": {"quality": 95},
}


def encode(image_CHW: NDArray[np.float32], output_format: str) -> bytes:
    """One image, float32 in [0, 1], as a file of that format; the bytes depend on the image alone."""
    pixels_HWC = np.rint(np.clip(image_CHW, 0.0, 1.0) * 255.0).astype(np.uint8).transpose(1, 2, 0)
    file = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels_HWC)).save(file, output_format, **OPTIONS[output_format])
    return file.getvalue()

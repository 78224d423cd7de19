"""From an array to the bytes of a picture file."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from service.worker.provenance import Provenance

DEFAULT_QUALITY = 95
# PNG is lossless at any level: a noisy photograph takes half the time at level 1, and 14 % more bytes than at 4.
PNG_LEVEL = 1


def encode(
    image_CHW: NDArray[np.float32], output_format: str, quality: int | None = None, made_by: Provenance | None = None
) -> bytes:
    """One image, float32 in [0, 1], as a file of that format; the bytes depend on these arguments alone.

    ``quality``, from 0 to 100, is that of JPEG and WebP; PNG has none.
    """
    pixels_HWC = np.rint(np.clip(image_CHW, 0.0, 1.0) * 255.0).astype(np.uint8).transpose(1, 2, 0)
    file = io.BytesIO()
    options = _options(output_format, DEFAULT_QUALITY if quality is None else quality, made_by)
    Image.fromarray(np.ascontiguousarray(pixels_HWC)).save(file, output_format, **options)
    return file.getvalue()


def _options(output_format: str, quality: int, made_by: Provenance | None) -> dict[str, Any]:
    if output_format == "png":
        return {"compress_level": PNG_LEVEL, **({"pnginfo": _chunks(made_by)} if made_by else {})}
    options: dict[str, Any] = {"quality": quality, **({"xmp": made_by.xmp()} if made_by else {})}
    return {**options, "subsampling": 0} if output_format == "jpeg" else options


def _chunks(made_by: Provenance) -> PngInfo:
    chunks = PngInfo()
    chunks.add_text("Software", "fewstep")
    chunks.add_text("Source", f"{made_by.model} {made_by.version}")
    chunks.add_itxt("XML:com.adobe.xmp", made_by.xmp().decode("utf-8"))
    return chunks

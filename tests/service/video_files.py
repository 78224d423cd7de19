"""Video files opened by another decoder than the service's own encoder: what the tests compare with."""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import Any

import av
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageSequence

Frames = NDArray[np.uint8]


@dataclass(frozen=True)
class Decoded:
    """``frames_FHWC`` and how they are played; ``seconds`` each frame is shown, ``about`` the file's own words."""

    frames_FHWC: Frames
    seconds: tuple[float, ...]
    codec: str
    about: dict[str, Any]


def decode_mp4(data: bytes) -> Decoded:
    """By FFmpeg, with the matrix and the range that the file names."""
    with av.open(io.BytesIO(data)) as container:
        stream = container.streams.video[0]
        about = {**container.metadata, "matrix": stream.codec_context.colorspace, "pixels": stream.pix_fmt}
        read = list(container.decode(stream))
        times = [float(frame.pts * frame.time_base) for frame in read]
        times.append(times[0] + container.duration / av.time_base)
        frames = np.stack([frame.to_ndarray(format="rgb24") for frame in read])
        return Decoded(frames, tuple(np.diff(times)), stream.codec_context.name, about)


def decode_webp(data: bytes) -> Decoded:
    """By Pillow."""
    frames, seconds = [], []
    with Image.open(io.BytesIO(data)) as image:
        for frame in ImageSequence.Iterator(image):
            frame.load()
            frames.append(np.asarray(frame.convert("RGB")))
            seconds.append(frame.info["duration"] / 1000)
        return Decoded(np.stack(frames), tuple(seconds), str(image.format), dict(image.info))


def as_bytes(frames_FCHW: NDArray[np.float32]) -> Frames:
    """Frames in [0, 1] as a file has them, FHWC."""
    return np.rint(np.clip(frames_FCHW, 0, 1) * 255).astype(np.uint8).transpose(0, 2, 3, 1)


def psnr(found: Frames, wanted: Frames) -> float:
    """Peak signal to noise ratio in dB of the worst frame: a codec leaves 25, another picture has 15."""
    squares_F = ((found.astype(np.float64) - wanted) ** 2).mean(axis=(1, 2, 3))
    return float(10 * np.log10(255**2 / max(squares_F.max(), 1e-9)))

"""From an array of frames to the bytes of a video file: MP4 (H.264) by PyAV, animated WebP by Pillow.

Legend: F frames, C = 3 colour channels, H x W pixels.
"""

from __future__ import annotations

import io
import struct
import tempfile
import uuid
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from service.worker.provenance import Provenance

CRF = 17  # x264's constant rate factor at which a person sees no difference
CRF_RANGE = (1, 51)  # 0 would be lossless, in a profile that browsers do not play
THREADS = 4  # of the encoder: bytes depend on their number, and shall not depend on the machine's cores
LOSSLESS = 100
WEBP_QUALITY = 95
VIDEO_RANGE = 1  # 16 to 235, FFmpeg's AVCOL_RANGE_MPEG
BT709 = 1  # as ITU-T H.273 numbers primaries, transfer and matrix
XMP_BOX = uuid.UUID("be7acfcb-97a9-42e8-9c71-999491e3afac")  # XMP specification, part 3: MPEG-4


def encode_video(
    frames_FCHW: NDArray[np.float32], fps: int, output_format: str, quality: int | None = None,
    made_by: Provenance | None = None,
) -> bytes:  # fmt: skip
    """One video, float32 in [0, 1], as mp4 or webp; the bytes depend on these arguments alone.

    ``quality``, from 0 to 100, is that of the encoder; WebP at 100 is lossless, MP4 never is.
    """
    if output_format == "webp":
        return _webp(frames_FCHW, fps, quality, made_by)
    data = _mp4(frames_FCHW, fps, quality, made_by)
    return data + _xmp_box(made_by) if made_by else data


def _mp4(frames_FCHW: NDArray[np.float32], fps: int, quality: int | None, made_by: Provenance | None) -> bytes:
    import av  # opens FFmpeg's libraries, which a service of pictures never needs

    # The index goes to the front, so that a player can begin at once; for that FFmpeg reads a real file again.
    with tempfile.TemporaryDirectory(prefix="fewstep-") as folder:
        path = Path(folder) / "video.mp4"
        with av.open(path, "w", format="mp4", options={"movflags": "+faststart", "fflags": "+bitexact"}) as container:
            if made_by:
                container.metadata["comment"] = made_by.sentence()
            _write_frames(container, frames_FCHW, fps, _crf(quality))
        return path.read_bytes()


def _write_frames(container: Any, frames_FCHW: NDArray[np.float32], fps: int, crf: int) -> None:
    import av

    stream = container.add_stream("libx264", rate=Fraction(fps))
    stream.height, stream.width = frames_FCHW.shape[-2:]
    stream.pix_fmt = "yuv420p"
    stream.options = {"crf": str(crf), "preset": "medium", "threads": str(THREADS)}
    context = stream.codec_context
    context.color_primaries = context.color_trc = context.colorspace = BT709
    context.color_range = VIDEO_RANGE
    for k, pixels_HWC in enumerate(_pixels(frames_FCHW)):
        frame = av.VideoFrame.from_ndarray(pixels_HWC, format="rgb24")
        frame = frame.reformat(format="yuv420p", dst_colorspace="ITU709", dst_color_range="MPEG")
        frame.pts, frame.time_base = k, Fraction(1, fps)
        container.mux(stream.encode(frame))
    container.mux(stream.encode(None))


def _crf(quality: int | None) -> int:
    least, most = CRF_RANGE
    return CRF if quality is None else round(least + (100 - quality) * (most - least) / 100)


def _webp(frames_FCHW: NDArray[np.float32], fps: int, quality: int | None, made_by: Provenance | None) -> bytes:
    first, *others = [Image.fromarray(pixels_HWC) for pixels_HWC in _pixels(frames_FCHW)]
    ends_ms = [round(k * 1000 / fps) for k in range(len(frames_FCHW) + 1)]
    file = io.BytesIO()
    first.save(
        file,
        "webp",
        save_all=True,
        append_images=others,
        duration=[end - start for start, end in zip(ends_ms, ends_ms[1:], strict=False)],
        loop=0,
        lossless=quality == LOSSLESS,
        quality=WEBP_QUALITY if quality in (None, LOSSLESS) else quality,
        method=2,
        **({"xmp": made_by.xmp()} if made_by else {}),
    )
    return file.getvalue()


def _pixels(frames_FCHW: NDArray[np.float32]) -> Iterator[NDArray[np.uint8]]:
    """The frames as bytes, one at a time: a whole video in float32 is large enough."""
    for frame_CHW in frames_FCHW:
        pixels_CHW = np.rint(np.clip(frame_CHW, 0.0, 1.0) * 255.0).astype(np.uint8)
        yield np.ascontiguousarray(pixels_CHW.transpose(1, 2, 0))


def _xmp_box(made_by: Provenance) -> bytes:
    """The box in which MP4 files carry XMP, to stand at a file's end."""
    packet = XMP_BOX.bytes + made_by.xmp()
    return struct.pack(">I", 8 + len(packet)) + b"uuid" + packet

"""The fields of a request, by their names in POST /generate."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypedDict


class Options(TypedDict, total=False):
    """Everything besides the prompt. The service chooses what is left out or None; see its /docs."""

    negative_prompt: str | None
    num_inference_steps: int | None
    guidance_scale: float | None
    n: int | None
    best_of: int | None
    rank_by: str | None
    min_reward: float | str | None
    cascade: Sequence[int] | None
    seed: int | Sequence[int] | None
    width: int | None
    height: int | None
    size: str | None
    num_frames: int | None
    fps: int | None
    model: str | None
    model_version: str | None
    output_format: Literal["png", "jpeg", "webp", "mp4"] | None
    output_compression: int | None
    response_format: Literal["b64_json", "url"] | None
    priority: int | None
    timeout_s: float | None
    partial_images: int | None
    allow_training: bool | None
    user: str | None
    metadata: Mapping[str, str] | None
    webhook_url: str | None
    webhook_events: Sequence[Literal["job.done", "job.failed", "job.cancelled", "job.expired"]] | None


def body_of(prompt: str, options: Options) -> dict[str, Any]:
    """The JSON body of a request."""
    return {"prompt": prompt, **{name: value for name, value in options.items() if value is not None}}

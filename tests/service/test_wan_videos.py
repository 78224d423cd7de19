"""Wan from its pipeline to a player: a tiny one of the real classes, compiled, served, and decoded again."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fewstep
from export import run as export
from student.bundle import read_student
from student.pipeline import open_pipeline, reproduce
from student.runtimes.lengths import at_length
from student.runtimes.sizes import at_size
from tests.service.support import PATIENCE_S, Service, call, post, running_service
from tests.service.video_files import as_bytes, decode_mp4, decode_webp, psnr
from tests.student.families import tiny

PROMPT, SEED, FRAMES = "a red heart", 7, 5
MANY_STEPS = 30


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A student of videos of 5 frames, 48x32, with a runtime beside its pipeline that is compiled for 32x64 and for
    9 frames too."""
    folder = tmp_path_factory.mktemp("wan") / "wan"
    tiny.build(folder, tiny.wan(), steps=(2, MANY_STEPS), height_px=32, width_px=48, frames=FRAMES)
    (folder / "calibration.txt").write_text("a heart\na ring\n")  # in each bucket the proof draws 30 steps of each
    export.run(student=folder, to="onnx", size=["32x64"], frames="9")
    return folder


@pytest.fixture(scope="module", params=["torch", "onnx"])
def service(
    request: pytest.FixtureRequest, bundle: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Service]:
    data_dir = tmp_path_factory.mktemp(request.param) / "data"
    with running_service(data_dir, RUNTIME=request.param, MODEL=str(bundle)) as service:
        yield service


@pytest.fixture(scope="module")
def in_torch(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    data_dir = tmp_path_factory.mktemp("in_torch") / "data"
    with running_service(data_dir, RUNTIME="torch", MODEL=str(bundle), LEASE_S="2") as service:
        yield service


def wanted(bundle: Path, frames: int = FRAMES, size: tuple[int, int] = (32, 48)) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """The frames that diffusers' own pipeline draws, FHWC."""
    student, pipe = read_student(bundle), open_pipeline(bundle)
    longer = at_length(student, frames, (frames - 1) // 4 + 1)
    other = at_size(longer, size, (size[0] // 8, size[1] // 8))
    return as_bytes(reproduce(pipe, other, [PROMPT], [SEED], 2)[0])


def fetched(service: Service, **fields: Any) -> tuple[dict[str, Any], bytes]:
    response = post(service.url, prompt=PROMPT, seed=SEED, **fields)
    assert response.status_code == 200, response.text
    (video,) = response.json()["data"]
    return video, base64.b64decode(video["b64_json"])


def check_exact(found: np.ndarray[Any, Any], frames: np.ndarray[Any, Any]) -> None:
    """Every byte, but for the few that lie within float32's error of the middle between two."""
    assert found.shape == frames.shape
    off = np.abs(found.astype(int) - frames)
    assert off.max() <= 1 and (off > 0).mean() < 1e-3


def test_every_frame_is_the_pipelines_own(service: Service, bundle: Path) -> None:
    frames = wanted(bundle)
    video, data = fetched(service, output_format="webp", output_compression=100, fps=12)
    check_exact(decode_webp(data).frames_FHWC, frames)
    assert (video["num_frames"], video["fps"], video["width"], video["height"]) == (FRAMES, 12, 48, 32)
    found = decode_mp4(fetched(service, output_compression=100)[1])
    assert found.codec == "h264" and found.seconds == pytest.approx([1 / 16] * FRAMES, abs=2e-3)
    assert psnr(found.frames_FHWC, frames) > 24  # random weights draw noise, and a quarter of its colour is kept
    for shift in (1, 2):  # what the codec leaves is nearer to its own frame than to a neighbour
        assert psnr(found.frames_FHWC, np.roll(frames, shift, axis=0)) < psnr(found.frames_FHWC, frames)


def test_another_size_that_it_was_compiled_for_is_drawn_too(service: Service, bundle: Path) -> None:
    video, data = fetched(service, size="32x64", output_format="webp", output_compression=100)
    check_exact(decode_webp(data).frames_FHWC, wanted(bundle, size=(64, 32)))
    assert (video["num_frames"], video["width"], video["height"]) == (FRAMES, 32, 64)


def test_the_first_frame_of_a_preview_is_a_picture_of_it(service: Service) -> None:
    with fewstep.Client(service.url) as client:
        job = client.submit(PROMPT, seed=SEED, num_inference_steps=2, partial_images=1, output_format="webp")
        events = {event.name: event for event in client.events(job.id)}
    look = events["image_generation.partial_image"].picture
    assert look is not None and decode_webp(look).frames_FHWC.shape == (1, 32, 48, 3)
    assert client is not None and events["done"].data["job"]["progress"] == 100


@pytest.mark.parametrize("size", [(32, 48), (64, 32)])
def test_another_length_is_drawn_at_every_size(service: Service, bundle: Path, size: tuple[int, int]) -> None:
    video, data = fetched(
        service, num_frames=9, size=f"{size[1]}x{size[0]}", output_format="webp", output_compression=100
    )
    check_exact(decode_webp(data).frames_FHWC, wanted(bundle, 9, size))
    assert (video["num_frames"], video["width"], video["height"]) == (9, size[1], size[0])


def test_a_length_that_cannot_be_drawn_is_refused_with_those_that_can(service: Service) -> None:
    refused = {count: post(service.url, prompt=PROMPT, num_frames=count).json().get("error") for count in (7, 13)}
    (version,) = call("GET", f"{service.url}/v1/models").json()["data"][0]["versions"]
    if version["runtime"] == "torch":
        assert version["lengths"]["compiled"] is None and refused[13] is None
        said = "num_frames is 7: tiny-wan generates 1 frame or a multiple of 4 more; the nearest: 5 or 9."
        assert refused[7]["message"] == said
        return
    assert version["lengths"] == {"shortest": FRAMES, "longest": 9, "step": 4, "compiled": [FRAMES, 9]}
    for count, error in refused.items():
        said = f"num_frames is {count}: tiny-wan is served compiled, for videos of 5 or 9 frames and no others."
        assert (error["message"], error["param"]) == (said, "num_frames")


def test_a_worker_killed_in_the_middle_of_a_video_costs_nothing(in_torch: Service) -> None:
    asked: dict[str, Any] = {"seed": SEED, "num_inference_steps": MANY_STEPS, "num_frames": 61}
    with fewstep.Client(in_torch.url, timeout_s=2 * PATIENCE_S) as client:
        job = client.submit(PROMPT, **asked)
        events = client.events(job.id)
        step = next(event.data["step"] for event in events if event.name == "progress")
        (role,) = [role for role in in_torch.pids() if role.startswith("worker")]
        killed = in_torch.kill(role)
        assert 0 < step < MANY_STEPS and not client.job(job.id).final, "it was in the middle"
        completed = next(event for event in events if event.name == "image_generation.completed")
        assert client.wait(job.id).status == "done" and in_torch.pids()[role] != killed
        again = client.generate(PROMPT, **asked).data[0]
    assert completed.picture == again.data, "the same bytes as without the accident"
    assert decode_mp4(again.data).frames_FHWC.shape[0] == 61

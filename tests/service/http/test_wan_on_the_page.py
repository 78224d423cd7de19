"""A video of Wan made through the page: what the browser shows and what it saves are the pipeline's own frames."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from student.pipeline import open_pipeline, reproduce
from tests.service.http.browser import Page
from tests.service.support import Service, running_service
from tests.service.video_files import Frames, as_bytes, decode_mp4, psnr
from tests.student.families import tiny

PROMPT, SEED, STEPS, FRAMES, FPS = "a red heart", 7, 2, 9, 8
HEIGHT_PX, WIDTH_PX = 48, 64
LEAST_DB = 21.0  # in the worst frame, found 22.8: random weights draw noise, which a codec keeps least of
SHOWN = """(async () => {
  const video = document.querySelector('#viewer video');
  video.pause();
  const canvas = new OffscreenCanvas(video.videoWidth, video.videoHeight).getContext('2d');
  const frames = [];
  for (let k = 0; k < COUNT; k += 1) {
    const seeked = new Promise((resolve) => video.addEventListener('seeked', resolve, { once: true }));
    video.currentTime = (k + 0.5) / FPS;
    await seeked;
    canvas.drawImage(video, 0, 0);
    frames.push(Array.from(canvas.getImageData(0, 0, video.videoWidth, video.videoHeight).data));
  }
  return frames;
})()"""


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wan") / "wan"
    tiny.build(folder, tiny.wan(seed=33), (STEPS,), HEIGHT_PX, WIDTH_PX, frames=5)
    return folder


@pytest.fixture(scope="module")
def service(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    data_dir = tmp_path_factory.mktemp("page") / "data"
    with running_service(data_dir, RUNTIME="torch", MODEL=str(bundle), THREADS="1") as live:
        yield live


@pytest.fixture
def wanted(bundle: Path) -> Frames:
    """The pipeline's own video of 9 frames, which the page asks for in place of the student's 5."""
    from student.bundle import read_student
    from student.runtimes.lengths import at_length

    student = at_length(read_student(bundle), FRAMES, (FRAMES - 1) // 4 + 1)
    return as_bytes(reproduce(open_pipeline(bundle), student, [PROMPT], [SEED], STEPS)[0])


def check(found: Frames, wanted: Frames) -> None:
    """Frame by frame, and each nearer to its own frame than to its neighbours."""
    assert found.shape == wanted.shape == (FRAMES, HEIGHT_PX, WIDTH_PX, 3)
    assert psnr(found, wanted) > LEAST_DB
    for shift in (1, -1):
        assert psnr(found, np.roll(wanted, shift, axis=0)) < psnr(found, wanted) - 3


def test_what_the_page_plays_and_saves_is_what_the_pipeline_draws(
    browser: Page, service: Service, wanted: Frames
) -> None:
    browser.problems.clear()
    browser.show(service.url + "/")
    browser.wait_for("!document.getElementById('frames-field').hidden")
    for name, value in {"seed": SEED, "count": 1, "frames": FRAMES, "fps": FPS}.items():
        browser.value(f"document.getElementById('{name}').value = '{value}'")
    browser.value("document.getElementById('prompt').select()")
    browser.type(PROMPT)
    browser.press_enter()
    browser.wait_for("document.querySelector('.picture video')?.currentTime > 0")
    browser.value("document.querySelector('.picture .frame').click()")
    browser.wait_for("document.querySelector('#viewer video').currentTime > 0")
    shown = browser.value(SHOWN.replace("COUNT", str(FRAMES)).replace("FPS", str(FPS)))
    by_the_browser = np.asarray(shown, np.uint8).reshape(FRAMES, HEIGHT_PX, WIDTH_PX, 4)[..., :3]
    link = browser.value("document.querySelector('#viewer .save').href")
    saved = decode_mp4(base64.b64decode(link.removeprefix("data:video/mp4;base64,")))
    check(saved.frames_FHWC, wanted)
    assert saved.codec == "h264" and saved.seconds == pytest.approx([1 / FPS] * FRAMES, abs=2e-3)
    check(by_the_browser, wanted)
    assert browser.problems == []

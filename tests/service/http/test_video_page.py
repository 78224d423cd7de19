"""The page plays a video, in a real browser; what it plays is decoded again."""

from __future__ import annotations

import base64
from collections.abc import Iterator

import pytest

from student.runtimes.fake import fake_video
from tests.service.http.browser import Page
from tests.service.support import Service, running_service
from tests.service.video_files import as_bytes, decode_mp4, psnr

PLAYING = "[...document.querySelectorAll('.picture video')].filter(v => !v.paused && v.currentTime > 0).length"


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    with running_service(tmp_path_factory.mktemp("videos") / "data", RUNTIME="fake-video") as service:
        yield service


@pytest.fixture
def page(browser: Page, videos: Service) -> Iterator[Page]:
    """The page of a service of videos; afterwards nothing went wrong in it and nothing came from anywhere else."""
    browser.problems.clear()
    browser.requested.clear()
    browser.show(videos.url + "/")
    browser.wait_for("!document.getElementById('frames-field').hidden")
    yield browser
    assert browser.problems == []
    assert [url for url in browser.requested if not url.startswith((videos.url, "data:"))] == []


def draw(page: Page, prompt: str, **fields: object) -> None:
    for name, value in fields.items():
        page.value(f"document.getElementById('{name}').value = '{value}'")
    page.value("document.getElementById('prompt').select()")
    page.type(prompt)
    page.press_enter()


def test_a_video_is_drawn_played_and_saved(page: Page) -> None:
    draw(page, "waves", seed=7, count=2, frames=5, fps=10)
    page.wait_for(f"{PLAYING} === 2")
    assert (
        page.value("[...document.querySelectorAll('.picture video')].map(v => [v.videoWidth, v.duration])")
        == [[64, pytest.approx(0.5, abs=0.01)]] * 2
    )
    page.value("document.querySelector('.picture .frame').click()")
    page.wait_for("document.querySelector('#viewer video').currentTime > 0")
    link = page.value("(({ href, download }) => [href, download])(document.querySelector('#viewer .save'))")
    assert link[1] == "7.mp4"
    found = decode_mp4(base64.b64decode(link[0].removeprefix("data:video/mp4;base64,")))
    assert psnr(found.frames_FHWC, as_bytes(fake_video("waves", 7, 4, 5))) > 25
    details = page.value("document.querySelector('#viewer .details').textContent")
    assert "5 frames · 0.50 s" in details and "worst frame, trained" in details
    page.value("document.querySelector('#viewer .close').click()")


def test_while_it_is_drawn_the_first_frame_and_the_steps_are_shown(page: Page) -> None:
    page.value(
        "window.said = new Set(); setInterval(() => {"
        " const facts = document.querySelector('.facts'); if (facts) said.add(facts.textContent);"
        " const img = document.querySelector('.unfinished img');"
        " if (img && img.naturalWidth) said.add('preview'); }, 20)"
    )
    draw(page, "waves fake:step=0.4", seed=7)
    page.wait_for(f"{PLAYING} === 1")
    said = page.value("[...said]")
    assert "preview" in said and any(text.startswith("generating … step ") and text.endswith(" of 4") for text in said)


def test_the_code_asks_for_the_same_video(page: Page) -> None:
    draw(page, "waves", seed=7, frames=5)
    page.wait_for(f"{PLAYING} === 1")
    page.value("document.querySelector('.code').click()")
    shell = page.value("document.querySelector('#snippet pre').textContent")
    assert '"num_frames":5' in shell and '"output_format":"mp4"' in shell
    page.value("[...document.querySelectorAll('#snippet .tabs button')].at(-1).click()")
    assert 'picture.save(f"{picture.seed}.mp4")' in page.value("document.querySelector('#snippet pre').textContent")
    page.value("document.querySelector('#snippet .close').click()")


COMPILED = """
const plain = window.fetch;
window.fetch = async (...asked) => {
  const answer = await plain(...asked);
  if (!String(asked[0]).endsWith("v1/models")) return answer;
  const models = await answer.json();
  for (const one of models.data.flatMap((entry) => entry.versions)) one.lengths.compiled = [5, 17, 21];
  return new Response(JSON.stringify(models), { headers: answer.headers });
};
"""


def test_of_a_compiled_student_only_its_lengths_can_be_asked_for(browser: Page, videos: Service) -> None:
    script = browser.call("Page.addScriptToEvaluateOnNewDocument", source=COMPILED)["identifier"]
    try:
        browser.show(videos.url + "/")
        browser.wait_for("document.getElementById('lengths').options.length === 3")
        assert browser.value("[...document.getElementById('lengths').options].map(one => one.value)") == [
            "5",
            "17",
            "21",
        ]
        for frames, said in ((5, ""), (9, "This model generates 5, 17, 21 frames"), (17, "")):
            found = browser.value(
                f"(field => {{ field.value = '{frames}'; field.dispatchEvent(new Event('input'));"
                " return [field.checkValidity(), field.validationMessage]; })(document.getElementById('frames'))"
            )
            assert found == [not said, said]
    finally:
        browser.call("Page.removeScriptToEvaluateOnNewDocument", identifier=script)

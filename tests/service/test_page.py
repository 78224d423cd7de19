"""The page for people and the description of the API, in a real browser."""

from __future__ import annotations

import base64
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest

from service.routes.pages import ASSETS, FOLDER
from service.schema import GenerateRequest
from tests.service.browser import Page, chromium, open_browser
from tests.service.support import Service, expected_pixels, pixels, post

DRAWN = "document.querySelectorAll('.run:not(.waiting) .picture img').length"
PROMPT = "a red heart above a blue star"


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    program = chromium()
    if program is None:
        assert not os.environ.get("CI"), "no chromium on PATH, and this is a continuous integration"
        pytest.skip("no chromium on PATH")
    with open_browser(program, tmp_path_factory.mktemp("profile")) as page:
        yield page


@pytest.fixture
def page(browser: Page, live: Service) -> Iterator[Page]:
    """The page, freshly loaded; afterwards nothing went wrong in it and nothing came from anywhere else."""
    browser.problems.clear()
    browser.requested.clear()
    browser.show(live.url + "/")
    yield browser
    assert browser.problems == []
    assert [url for url in browser.requested if not url.startswith((live.url, "data:"))] == []


def draw(page: Page, prompt: str, count: int, seed: int | None = None) -> None:
    """Fill in the form as a person would, and press Enter in the prompt."""
    page.value(f"document.getElementById('count').value = {count}")
    page.value(f"document.getElementById('seed').value = {json.dumps('' if seed is None else str(seed))}")
    page.value("document.getElementById('prompt').select()")
    page.type(prompt)
    page.press_enter()


def seeds(page: Page) -> list[int]:
    shown = page.value("[...document.querySelectorAll('.seed')].map(button => button.textContent)")
    return [int(re.fullmatch(r"seed (\d+)", text)[1]) for text in shown]  # type: ignore[index]


def sources(page: Page) -> list[bytes]:
    """The bytes of the pictures that are shown, in order."""
    urls = page.value("[...document.querySelectorAll('.picture img')].map(img => img.src)")
    return [base64.b64decode(url.removeprefix("data:image/png;base64,")) for url in urls]


def test_a_prompt_becomes_pictures_with_rewards_seeds_and_timings(page: Page, live: Service) -> None:
    page.wait_for("document.querySelector('.about.ready')")
    assert page.value("document.getElementById('about').textContent") == "fake 1 · fake"
    draw(page, PROMPT, count=2, seed=7)
    page.wait_for(f"{DRAWN} === 2")
    assert seeds(page) == [7, 8]
    for data, seed in zip(sources(page), (7, 8), strict=True):
        assert np.array_equal(pixels(data), expected_pixels(PROMPT, seed))
    assert page.value("[...document.querySelectorAll('.picture img')].every(img => img.naturalWidth === 64)")
    answer = post(live.url, prompt=PROMPT, seed=7, num_images_per_prompt=2).json()
    expected = [f"{score:+.2f}".replace("-", "−") for image in answer["data"] for score in image["reward"].values()]
    assert page.value("[...document.querySelectorAll('.rewards dd')].map(dd => dd.textContent)") == expected
    facts = page.value("document.querySelector('.facts').textContent")
    assert re.fullmatch(r"\d+ ms in all · waited \d+ ms · drawn in \d+ ms · scored in \d+ ms · batch of 2", facts), (
        facts
    )


def test_an_example_is_one_click_and_a_new_prompt_comes_on_top(page: Page) -> None:
    draw(page, PROMPT, count=1)
    page.wait_for(f"{DRAWN} === 1")
    page.value("document.querySelectorAll('#examples button')[1].click()")
    page.wait_for(f"{DRAWN} === 2")
    titles = page.value("[...document.querySelectorAll('.run h2')].map(title => title.textContent)")
    assert titles == [page.value("document.querySelectorAll('#examples button')[1].textContent"), PROMPT]


def test_a_seed_can_be_used_again_and_gives_the_same_picture(page: Page) -> None:
    draw(page, PROMPT, count=3)
    page.wait_for(f"{DRAWN} === 3")
    wanted, seed = sources(page)[1], seeds(page)[1]
    page.value("document.querySelectorAll('.seed')[1].click()")
    page.value("document.getElementById('draw').click()")
    page.wait_for(f"{DRAWN} === 4")
    assert seeds(page)[0] == seed and sources(page)[0] == wanted


def test_an_error_is_one_sentence_and_the_next_try_works(page: Page) -> None:
    draw(page, "word " * 25, count=2)
    page.wait_for("!document.getElementById('error').hidden")
    assert (
        page.value("document.getElementById('error').textContent")
        == "prompt has 25 tokens; the student reads 24 at most."
    )
    assert page.value("document.querySelectorAll('.run').length") == 0
    page.problems[:] = [problem for problem in page.problems if "422" not in problem]
    draw(page, PROMPT, count=1)
    page.wait_for(f"{DRAWN} === 1")
    assert page.value("document.getElementById('error').hidden")


def test_a_prompt_is_shown_as_text_and_not_run(page: Page) -> None:
    evil = "<img src=x onerror=document.title='owned'>"
    draw(page, evil, count=1)
    page.wait_for(f"{DRAWN} === 1")
    assert page.value("document.querySelector('.run h2').textContent") == evil
    assert page.value("document.title") == "fewstep"


@pytest.mark.parametrize("width", [1100, 390, 320])
def test_they_fit_every_screen(page: Page, live: Service, width: int) -> None:
    page.show(live.url + "/docs", width=width)
    page.wait_for("document.querySelector('section')")
    assert page.value("document.documentElement.scrollWidth <= innerWidth")
    page.show(live.url + "/", width=width)
    draw(page, "a large purple diamond below a small white circle on a mint background", count=4)
    page.wait_for(f"{DRAWN} === 4")
    assert page.value("document.documentElement.scrollWidth <= innerWidth")


def test_it_is_dark_where_the_system_is(page: Page, live: Service) -> None:
    def brightness() -> int:
        colour = page.value("getComputedStyle(document.documentElement).backgroundColor")
        return sum(int(part) for part in re.findall(r"\d+", colour)[:3])

    light = brightness()
    page.show(live.url + "/", dark=True)
    assert light > 600 and brightness() < 120


def test_the_description_of_the_api_works_without_a_network(page: Page, live: Service) -> None:
    page.show(live.url + "/docs")
    page.wait_for("document.querySelector('section')")
    text = page.value("document.getElementById('docs').innerText")
    for word in ("/generate", "/readyz", "/metrics", "integer 0 to 4294967295", *GenerateRequest.model_fields):
        assert word in text
    assert f"curl {live.url}/generate" in text


def test_the_example_of_the_description_works_when_pasted(page: Page, live: Service) -> None:
    page.show(live.url + "/docs")
    page.wait_for("document.querySelector('pre')")
    body = re.search(r"-d '(.*)'", page.value("document.querySelector('pre').textContent"))[1]  # type: ignore[index]
    headers = {"Content-Type": "application/json"}
    response = httpx.post(f"{live.url}/generate", content=body, headers=headers, trust_env=False)
    assert response.status_code == 200


def test_nothing_on_the_pages_comes_from_elsewhere() -> None:
    files = {path.name for path in FOLDER.iterdir()}
    assert files == {"index.html", "docs.html", *ASSETS}
    for name in files:
        addresses = re.findall(r"https?://[^\s\"'`]+", (FOLDER / name).read_text("utf-8"))
        assert [address for address in addresses if not address.startswith("http://www.w3.org/")] == []


@pytest.mark.parametrize("path", ["/", "/docs", *(f"/page/{name}" for name in ASSETS)])
def test_pages_may_load_nothing_from_elsewhere_either(live: Service, path: str) -> None:
    response = httpx.get(live.url + path, trust_env=False)
    assert response.status_code == 200 and len(response.content) > 100
    assert response.headers["Content-Security-Policy"].startswith("default-src 'self'")
    assert response.headers["X-Content-Type-Options"] == "nosniff"


def test_the_description_names_every_status_that_can_come(live: Service) -> None:
    api = httpx.get(f"{live.url}/openapi.json", trust_env=False).json()
    operation = api["paths"]["/generate"]["post"]
    assert set(operation["responses"]) == {
        "200", "202", "400", "404", "409", "413", "422", "429", "500", "503", "504",
    }  # fmt: skip
    assert set(operation["responses"]["200"]["content"]) == {
        "application/json",
        "image/png",
        "image/jpeg",
        "image/webp",
        "text/event-stream",
    }
    headers = {parameter["name"].lower() for parameter in operation["parameters"]}
    assert headers == {"prefer", "idempotency-key"}
    assert set(api["paths"]) >= {f"/jobs/{{id}}{path}" for path in ("", "/cancel", "/events", "/images/{k}")}
    for path in api["paths"].values():
        for described in path.values():
            assert described["description"] and all(answer["description"] for answer in described["responses"].values())
            assert all(parameter["description"] for parameter in described.get("parameters", []))
    assert "HTTPValidationError" not in api["components"]["schemas"]
    fields = api["components"]["schemas"]["GenerateRequest"]
    assert fields["additionalProperties"] is False and fields["required"] == ["prompt"]
    assert all("description" in field for field in fields["properties"].values())


def test_the_files_of_the_page_are_where_the_package_says() -> None:
    assert FOLDER == Path(__file__).resolve().parents[2] / "service" / "page"

"""The page for people and the description of the API, in a real browser."""

from __future__ import annotations

import base64
import json
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest

from service.http.routes.pages import ASSETS, FOLDER
from service.http.schema import GenerateRequest
from student.runtimes.fake import fake_preview
from tests.service.http.browser import Page
from tests.service.support import REPOSITORY, Service, clean_environment, expected_pixels, pixels, post

DRAWN = "document.querySelectorAll('.run:not(.waiting) .picture img').length"
PROMPT = "a red heart above a blue star"


@pytest.fixture
def page(browser: Page, live: Service) -> Iterator[Page]:
    """The page, freshly loaded; afterwards nothing went wrong in it and nothing came from anywhere else."""
    browser.problems.clear()
    browser.requested.clear()
    browser.show(live.url + "/")
    yield browser
    # A service need not list its models; the form works without.
    assert [problem for problem in browser.problems if not problem.endswith("/v1/models")] == []
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
    time = r"(\d+ ms|\d+\.\d+ s)"
    assert re.fullmatch(
        f"{time} in all · waited {time} · generated in {time} · scored in {time} · batch of 2", facts
    ), facts


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


def test_it_is_watched_while_it_is_drawn(page: Page) -> None:
    slow = "fake:step=0.4"
    draw(page, slow, count=2, seed=7)
    page.wait_for("document.querySelectorAll('.picture.unfinished img').length === 2")
    looks = sources(page)
    answers = [np.rint(fake_preview(slow, 7, 4, step) * 255).astype(np.uint8).transpose(1, 2, 0) for step in range(3)]
    assert any(np.array_equal(pixels(looks[0]), answer) for answer in answers)
    page.wait_for(f"{DRAWN} === 2 && !document.querySelector('.unfinished')")
    assert np.array_equal(pixels(sources(page)[0]), expected_pixels(slow, 7))


def test_what_takes_too_long_can_be_cancelled(page: Page, live: Service) -> None:
    draw(page, "fake:step=1.5 fake:sleep=5", count=1)
    page.wait_for("document.querySelector('.run.waiting .facts')?.textContent === 'generating …'")
    page.value("document.querySelector('.run .cancel').click()")
    page.wait_for("!document.getElementById('error').hidden")
    assert page.value("document.getElementById('error').textContent") == "The job was cancelled."
    assert page.value("document.querySelectorAll('.run').length") == 0
    assert httpx.get(f"{live.url}/jobs?limit=1", trust_env=False).json()["data"][0]["status"] == "cancelled"


def test_a_picture_can_be_seen_large_and_the_gallery_leafed_through(page: Page) -> None:
    draw(page, PROMPT, count=2, seed=7)
    page.wait_for(f"{DRAWN} === 2")
    page.value("document.querySelector('.picture .frame').click()")
    assert page.value("document.getElementById('viewer').open")
    details = "[...document.querySelectorAll('#viewer .details dd')].map(dd => dd.textContent)"
    first = page.value(details)
    assert first[0] == "7" and "64 × 64" in first and "fake 1" in first
    page.press("ArrowRight")
    assert page.value(details)[0] == "8"
    page.press("ArrowRight")
    assert page.value(details)[0] == "8"
    page.value("document.querySelector('#viewer .again').click()")
    assert not page.value("document.getElementById('viewer').open")
    assert page.value("document.getElementById('seed').value") == "8"


@pytest.mark.parametrize("prompt", [PROMPT, "it's a \"quoted\" $HOME `star` \\ 'heart' ❤"])
def test_the_code_that_is_shown_draws_the_same_pictures(page: Page, live: Service, tmp_path: Path, prompt: str) -> None:
    draw(page, prompt, count=2)
    page.wait_for(f"{DRAWN} === 2")
    shown = [pixels(data) for data in sources(page)]
    page.value("document.querySelector('.run .code').click()")
    code = "document.querySelector('#snippet pre').textContent"
    curl = shlex.split(page.value(code).replace("\\\n", " "))
    assert curl[:3] == ["curl", "-s", f"{live.url}/generate"]
    answer = httpx.post(
        curl[2], content=curl[curl.index("-d") + 1], headers={"Content-Type": "application/json"}, trust_env=False
    ).json()
    page.value("document.querySelectorAll('#snippet .tabs button')[1].click()")
    environment = {**clean_environment({}), "PYTHONPATH": str(REPOSITORY), "PYTHONUTF8": "1"}
    subprocess.run([sys.executable, "-c", page.value(code)], cwd=tmp_path, env=environment, check=True)
    for image, expected in zip(answer["data"], shown, strict=True):
        assert np.array_equal(pixels(base64.b64decode(image["b64_json"])), expected)
        assert np.array_equal(pixels((tmp_path / f"{image['seed']}.png").read_bytes()), expected)


def test_step_counts_are_compared_on_the_same_seeds(page: Page, live: Service) -> None:
    if httpx.get(f"{live.url}/v1/models", trust_env=False).status_code == 404:
        pytest.skip("this service does not list its models")
    page.wait_for("!document.getElementById('compare-field').hidden")
    page.value("document.getElementById('compare').click()")
    page.value("document.querySelectorAll('#variants input')[1].click()")
    draw(page, PROMPT, count=2)
    page.wait_for(f"{DRAWN} === 4")
    titles = page.value("[...document.querySelectorAll('.variant h3')].map(title => title.textContent)")
    assert titles == ["1 step", "4 steps"]
    shown = list(zip(seeds(page), sources(page), strict=True))
    assert [seed for seed, _ in shown[:2]] == [seed for seed, _ in shown[2:]]
    for (seed, data), steps in zip(shown, (1, 1, 4, 4), strict=True):
        assert np.array_equal(pixels(data), expected_pixels(PROMPT, seed, steps))
    page.value("document.querySelectorAll('#variants input')[0].click()")
    draw(page, PROMPT, count=2)
    page.wait_for("!document.getElementById('error').hidden")
    assert page.value("document.getElementById('error').textContent") == "Choose at least two ways to compare."


def test_the_panel_shows_what_the_metrics_say(page: Page, live: Service) -> None:
    draw(page, PROMPT, count=3)
    page.wait_for(f"{DRAWN} === 3")
    scores = "document.querySelector('.histogram figcaption')?.textContent"
    page.show(live.url + "/", width=1360)
    page.wait_for(scores)
    text = httpx.get(f"{live.url}/metrics", trust_env=False).text
    name, scorer = "fewstep_reward_score_count", 'scorer="heldout"'  # of chosen images all first candidates are counted
    count = sum(float(line.split()[-1]) for line in text.splitlines() if line.startswith(name) and scorer in line)
    page.wait_for(f"{scores} === 'heldout reward · {count:,.0f} images'")
    assert page.value("document.getElementById('waiting').textContent") == "0"
    assert re.fullmatch(r"[\d.]+ m?s", page.value("document.getElementById('p99').textContent"))
    page.show(live.url + "/", width=390)
    assert not page.value("document.getElementById('panel').open")


HEALTH = """(async () => { const { samples } = await import('./page/panel.js'); const { findings } = await import(
  './page/health.js'); return findings(samples(TEXT)).map(({ text, bad }) => `${bad ? "!" : ""}${text}`); })()"""


def test_the_panel_says_what_probes_drift_and_canaries_have_found(page: Page) -> None:
    stream = 'model="m",version="1",scorer="trained",steps="4",size="64x64",selected="false"'
    text = [
        'fewstep_probe_workers{model="m",version="1",outcome="same"} 3.0',
        'fewstep_probe_workers{model="m",version="1",outcome="pixels_changed"} 1.0',
        'fewstep_probe_workers{model="m",version="2",outcome="none"} 1.0',
        f'fewstep_drift_alarm{{{stream},cause="none"}} 0.0',
        'fewstep_canary_state{model="m",base="1",candidate="2",state="rolled_back"} 1.0',
        'fewstep_canary_pairs{model="m",base="1",candidate="2"} 50.0',
    ]
    found = page.value(HEALTH.replace("TEXT", json.dumps("\n".join(text))))
    assert found == [
        "m 1 generates identical images (3 workers)", "!m 1 generates different images than before (1 worker)",
        "Scores have not drifted", "!m 2 was rolled back, against 1: 50 pairs",
    ]  # fmt: skip
    alarm = f'fewstep_drift_alarm{{{stream},cause="prompts"}} 1.0'
    drifted = page.value(HEALTH.replace("TEXT", json.dumps(alarm)))
    assert drifted == ["!trained scores of m 1 at 4 steps have drifted: the prompts"]


QUANTILES = """(async () => { const { samples, buckets, quantile, since } = await import('./page/panel.js');
  const found = buckets(samples(TEXT), 'h'); return [found.map(({ count }) => count), [0.1, 0.5, 0.9, 1].map(
  (share) => quantile(share, found)), since(found, found).map(({ count }) => count), since([found[0]], [{ count: 99 }])
  .length, quantile(0.5, since(found, found))]; })()"""


def test_quantiles_are_those_that_prometheus_would_give(page: Page) -> None:
    """Answers by hand, from histogram_quantile's rule; labels are summed over."""
    lines = ['h_bucket{le="1.0",m="a,b}\\""} 2.0', 'h_bucket{le="2.0",m="a"} 6.0', 'h_bucket{le="+Inf",m="a"} 8.0']
    more = ['h_bucket{le="1.0",m="b"} 0.0', 'h_bucket{le="2.0",m="b"} 2.0', 'h_bucket{le="+Inf",m="b"} 2.0', "# x 1"]
    text = json.dumps("\n".join(lines + more))
    found = page.value(QUANTILES.replace("TEXT", text))
    assert found == [[2, 6, 2], [0.5, 1.5, 2, 2], [0, 0, 0], 1, None]


def test_events_are_read_whole_however_they_are_cut(page: Page) -> None:
    stream = ': keep-alive\n\nid: 0\nevent: queued\ndata: {"position": 1}\n\nevent: started\ndata: {"a": 1}\n\nid: 2'
    found = page.value(f"import('./page/api.js').then(({{ parse }}) => parse({json.dumps(stream)}))")
    assert found["rest"] == "id: 2"
    assert [(event["name"], event["number"], event["data"]) for event in found["events"]] == [
        ("queued", "0", {"position": 1}),
        ("started", "", {"a": 1}),
    ]


def test_the_prompt_is_one_key_away(page: Page) -> None:
    page.value("document.activeElement.blur()")
    page.press("/")
    assert page.value("document.activeElement.id") == "prompt"
    assert page.value("document.getElementById('prompt').value") == ""


def test_an_error_is_one_sentence_and_the_next_try_works(page: Page) -> None:
    draw(page, "word " * 25, count=2)
    page.wait_for("!document.getElementById('error').hidden")
    assert (
        page.value("document.getElementById('error').textContent")
        == "prompt has 25 tokens: the student reads at most 24."
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
        "200", "202", "400", "401", "403", "404", "408", "409", "413", "415", "422", "429", "500", "503", "504",
    }  # fmt: skip
    assert set(operation["responses"]["200"]["content"]) == {
        "application/json",
        "image/png",
        "image/jpeg",
        "image/webp",
        "video/mp4",
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
    assert FOLDER == Path(__file__).resolve().parents[3] / "service" / "page"


def choose(page: Page, **fields: str) -> None:
    """Open the part of the form about quality and set its fields, as a person would."""
    page.wait_for("!document.getElementById('quality').hidden")
    page.value("document.getElementById('quality').open = true")
    for id, value in fields.items():
        name = json.dumps(id.replace("_", "-"))
        page.value(f"document.getElementById({name}).value = {json.dumps(value)}")
        page.value(f"document.getElementById({name}).dispatchEvent(new Event('change'))")


def test_the_best_of_several_is_asked_for_and_shown_with_its_candidates(page: Page, live: Service) -> None:
    choose(page, best_of="4")
    assert "4 times the cost" in page.value("document.getElementById('quality-hint').textContent")
    draw(page, PROMPT, count=2, seed=7)
    page.wait_for(f"{DRAWN} === 2")
    answer = post(live.url, prompt=PROMPT, seed=7, n=2, best_of=4).json()
    assert seeds(page) == [image["seed"] for image in answer["data"]]
    for data, image in zip(sources(page), answer["data"], strict=True):
        assert np.array_equal(pixels(data), expected_pixels(PROMPT, image["seed"]))
    shown = page.value("[...document.querySelectorAll('.choice')].map(box => box.textContent)")
    assert shown == ["best of 4 · 4 steps"] * 2
    page.value("document.querySelector('.picture .frame').click()")
    details = page.value("document.querySelector('#viewer .details').textContent")
    scores = sorted((one["reward"]["trained"] for one in answer["data"][0]["candidates"]), reverse=True)
    assert ", ".join(f"{score:+.2f} (4)".replace("-", "−") for score in scores) in details
    assert "best of 4 by trained" in details and "heldout" in details


def test_a_floor_with_more_steps_is_shown_with_what_has_not_reached_it(page: Page, live: Service) -> None:
    choose(page, steps="1", floor="p50")
    assert "at 2 and 4 steps" in page.value("document.getElementById('quality-hint').textContent")
    draw(page, PROMPT, count=8, seed=7)
    page.wait_for(f"{DRAWN} === 8")
    answer = post(live.url, prompt=PROMPT, seed=7, n=8, min_reward="p50", cascade=[1, 2, 4]).json()
    assert seeds(page) == [image["seed"] for image in answer["data"]]
    below = [image["below_floor"] for image in answer["data"]]
    assert (
        page.value("[...document.querySelectorAll('.picture')].map(one => !!one.querySelector('.below-floor'))")
        == below
    )
    facts = page.value("document.querySelector('.run .facts').textContent")
    assert "floor " in facts and "(p50)" in facts


def test_a_floor_that_could_not_be_met_says_what_it_needs(page: Page) -> None:
    choose(page, floor="p20")
    page.value("document.getElementById('more-steps').checked = false")
    page.value("document.getElementById('more-steps').dispatchEvent(new Event('change'))")
    assert "needs more candidates" in page.value("document.getElementById('quality-hint').textContent")
    draw(page, PROMPT, count=1, seed=7)
    page.wait_for(f"{DRAWN} === 1")
    assert page.value("document.querySelectorAll('.choice').length") == 0

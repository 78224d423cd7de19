"""What the page's modules make of what they are given, value by value, in a real browser: fetch is a stand-in here."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from tests.service.http.browser import Page
from tests.service.support import Service

STAND_IN = """(async () => {
  const [realFetch, realTimeout] = [window.fetch, window.setTimeout];
  const [asked, pauses, seen] = [[], [], []];
  const answers = ANSWERS;
  sessionStorage.setItem("fewstep.key", "k");
  window.setTimeout = (action, ms) => { pauses.push(ms); return realTimeout(action, 0); };
  window.fetch = async (path, init = {}) => {
    asked.push([init.method ?? "GET", String(path), { ...init.headers }, init.body ?? null]);
    const [status, body] = answers.shift() ?? [599, null];
    if (status === 0) throw new TypeError("away");
    return new Response(typeof body === "string" ? body : JSON.stringify(body), { status });
  };
  const api = await import("./page/api.js");
  let result = null, error = null;
  const facts = (e) => [e.constructor.name, e.message, ...[e.status, e.code, e.param].map((fact) => fact ?? null)];
  try { result = await CALL; } catch (e) { error = facts(e); }
  finally {
    [window.fetch, window.setTimeout] = [realFetch, realTimeout];
    sessionStorage.removeItem("fewstep.key");
  }
  return { result, error, asked, pauses, seen };
})()"""


@pytest.fixture(scope="module")
def page(browser: Page, live: Service) -> Iterator[Page]:
    """The page after its own first questions."""
    browser.show(live.url + "/", width=500)
    browser.wait_for("document.querySelector('.about.ready') && document.getElementById('steps').value")
    yield browser
    browser.problems.clear()


def called(page: Page, call: str, answers: list[list[Any]]) -> Any:
    """A call of a function of api.js, where the service gives these answers; status 0: no connection."""
    return page.value(STAND_IN.replace("ANSWERS", json.dumps(answers)).replace("CALL", call))


def of_module(page: Page, module: str, expression: str, *values: Any) -> Any:
    """An expression of a module's ``m`` and the ``values``."""
    return page.value(f"import('./page/{module}.js').then((m) => ((values) => {expression})({json.dumps(values)}))")


def test_times_scores_and_bars(page: Page) -> None:
    seconds = [0.0, 0.0004, 0.0123, 0.9994, 1, 9.994, 10, 83.26]
    shown = of_module(page, "dom", "values[0].map(m.milliseconds)", seconds)
    assert shown == ["1 ms", "1 ms", "12 ms", "999 ms", "1.00 s", "9.99 s", "10.0 s", "83.3 s"]
    assert of_module(page, "dom", "values[0].map(m.signed)", [0, 1.234, -1.236]) == ["+0.00", "+1.23", "−1.24"]
    rows = of_module(
        page, "dom",
        "m.rewardRows(values[0]).map((one) => [one.tagName, one.className, one.textContent,"
        " one.firstElementChild?.style.left, one.firstElementChild?.style.width])",
        {"a": 1.5, "b": -6, "c": -0.3},
    )  # fmt: skip
    assert rows == [
        ["DT", "", "a", None, None], ["DIV", "bar", "", "50%", "25%"], ["DD", "", "+1.50", None, None],
        ["DT", "", "b", None, None], ["DIV", "bar below", "", "0%", "50%"], ["DD", "", "−6.00", None, None],
        ["DT", "", "c", None, None], ["DIV", "bar below", "", "45%", "5%"], ["DD", "", "−0.30", None, None],
    ]  # fmt: skip


CANDIDATES = [
    {"rank": 2, "reward": {"t": -1, "h": 0}, "steps": 2},
    {"rank": 1, "reward": {"t": 2, "h": 1}, "steps": 4},
    {"rank": 3, "reward": {}, "steps": 2},
]
EVENT = {"reward": {"h": 1, "t": 2}, "reported": {"h": 1}, "candidates": CANDIDATES, "steps": 4}


def test_how_a_picture_was_chosen(page: Page) -> None:
    def rows(**changes: Any) -> Any:
        return of_module(page, "quality", "m.candidateRows(values[0])", {**EVENT, **changes})

    said = {"chosen": "best of 3 by t", "candidates": "+2.00 (4), −1.00 (2), – (2)", "did not choose": "h +1.00"}
    assert rows() == rows(below_floor=None) == said
    assert rows(below_floor=True) == {**said, "floor": "below"} and rows(below_floor=False)["floor"] == "reached"
    assert rows(candidates=None) == {}
    alone = rows(candidates=CANDIDATES[1:2], reported=None, reward={"t": 2})
    assert alone == {"chosen": "generated once", "candidates": "+2.00 (4)", "did not choose": "–"}

    def under(**changes: Any) -> Any:
        words = "m.choice(values[0]).map((box) => [...box.children].map((one) => [one.className, one.textContent]))"
        return of_module(page, "quality", words, {**EVENT, **changes})

    assert under() == [[["", "best of 3 · 4 steps"]]] and under(candidates=None) == []
    assert under(steps=1, candidates=CANDIDATES[:1], below_floor=True) == [
        [["", "generated once · 1 step"], ["below-floor", "below the floor"]]
    ]


def test_what_a_job_says_of_the_floor(page: Page) -> None:
    lowered = {"min_reward": "p20", "score": -0.5, "percentile": 12.4, "lowered": True}
    jobs = [
        {"floor": lowered, "ended_by": "deadline"},
        {"floor": {"min_reward": 0.5, "score": 0.5, "percentile": None, "lowered": False}},
        {"floor": {**lowered, "lowered": False, "percentile": 19.6}},
        {},
    ]
    assert of_module(page, "quality", "values[0].map(m.floorFacts)", jobs) == [
        ["floor p20, lowered to −0.50 (p12) under load", "deadline: the best so far"],
        ["floor +0.50"],
        ["floor −0.50 (p20)"],
        [],
    ]


FORM = """((best, floor, more) => { const $ = (id) => document.getElementById(id); $("quality").hidden = false;
  $("best-of").value = best; $("floor").value = floor; $("more-steps").checked = more; return m; })"""
MODEL = {
    "steps": [1, 2, 4],
    "scorers": ["t", "h"],
    "bestOf": [
        {"steps": 4, "best_of": 4, "rank_by": "t", "gain": {"h": 0.2, "t": 0.9}},
        {"steps": 2, "best_of": 4, "rank_by": "t", "gain": {"t": -0.1}},
    ],
}


@pytest.mark.parametrize(
    ("best", "floor", "more", "steps", "asked", "hint"),
    [
        ("1", "", True, 4, {}, ""),
        ("4", "", True, 4, {"best_of": 4}, "Expected: +0.90 t (chooses), +0.20 h; 4 times the cost"),
        ("4", "", True, 2, {"best_of": 4}, "Expected: −0.10 t (chooses); 4 times the cost"),
        ("8", "", True, 4, {"best_of": 8}, "8 times the cost; what it gains was not measured for this model"),
        (
            "1", "p50", True, 1, {"min_reward": "p50", "cascade": [1, 2, 4]},
            "Images below the floor are generated again then at 2 and 4 steps; one costs 7 times as much at most",
        ),
        (
            "2", "p20", True, 2, {"min_reward": "p20", "best_of": 2, "cascade": [2, 4]},
            "Images below the floor are generated again with other seeds, then at 4 steps; one costs 6 times as much "
            "at most",
        ),
        (
            "4", "p20", False, 1, {"min_reward": "p20", "best_of": 4},
            "Images below the floor are generated again with other seeds; one costs 4 times as much at most",
        ),
        ("1", "p20", True, 4, {}, "A floor needs more candidates, or fewer steps to begin with"),
        ("1", "p20", False, 1, {}, "A floor needs more candidates, or fewer steps to begin with"),
    ],
)  # fmt: skip
def test_what_is_asked_for_and_what_it_is_said_to_cost(
    page: Page, best: str, floor: str, more: bool, steps: int, asked: dict[str, Any], hint: str
) -> None:
    set_form = f"{FORM}(...{json.dumps([best, floor, more])})"
    assert of_module(page, "quality", f"{set_form}.quality(values[0], values[1])", MODEL, steps) == asked
    shown = f"({set_form}.showQuality(values[0], values[1]), document.getElementById('quality-hint').textContent)"
    assert of_module(page, "quality", shown, MODEL, steps) == hint
    disabled = "document.getElementById('more-steps').disabled"
    assert page.value(disabled) is (not floor or steps == 4)
    without = f"({set_form}.showQuality({{...values[0], scorers: []}}, 4), m.quality(values[0], 4))"
    assert of_module(page, "quality", without, MODEL) == {}, "a student without a scorer"


def test_what_probes_drift_and_canaries_say(page: Page) -> None:
    lines, said = [], []
    for outcome, words in {
        "same": "generates identical images", "recorded": "generates the images recorded at its first probe here",
        "pixels_changed": "generates different images than before",
        "scores_changed": "generates identical images, but their scores have changed",
        "failed": "cannot generate its golden probe",
    }.items():  # fmt: skip
        lines += [f'fewstep_probe_workers{{model="m",version="1",outcome="{outcome}"}} 2.0']
        said += [[f"m 1 {words} (2 workers)", outcome not in ("same", "recorded")]]
    lines += ['fewstep_probe_workers{model="m",version="2",outcome="failed"} 0.0']
    for cause, words in {
        "engine": "the engine", "scorer": "a scorer", "model": "the model", "prompts": "the prompts",
        "unknown": "unknown", "another": "another",
    }.items():  # fmt: skip
        stream = f'model="m",version="1",steps="2",scorer="h",cause="{cause}"'
        lines += [f'fewstep_drift_alarm{{{stream},selected="{chosen}"}} 1.0' for chosen in ("false", "true")]
        said += [[f"h scores of m 1 at 2 steps have drifted: {words}", True]]
    for state, words in {
        "running": "is being compared", "promoted": "was promoted", "rolled_back": "was rolled back",
        "stopped": "was stopped", "other": "other",
    }.items():  # fmt: skip
        lines += [f'fewstep_canary_state{{model="{state}",base="1",candidate="2",state="{state}"}} 1.0']
        lines += [f'fewstep_canary_pairs{{model="{state}",base="1",candidate="2"}} 7.0'] if state != "other" else []
        said += [[f"{state} 2 {words}, against 1: {0 if state == 'other' else 7} pairs", state == "rolled_back"]]
    expression = "m.findings(values[0]).map(({ text, bad }) => [text, bad])"
    read = of_module(page, "panel", "m.samples(values[0])", "\n".join(lines))
    assert of_module(page, "health", expression, read) == said
    assert of_module(page, "health", "m.items(values[0]).map((one) => one.className)", read[:3]) == ["", "", "bad"]
    assert of_module(page, "health", expression, []) == []


def test_models_are_listed_with_what_can_be_chosen(page: Page) -> None:
    lengths = {"shortest": 1, "longest": 9, "step": 4, "compiled": None}
    said = called(page, "api.choices()", [[200, {"data": [
        {"id": "a", "versions": [
            {"version": "1", "latest": False, "steps": [4, 1, 10], "shows_steps": True, "scorers": ["t"],
             "best_of": [1]},
            {"version": "2", "latest": True, "steps": [2], "num_frames": 9, "fps": 8, "lengths": lengths},
        ]},
        {"id": "b"},
    ]}]])  # fmt: skip
    assert said["asked"] == [["GET", "v1/models", {}, None]]
    plain = {"scorers": [], "bestOf": [], "video": None}
    assert said["result"] == [
        {
            "model": "a", "version": "1", "latest": False, "steps": [1, 4, 10], "shows": True, "scorers": ["t"],
            "bestOf": [1], "video": None,
        },
        {**plain, "model": "a", "version": "2", "latest": True, "steps": [2],
         "video": {"frames": 9, "fps": 8, "lengths": lengths}},
        {**plain, "model": "b", "latest": True, "steps": []},
    ]  # fmt: skip


def test_a_job_is_posted_a_second_time_with_the_same_key_if_the_answer_was_lost(page: Page) -> None:
    said = called(page, "api.submit({ prompt: 'p' })", [[0, None], [202, {"id": "j"}]])
    assert said["result"] == {"id": "j"} and said["error"] is None and said["pauses"] == [300]
    first, second = said["asked"]
    assert first == second and first[:2] == ["POST", "generate"] and json.loads(first[3]) == {"prompt": "p"}
    key = first[2].pop("Idempotency-Key")
    assert len(bytes.fromhex(key)) == 16 and first[2] == {"Content-Type": "application/json", "Prefer": "respond-async"}
    another = called(page, "api.submit({ prompt: 'p' })", [[202, {"id": "j"}]])["asked"][0][2]["Idempotency-Key"]
    assert another != key
    gone = called(page, "api.submit({ prompt: 'p' })", [[0, None], [0, None]])
    assert gone["error"] == ["Error", "The service cannot be reached.", None, None, None] and len(gone["asked"]) == 2


def test_a_refusal_is_its_message_and_not_tried_again(page: Page) -> None:
    error = {"message": "No.", "code": "c", "param": "n"}
    said = called(page, "api.submit({})", [[422, {"error": error}]])
    assert said["error"] == ["Refusal", "No.", 422, "c", "n"] and len(said["asked"]) == 1
    said = called(page, "api.cancel('j')", [[502, "<html>"]])
    assert said["error"] == ["Refusal", "The service answered 502.", 502, None, None]
    assert said["asked"] == [["POST", "jobs/j/cancel", {}, None]]
    assert called(page, "api.cancel('j')", [[200, {"status": "cancelled"}]])["result"] == {"status": "cancelled"}


FOLLOW = "api.follow('j', (event) => seen.push([event.name, event.data]))"


def text(*events: tuple[int | None, str]) -> str:
    named = (f"id: {number}\n" if number is not None else "" for number, _ in events)
    return "".join(f"{id}event: {name}\r\ndata: {{}}\n\n" for id, (_, name) in zip(named, events, strict=True))


def test_a_stream_that_breaks_goes_on_after_its_last_event_until_the_end(page: Page) -> None:
    answers = [
        [200, text((0, "queued"), (3, "started"))],
        [0, None],
        [503, {"error": {"message": "full"}}],
        [200, text((4, "progress"), (None, "note")) + "id: 5\nevent: cut"],
        [200, text((1000, "done"))],
    ]
    said = called(page, FOLLOW, answers)
    assert said["error"] is None
    assert said["seen"] == [[name, {}] for name in ("queued", "started", "progress", "note", "done")]
    assert [one[:3] for one in said["asked"]] == [
        ["GET", "jobs/j/events", headers]
        for headers in ({}, *({"Last-Event-ID": at} for at in ("3", "3", "3", "4")))
    ]  # fmt: skip
    assert said["pauses"] == [600, 1200, 2400, 600], "an event gives it its tries back"


def test_a_stream_that_cannot_be_had_is_given_up(page: Page) -> None:
    said = called(page, FOLLOW, [[0, None]] * 9)
    assert said["error"][1] == "The service cannot be reached."
    assert (len(said["asked"]), said["pauses"]) == (5, [600, 1200, 2400, 4800])
    said = called(page, FOLLOW, [[404, {"error": {"message": "Unknown."}}]])
    assert said["error"][:3] == ["Refusal", "Unknown.", 404] and len(said["asked"]) == 1
    said = called(page, FOLLOW, [[200, text((7, "started"))], *[[200, ""]] * 9])
    assert said["error"][1] == "The connection was lost while the image was being generated."
    later = called(page, FOLLOW, [[200, text((0, "queued"), (2000, "scored"))]])
    assert later["error"] is None and len(later["asked"]) == 1


def test_a_request_is_shown_as_code_that_can_be_pasted(page: Page, live: Service) -> None:
    body = {"prompt": 'it\'s "red"', "n": 2, "seed": [1, 2], "cascade": None, "output_format": "mp4"}
    shown = """(m.showCode(values[0]), ((box) => {
      const [tabs, pre] = [[...box.querySelectorAll(".tabs button")], box.querySelector("pre")];
      const texts = tabs.map((tab) => (tab.click(), [tab.textContent, tab.ariaPressed, pre.textContent]));
      box.close();
      return texts;
    })(document.getElementById("snippet")))"""
    curl, python = of_module(page, "snippets", shown, [body, {"prompt": "p"}])
    assert (curl[:2], python[:2]) == (["curl", "true"], ["Python", "true"])
    head = f"curl -s {live.url}/generate \\\n  -H 'Content-Type: application/json' \\\n  -d "
    first = json.dumps(body, separators=(",", ":"), ensure_ascii=False).replace("'", "'\\''")
    assert curl[2] == f"""{head}'{first}'\n\n{head}'{{"prompt":"p"}}'"""
    code = [
        "import fewstep", "", f'with fewstep.Client("{live.url}") as client:',
        '    answer = client.generate("it\'s \\"red\\"", n=2, seed=[1, 2], cascade=None, output_format="mp4")',
        "    for picture in answer.data:", "        print(picture.seed, picture.reward)",
        '        picture.save(f"{picture.seed}.mp4")',
    ]  # fmt: skip
    assert python[2].split("\n\n", 2)[:2] == [code[0], "\n".join(code[2:])]
    assert python[2].endswith(
        'client.generate("p")\n' + "\n".join(code[4:6]) + '\n        picture.save(f"{picture.seed}.png")'
    )
    keyed = f"(sessionStorage.setItem('fewstep.key', 'k'), ((found) => (sessionStorage.clear(), found))({shown}))"
    curl, python = of_module(page, "snippets", keyed, [{"prompt": "p"}])
    assert '/generate \\\n  -H "Authorization: Bearer $FEWSTEP_API_KEY" \\\n  -H \'Content-Type' in curl[2]
    assert "as client:  # the key: FEWSTEP_API_KEY\n" in python[2]

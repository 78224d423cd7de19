"""The page on a service that needs keys: it asks, keeps the key for the tab, and asks again when it is refused."""

from __future__ import annotations

import json

import pytest

from service.keys import KeyStore
from tests.service.http.browser import Page
from tests.service.support import Service

ASKED = "document.querySelector('dialog.key[open]')"
ASK = """window.answers = []; fetch('generate', {method: 'POST', headers: {'Content-Type': 'application/json'},
  body: JSON.stringify({prompt: 'a red heart', seed: 1})}).then(async (response) =>
  window.answers.push([response.status, (await response.json()).data?.length ?? 0])); 0"""


@pytest.fixture
def page(browser: Page, keyed: tuple[Service, KeyStore]) -> Page:
    browser.show(keyed[0].url + "/")
    browser.value("sessionStorage.clear()")
    browser.show(keyed[0].url + "/")
    browser.problems.clear()
    return browser


def give(page: Page, key: str) -> None:
    page.wait_for(ASKED)
    page.value("document.querySelector('dialog.key input').focus()")
    page.type(key)
    page.press_enter()
    page.wait_for(f"!{ASKED} || document.querySelector('dialog.key input').value === ''")


def test_the_page_asks_once_and_keeps_the_key_for_the_tab_only(page: Page, keyed: tuple[Service, KeyStore]) -> None:
    _, text = keyed[1].create("ann")
    page.value(ASK)
    page.wait_for(ASKED)
    assert "An API key is needed" in page.value("document.querySelector('dialog.key p').textContent")
    give(page, text)
    page.wait_for("window.answers.length === 1")
    assert page.value("window.answers") == [[200, 1]]
    assert page.value("Object.values(sessionStorage)") == [text]
    assert page.value("localStorage.length") == 0 and page.value("document.cookie") == ""
    page.show(keyed[0].url + "/")
    page.value(ASK)
    page.wait_for("window.answers.length === 1")
    assert page.value("window.answers") == [[200, 1]] and not page.value(f"Boolean({ASKED})")
    # The 401 that led to the question is all that was ever wrong; the panel asked for the metrics once, in vain.
    others = [problem for problem in page.problems if "401" not in problem]
    assert len(others) <= 2 and all("403" in problem and "/metrics" in problem for problem in others)


def test_a_key_that_is_refused_is_forgotten_and_asked_for_again(page: Page, keyed: tuple[Service, KeyStore]) -> None:
    key, text = keyed[1].create("ann")
    page.value(ASK)
    give(page, "fewstep_wrong")
    page.wait_for(f"{ASKED} && {ASKED}.textContent.includes('not valid')")
    assert page.value("sessionStorage.length") == 0
    give(page, text)
    page.wait_for("window.answers.length === 1")
    keyed[1].revoke(key.id)
    page.value(ASK)
    page.wait_for(ASKED)
    page.value("document.querySelector('dialog.key .quiet').click()")
    page.wait_for("window.answers.length === 1")
    assert page.value("window.answers") == [[401, 0]] and page.value("sessionStorage.length") == 0


def test_several_requests_ask_once(page: Page, keyed: tuple[Service, KeyStore]) -> None:
    _, text = keyed[1].create("ann")
    page.value(
        "window.statuses = []; for (const k of [0, 1, 2]) fetch('openapi.json').then(r => statuses.push(r.status)); 0"
    )
    give(page, text)
    page.wait_for("window.statuses.length === 3")
    assert page.value("window.statuses") == [200, 200, 200] and not page.value(f"Boolean({ASKED})")


def test_the_key_is_sent_to_the_service_only(page: Page) -> None:
    page.value(f"sessionStorage.setItem('fewstep.key', {json.dumps('secret')})")
    sent = page.value("""(async () => {
      const seen = [], real = window.Request;
      window.Request = class extends real {
        constructor(input, init) { super(input, init); seen.push([this.url, this.headers.get('Authorization')]); }
      };
      await fetch('http://127.0.0.1:9/elsewhere').catch(() => null);
      await fetch('healthz');
      window.Request = real;
      return seen; })()""")
    assert [key for url, key in sent if ":9/" in url] == [None]
    assert [key for url, key in sent if url.endswith("/healthz")][-1] == "Bearer secret"


def test_links_that_cannot_carry_a_key_are_not_shown(page: Page, keyed: tuple[Service, KeyStore]) -> None:
    links = "[...document.querySelectorAll('footer a')].filter(a => !a.href.endsWith('/'))"
    shown = f"{links}.filter(a => a.offsetParent !== null).length"
    assert page.value(shown) > 0
    page.value("sessionStorage.setItem('fewstep.key', 'x')")
    page.show(keyed[0].url + "/")
    assert page.value(shown) == 0

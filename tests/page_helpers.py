"""What tests of the pages share: a server of the tiny model, a browser, a page that must not complain, pretended answers."""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

from nanochat.engine import Engine
from nanochat.server import create_app
from tests.helpers import serve

if TYPE_CHECKING:
    import playwright.sync_api as playwright

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.fixture
def url(engine: Engine) -> Iterator[str]:
    with serve(create_app([engine], "tiny")) as port:
        yield f"http://127.0.0.1:{port}"


@pytest.fixture(scope="module")
def _chromium() -> Iterator[playwright.Browser]:
    """Started once for a file of tests, since that costs more than most of them; no longer, since it blocks asyncio."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def browser(_chromium: playwright.Browser) -> Iterator[playwright.Browser]:
    """Without pages, cookies or storage of the tests before."""
    yield _chromium
    for context in _chromium.contexts:
        context.close()


@pytest.fixture
def page(url: str, browser: playwright.Browser) -> Iterator[playwright.Page]:
    """The chat page, with short answers; whatever is wrong in its console fails the test."""
    context = browser.new_context(viewport={"width": 1000, "height": 700})
    context.add_init_script(
        'localStorage.getItem("nanochat.settings") || localStorage.setItem("nanochat.settings", \'{"max_tokens": 16}\')'
    )
    page = context.new_page()
    complaints: list[str] = []
    page.on("console", lambda message: complaints.append(message.text) if message.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("request", lambda request: complaints.append(request.url) if not request.url.startswith((url, "data:")) else None)
    page.route("**/chat/completions", never_silent)
    page.goto(url)
    yield page
    # That hostile styles are refused is told in the console while they are being removed.
    assert [text for text in complaints if "Content Security Policy" not in text] == []


def never_silent(route: playwright.Route) -> None:
    """A model of a few steps often has nothing to say; here it must."""
    route.continue_(post_data=json.dumps({**route.request.post_data_json, "ignore_eos": True}))


def ask(page: playwright.Page, text: str) -> None:
    before = page.locator(".message.assistant").count()
    page.fill("#text", text)
    page.keyboard.press("Enter")
    page.locator(".message.assistant").nth(before).wait_for()
    settle(page)


def settle(page: playwright.Page) -> None:
    page.locator("#log:not([aria-busy])").wait_for()


def pretend(page: playwright.Page, *events: dict) -> None:
    """Answer in the server's place. A token continues the part before it if that is of its kind, or has its index."""
    for before, event in itertools.pairwise(({}, *events)):
        if "token" in event:
            event.setdefault("index", before.get("index", -1) + (event["part"] != before.get("part")))
    body = "".join(f"data: {json.dumps(event)}\n\n" for event in (*events, {"done": True, "finish_reason": "stop"}))
    page.route("**/chat/completions", lambda route: route.fulfill(body=body, content_type="text/event-stream"))

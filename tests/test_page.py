"""The pages in a real Chromium: talking, branching, looking inside, hostile output, a phone, the runs.

Skipped, saying so, where Playwright or Chromium is not installed.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from nanochat.engine import Engine
from nanochat.server import create_app
from nanochat.service import ChatDefaults
from tests.helpers import serve, wait_for
from tests.page_helpers import CHROMIUM, ask, never_silent, pretend, settle

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed: apt-get install chromium"),
]


def test_a_conversation_with_its_branches_is_kept(page: playwright.Page) -> None:
    ask(page, "first question")
    ask(page, "second question")
    assert page.locator(".message").count() == 4
    page.locator(".message.assistant").last.get_by_text("Regenerate").click()
    page.get_by_text("2/2").wait_for()
    settle(page)
    page.get_by_label("Previous version").last.click()
    assert "1/2" in page.locator(".message.assistant").last.inner_text()
    page.locator(".message.user").first.get_by_text("Edit").click()
    page.get_by_label("Edit the message").fill("another question")
    page.keyboard.press("Enter")
    page.locator(".message.user", has_text="another question").wait_for()
    page.locator(".message.assistant").wait_for()
    settle(page)
    assert page.locator(".message").count() == 2
    page.reload()
    assert page.locator(".message.user .content").inner_text() == "another question"
    page.get_by_label("Previous version").first.click()
    assert page.locator(".message").count() == 4
    page.keyboard.press("Control+Shift+O")
    assert page.locator(".message").count() == 0
    page.get_by_text("first question").click()
    assert page.locator(".message").count() == 4
    page.get_by_label("Delete first question").click()
    page.reload()
    assert page.locator(".message").count() == 0


def test_looking_inside(page: playwright.Page) -> None:
    page.get_by_text("Look inside").click()
    ask(page, "the cat sees")
    page.locator(".message.user .tokens span").first.wait_for()
    token = page.locator(".message.assistant .tokens span[tabindex]").first
    token.focus()
    assert "chosen:" in page.locator("#thought").inner_text()
    assert page.locator("#thought tr").count() == 5
    with page.expect_request("**/tokenize") as sent:
        page.get_by_text("The conversation as the model reads it").click()
    assert sent.value.post_data_json["max_tokens"] == 16  # which decide what there is room for
    page.get_by_text("<|user_start|>").wait_for()


def test_a_calculator_call_is_shown_and_sent_back(page: playwright.Page) -> None:
    call = (
        {"token": "2+3", "part": "python"},
        {"token": "5", "part": "python_output"},
        {"token": "It is **5**.", "part": "text"},
    )
    pretend(page, *call)
    ask(page, "2+3?")
    assert page.locator(".tool").all_inner_texts() == ["2+3", "5"]
    assert page.locator(".message.assistant strong").inner_text() == "5"
    with page.expect_request("**/chat/completions") as sent:
        ask(page, "and?")
    assert [part["type"] for part in sent.value.post_data_json["messages"][1]["content"]] == [
        "python",
        "python_output",
        "text",
    ]


HOSTILE = """<script>document.title = "owned"</script><img src=x onerror="document.title='owned'">
<iframe srcdoc="<script>parent.document.title='owned'</script>"></iframe><svg onload="document.title='owned'"></svg>
[link](javascript:document.title='owned') <a href="data:text/html,x" onclick="document.title='owned'">b</a>
<form action="/x"><input name="y"></form><style>body { display: none }</style> <b style="position:fixed">c</b>

```html
<script>alert(1)</script>
```
"""


def test_hostile_output_stays_text(page: playwright.Page) -> None:
    pretend(
        page, {"token": HOSTILE, "part": "text"}, {"token": "<img src=x onerror=document.title='owned'>", "part": "python"}
    )
    ask(page, "<img src=x onerror=document.title='owned'>")
    answer = page.locator(".message.assistant .content")
    for tag in ("script", "img", "iframe", "svg", "form", "input", "style", "object"):
        assert page.locator(f".message {tag}").count() == 0, tag
    for link in answer.locator("a").all():
        assert not (link.get_attribute("href") or "").startswith(("javascript", "data"))
        assert link.get_attribute("onclick") is None
    assert "<script>alert(1)</script>" in answer.locator("pre code").inner_text()
    assert page.locator(".message.user .content").inner_text() == "<img src=x onerror=document.title='owned'>"
    page.wait_for_timeout(200)
    assert page.title() == "nanochat"


@pytest.mark.parametrize("nested", [">" * 2000 + " deep <b>", "- " * 3000 + "deep <b>", "**a " * 5000 + "deep <b>"])
def test_markdown_that_is_nested_too_deep_is_shown_as_text(page: playwright.Page, nested: str) -> None:
    pretend(page, {"token": nested[:1000], "part": "text"}, {"token": nested[1000:], "part": "text"})
    ask(page, "how deep?")
    for _ in range(2):  # as it comes, and from the store
        assert "deep" in page.locator(".message.assistant .content").inner_text()
        assert page.locator(".message").count() == 2
        assert page.locator(".message b").count() == 0
        page.reload()
        page.locator(".message.assistant").wait_for()


def test_failures_are_told_and_can_be_tried_again(page: playwright.Page) -> None:
    failure = 'data: {"error": {"message": "too many requests are waiting"}}\n\n'
    page.route("**/chat/completions", lambda route: route.fulfill(body=failure, content_type="text/event-stream"))
    page.fill("#text", "hello")
    page.keyboard.press("Enter")
    page.get_by_role("alert").wait_for()
    assert "too many requests" in page.get_by_role("alert").inner_text()
    page.route("**/chat/completions", never_silent)
    page.get_by_text("Try again").click()
    page.locator(".message.assistant").wait_for()
    settle(page)
    assert page.get_by_role("alert").count() == 0


def test_an_answer_can_be_stopped(page: playwright.Page) -> None:
    """By the button and by Escape; what was asked stays, and the next question is answered."""
    page.route("**/chat/completions", lambda route: None)  # an answer that never comes
    for stop in (lambda: page.locator("#send").click(), lambda: page.keyboard.press("Escape")):
        page.fill("#text", "hello")
        page.keyboard.press("Enter")
        page.locator("#log[aria-busy]").wait_for()
        assert page.locator("#send").inner_text() == "Stop"
        stop()
        settle(page)
        assert "stopped" in page.locator(".message.assistant").last.inner_text()
        assert page.locator("#send").inner_text() == "Send"
    page.route("**/chat/completions", never_silent)
    ask(page, "hello again")
    assert page.locator(".message").count() == 6


def test_an_edit_outlives_the_answer(page: playwright.Page) -> None:
    """It can be sent while an answer is being written, and stays open when that ends."""
    held: list[playwright.Route] = []
    page.route("**/chat/completions", lambda route: held.append(route))
    page.fill("#text", "hello")
    page.keyboard.press("Enter")
    page.locator("#log[aria-busy]").wait_for()
    page.get_by_text("Edit").click()
    page.get_by_label("Edit the message").fill("rewritten")
    page.keyboard.press("Enter")
    page.locator(".message.user", has_text="rewritten").get_by_text("2/2").wait_for()
    page.get_by_text("Edit").click()
    page.get_by_label("Edit the message").fill("half")
    held[-1].fulfill(body='data: {"token": "ok", "part": "text"}\n\n', content_type="text/event-stream")
    settle(page)
    assert page.locator(".message.assistant .content").inner_text() == "ok"
    page.keyboard.type(" written")
    assert page.get_by_label("Edit the message").input_value() == "half written"
    page.keyboard.press("Escape")
    assert page.locator(".message.user .content").inner_text() == "rewritten"


def test_an_answer_is_drawn_in_its_own_conversation_alone(page: playwright.Page) -> None:
    """Even if it goes on for a while after it was stopped, and a frame of it is still to be drawn."""
    pretend(page, {"token": "the first answer", "part": "text"})
    ask(page, "first question")
    page.keyboard.press("Control+Shift+O")
    page.evaluate("""() => {
        const other = [...document.querySelectorAll("#conversations .open")].find((b) => b.textContent === "first question");
        const later = window.requestAnimationFrame.bind(window);
        window.requestAnimationFrame = (draw) => { later(draw); other.click(); };
        const data = (event) => new TextEncoder().encode(`data: ${JSON.stringify(event)}\n\n`);
        window.fetch = async () => new Response(new ReadableStream({ start(c) {
            c.enqueue(data({ token: "another answer", part: "text" }));
            window.end = () => { c.enqueue(data({ done: true })); c.close(); };
        } }));
    }""")
    page.fill("#text", "second question")
    page.keyboard.press("Enter")
    page.get_by_text("the first answer").wait_for()
    page.evaluate("() => new Promise((done) => { setTimeout(done, 100); })")  # some frames
    assert page.locator(".message.assistant .content").all_inner_texts() == ["the first answer"]
    page.evaluate("window.end()")
    settle(page)
    page.locator("#conversations").get_by_text("second question").click()
    assert page.locator(".message.assistant .content").all_inner_texts() == ["another answer"]


def test_a_reader_who_went_up_stays_there(page: playwright.Page) -> None:
    for i in range(6):
        pretend(page, {"token": f"line {i}\n\n" * 20, "part": "text"})
        ask(page, f"question {i}")
    place = "document.getElementById('log').scrollTop"
    page.evaluate(f"{place} = 300")
    page.get_by_text("Look inside").click()
    assert abs(page.evaluate(place) - 300) < 20  # but for what has become longer above
    ask(page, "another")
    assert page.evaluate(place) > 300  # who asks wants to see the answer


def test_answers_can_be_copied_from_another_machine(page: playwright.Page) -> None:
    """Over plain HTTP browsers give pages no clipboard."""
    page.evaluate("Object.defineProperty(navigator, 'clipboard', { value: undefined })")
    page.evaluate("document.addEventListener('copy', () => { window.copied = document.activeElement.value; })")
    ask(page, "a question")
    page.locator(".message.user").get_by_text("Copy").click()
    page.get_by_text("Copied").wait_for()
    assert page.evaluate("window.copied") == "a question"


def test_a_question_that_failed_is_not_read_with_the_next(page: playwright.Page) -> None:
    pretend(page, {"token": "ok", "part": "text"})
    ask(page, "first")
    failure = 'data: {"error": {"message": "too long"}}\n\n'
    page.route("**/chat/completions", lambda route: route.fulfill(body=failure, content_type="text/event-stream"))
    page.fill("#text", "word " * 3000)
    page.keyboard.press("Enter")
    page.get_by_role("alert").wait_for()
    pretend(page, {"token": "ok", "part": "text"})
    with page.expect_request("**/chat/completions") as sent:
        ask(page, "second")
    assert [message["content"] for message in sent.value.post_data_json["messages"] if message["role"] == "user"] == [
        "first",
        "second",
    ]
    page.locator(".message.user", has_text="second").get_by_text("2/2").wait_for()


def _focused(page: playwright.Page) -> str:
    """The name of what has the focus, or the id of what has none."""
    return page.evaluate(
        "(({ title, ariaLabel, textContent, id }) => id || title || ariaLabel || textContent)(document.activeElement)"
    )


def test_the_keyboards_place_is_kept(page: playwright.Page) -> None:
    """What is pressed is drawn anew: the focus goes to what took its place, and never to the top of the page."""
    for question in ("first", "second"):
        page.locator("#new").click()
        ask(page, question)
    page.locator(".message.assistant").get_by_text("Regenerate").focus()
    page.keyboard.press("Enter")
    page.get_by_text("2/2").wait_for()
    settle(page)
    assert _focused(page) == "log"
    for name, version in (("Previous version", "1/2"), ("Next version", "2/2")):
        page.get_by_label(name).focus()
        page.keyboard.press("Enter")
        page.get_by_text(version).wait_for()
        assert _focused(page) == name
    for way in ("Escape", "Tab+Enter"):
        page.get_by_text("Edit", exact=True).focus()
        page.keyboard.press("Enter")
        assert _focused(page) == "Edit the message"
        for key in way.split("+"):
            page.keyboard.press(key)
        assert _focused(page) == "Edit"
    page.locator("#conversations .open", has_text="first").focus()
    page.keyboard.press("Enter")
    page.locator(".message.user", has_text="first").wait_for()
    assert _focused(page) == "first"
    page.get_by_title("Delete").first.focus()
    page.keyboard.press("Enter")
    assert _focused(page) == "Undo" and page.locator(".message").count() == 2
    page.keyboard.press("Enter")
    assert _focused(page) == "second"
    page.locator("#conversations .open", has_text="first").wait_for()


def test_an_input_methods_enter_sends_nothing(page: playwright.Page) -> None:
    """As Safari sends it when a word is chosen: the composition is over by then, and only the key code tells."""
    page.fill("#text", "にほん")
    page.evaluate("""document.getElementById("text").dispatchEvent(
        new KeyboardEvent("keydown", { key: "Enter", keyCode: 229, bubbles: true, cancelable: true }))""")
    assert page.locator(".message").count() == 0
    assert page.locator("#text").input_value() == "にほん"


def test_calls_that_follow_each_other_at_once_are_shown_and_sent_back_apart(page: playwright.Page) -> None:
    pretend(page, {"token": "1/0", "part": "python", "index": 0}, {"token": "2+", "part": "python", "index": 1},
             {"token": "2", "part": "python", "index": 1}, {"token": "4", "part": "python_output", "index": 2})  # fmt: skip
    ask(page, "2+2?")
    assert page.locator(".tool").all_inner_texts() == ["1/0", "2+2", "4"]
    with page.expect_request("**/chat/completions") as sent:
        ask(page, "and?")
    assert [part["text"] for part in sent.value.post_data_json["messages"][1]["content"]] == ["1/0", "2+2", "4"]


def test_settings_are_kept_and_used(page: playwright.Page) -> None:
    page.locator("#open-settings").click()
    page.locator("[name=max_tokens]").fill("3")
    page.locator("[name=theme]").select_option("dark")
    page.locator("[name=system]").fill("Be kind.")
    page.keyboard.press("Escape")
    page.reload()
    assert page.locator("html").get_attribute("data-theme") == "dark"
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(23, 24, 26)"  # on a light system
    with page.expect_request("**/chat/completions") as sent:
        ask(page, "hello")
    assert sent.value.post_data_json["max_tokens"] == 3
    assert sent.value.post_data_json["messages"][0] == {"role": "system", "content": "Be kind."}


def test_settings_that_nobody_chose_are_the_servers(engine: Engine, browser: playwright.Browser) -> None:
    """A chosen one stays, until it is what the server says anyway; "Defaults" brings back what that is."""
    with serve(create_app([engine], "tiny", defaults=ChatDefaults(0.35, 7, 9))) as port:
        page = browser.new_page()
        page.add_init_script('localStorage.setItem("nanochat.settings", \'{"max_tokens": 4, "top_k": 7}\')')
        with page.expect_response("**/health"):
            page.goto(f"http://127.0.0.1:{port}")
        with page.expect_request("**/chat/completions") as sent:
            ask(page, "hello")
        asked = [sent.value.post_data_json[name] for name in ("temperature", "top_k", "max_tokens")]
        assert asked == [0.35, 7, 4]
        page.locator("#open-settings").click()
        page.locator("#reset-settings").click()
        assert page.locator("[name=max_tokens]").input_value() == "9"
        assert page.evaluate('localStorage.getItem("nanochat.settings")') == "{}"


def test_any_settings_of_the_server_are_shown_as_they_are(engine: Engine, browser: playwright.Browser) -> None:
    """Also those beyond the sliders and between their steps; and they keep nobody from closing the dialog."""
    with serve(create_app([engine], "tiny", defaults=ChatDefaults(2.33, 2000, 8192))) as port:
        page = browser.new_page()
        with page.expect_response("**/health"):
            page.goto(f"http://127.0.0.1:{port}")
        page.get_by_text("tiny", exact=True).wait_for()
        page.locator("#open-settings").click()
        assert page.locator("label", has_text="Temperature").locator("output").inner_text() == "2.33"
        page.locator("[name=max_tokens]").fill("9000")
        page.get_by_text("Done").click()
        page.locator("#settings").wait_for(state="hidden")
        with page.expect_request("**/chat/completions") as sent:
            ask(page, "hello")
        assert [sent.value.post_data_json[name] for name in ("temperature", "top_k", "max_tokens")] == [2.33, 2000, 9000]


def test_a_phone_has_room_for_everything(url: str, browser: playwright.Browser) -> None:
    page = browser.new_context(viewport={"width": 360, "height": 640}, is_mobile=True, has_touch=True).new_page()
    page.goto(url)
    assert not page.locator("#sidebar").is_visible()
    page.get_by_label("Show conversations").tap()
    page.locator("#new").wait_for()
    page.locator("#new").tap()
    page.locator("#sidebar").wait_for(state="hidden")
    page.get_by_label("Show conversations").tap()
    page.keyboard.press("Escape")
    page.locator("#sidebar").wait_for(state="hidden")
    assert _focused(page) == "open-sidebar"
    page.locator("#text").tap()
    page.keyboard.type("one")
    page.keyboard.press("Enter")  # phones have no Shift+Enter
    page.keyboard.type("two")
    assert page.locator("#text").input_value() == "one\ntwo"
    for name in ("#text", "#send", "#inside", "#open-settings"):
        box = page.locator(name).bounding_box()
        assert box["x"] >= 0 and box["x"] + box["width"] <= 360
        assert box["y"] + box["height"] <= 640


def test_the_runs_page_draws_the_curves(url: str, page: playwright.Page) -> None:
    page.goto(f"{url}/runs")
    page.get_by_text("Pretraining").wait_for()
    page.get_by_text("Fine-tuning").wait_for()
    titles = page.locator("figcaption span").all_inner_texts()
    assert "validation bits per byte" in titles and "training loss, nats per token (smoothed)" in titles
    assert len(page.locator("polyline").first.get_attribute("points").split()) == 6
    widths = page.locator("polyline").evaluate_all(
        "all => all.map(l => [new Set(l.getAttribute('points').split(' ')).size, parseFloat(getComputedStyle(l).strokeWidth)])"
    )
    assert {points > 1 for points, _ in widths} == {True, False}
    assert all((width > 5) == (points == 1) for points, width in widths)  # a single point is to be seen


def test_the_runs_page_leaves_the_reader_where_they_are(url: str, page: playwright.Page, tiny_run: Path) -> None:
    page.goto(f"{url}/runs")
    page.locator("summary").first.focus()
    page.evaluate("window.before = document.querySelector('summary')")
    with page.expect_response("**/api/runs/tiny", timeout=10_000):
        pass
    assert page.evaluate("document.querySelector('summary') === window.before")  # nothing is new
    with open(tiny_run / "base" / "metrics.jsonl", "a", encoding="utf-8") as file:
        file.write('{"step": 7, "time_s": 1.0, "val/bpb": 1.5}\n')
    wait_for(lambda: page.evaluate("document.querySelector('summary') !== window.before"), "the new curve")
    assert page.evaluate("document.activeElement === document.querySelector('summary')")


def test_the_pages_work_below_a_path(engine: Engine, browser: playwright.Browser) -> None:
    """As behind a proxy that takes the path away, and answers everything beside it with 404."""
    app = create_app([engine], "tiny")

    async def proxy(scope: dict[str, Any], receive: Any, send: Any) -> None:
        if scope["type"] == "http":
            path = scope["path"].removeprefix("/below")
            scope = {**scope, "path": "/no/such" if path == scope["path"] else path, "raw_path": path.encode()}
        await app(scope, receive, send)

    with serve(proxy) as port:
        page = browser.new_page()
        page.route("**/chat/completions", never_silent)
        page.goto(f"http://127.0.0.1:{port}/below/")
        page.locator("#model", has_text="tiny").wait_for()
        ask(page, "hello")
        page.click("#inside")
        page.locator(".message.user .tokens span").first.wait_for()
        page.get_by_text("Runs").click()
        page.get_by_text("Fine-tuning").wait_for()
        page.get_by_text("Chat").click()
        page.locator(".message.user", has_text="hello").wait_for()
        assert page.get_by_text("API", exact=True).evaluate("(link) => link.href").endswith("/below/docs")


def test_a_key_that_cannot_be_sent_is_named(page: playwright.Page) -> None:
    """Browsers refuse it with the same words as if no server answered."""
    page.click("#open-settings")
    page.fill("[name=api_key]", "ключ")
    page.keyboard.press("Escape")
    page.fill("#text", "hello")
    page.keyboard.press("Enter")
    page.get_by_role("alert").wait_for()
    assert "the API key" in page.get_by_role("alert").inner_text() and "“к”" in page.get_by_role("alert").inner_text()

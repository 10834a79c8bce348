"""What the browser keeps of conversations and settings: past a reload, in two tabs, when its storage is full."""

from __future__ import annotations

import json

import pytest

from tests.page_helpers import CHROMIUM, ask, pretend, settle

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed: apt-get install chromium"),
]
OK = {"token": "ok", "part": "text"}
HALF = """() => { window.fetch = async (path, { signal }) => new Response(new ReadableStream({ start(c) {
    signal?.addEventListener("abort", () => c.error(signal.reason));
    const data = (event) => c.enqueue(new TextEncoder().encode(`data: ${JSON.stringify(event)}\\n\\n`));
    data({ token: "half of it", part: "text" });
    window.more = (text) => data({ token: text, part: "text" });
    window.lose = () => c.error(new TypeError("network error"));
    window.end = () => { data({ done: true }); c.close(); };
} }), { headers: { "Content-Type": "text/event-stream" } }); }"""


def _tab(page: playwright.Page) -> playwright.Page:
    """Another tab of the same browser."""
    other = page.context.new_page()
    other.goto(page.url)
    for tab in (page, other):
        tab.unroute("**/chat/completions")
        pretend(tab, OK)
    return other


def _answer_half(page: playwright.Page) -> None:
    """What comes after that, `window.more(text)`, `lose()` and `end()` say."""
    page.evaluate(HALF)
    page.fill("#text", "tell me")
    page.keyboard.press("Enter")
    page.get_by_text("half of it").wait_for()


def _stored(page: playwright.Page) -> list[dict]:
    return json.loads(page.evaluate("localStorage.getItem('nanochat.conversations')"))


def test_a_conversation_that_goes_on_is_no_longer_deleted(page: playwright.Page) -> None:
    """Whoever asks anew wants to keep it; an answer that was still coming when it was deleted does not bring it back."""
    other = _tab(page)
    ask(page, "of both")
    other.reload()  # there it is shown
    page.get_by_label("Delete of both").click()
    ask(other, "and then?")
    (kept,) = _stored(page)
    assert sorted(node["content"] for node in kept["nodes"].values() if node.get("role") == "user") == ["and then?", "of both"]
    _answer_half(other)
    page.reload()
    page.get_by_label("Delete of both").click()
    other.evaluate("window.end()")
    settle(other)
    assert _stored(page) == []


def test_tabs_keep_each_others_messages(page: playwright.Page) -> None:
    """What one stores, the other shows at once, and leaves alone what is typed, edited or being answered there."""
    ask(page, "of both")
    other = _tab(page)
    other.fill("#text", "a draft")
    _answer_half(page)
    other.get_by_text("tell me").wait_for()
    other.get_by_text("Edit").first.click()
    other.get_by_label("Edit the message").fill("half written")
    ask(other, "and then?")  # beside the question that has no answer yet
    page.locator(".message.user", has_text="tell me").get_by_text("1/2").wait_for()
    page.evaluate("window.more(' and the rest')")
    page.get_by_text("half of it and the rest").wait_for()
    page.evaluate("window.end()")
    settle(page)
    other.get_by_label("Previous version").last.click()
    other.get_by_text("half of it and the rest").wait_for()
    assert other.get_by_label("Edit the message").input_value() == "half written"
    other.fill("#text", "another draft")
    page.reload()
    pretend(page, OK)
    for tab, question in ((page, "of one"), (other, "of the other")):
        tab.locator("#new").click()
        ask(tab, question)
    other.fill("#text", "a draft")
    page.get_by_label("Delete of one").click()
    other.get_by_label("Delete of one").wait_for(state="detached")
    page.get_by_text("Undo").click()
    other.get_by_label("Delete of one").wait_for()
    assert other.locator("#text").input_value() == "a draft"
    page.reload()
    assert sorted(page.locator("#conversations .open").all_inner_texts()) == ["of both", "of one", "of the other"]


def test_a_deletion_can_be_undone(page: playwright.Page) -> None:
    """Where it happened, until the next question; of the conversation that is shown, too, whose answer is kept so far."""
    pretend(page, OK)
    ask(page, "first")
    page.locator("#new").click()
    _answer_half(page)
    page.get_by_label("Delete tell me").click()
    assert [node["title"] for node in _stored(page)] == ["first"]
    page.keyboard.press("Enter")  # the focus is on "Undo"
    page.locator("#conversations .open", has_text="tell me").click()
    assert "half of it" in page.locator(".message.assistant").inner_text()
    page.reload()
    assert page.locator("#conversations .open").all_inner_texts() == ["tell me", "first"]
    page.get_by_label("Delete first").click()
    ask(page, "and?")
    assert page.get_by_text("Undo").count() == 0 and [node["title"] for node in _stored(page)] == ["tell me"]


def test_the_conversation_that_is_open_goes_on(page: playwright.Page) -> None:
    """Whoever opens it again, as on a phone to close the list, does not stop its answer."""
    _answer_half(page)
    page.locator("#conversations .open", has_text="tell me").click()
    page.evaluate("window.more(' and the rest')")
    page.get_by_text("half of it and the rest").wait_for()


def test_a_full_storage_forgets_the_oldest_first(page: playwright.Page) -> None:
    """First what lies inside old answers, then the oldest conversations; a page that cannot keep even the newest says so."""
    store, size = "nanochat.conversations", 4000
    old = []
    for name in "ab":
        root = {"id": "root", "children": [name], "chosen": 0}
        said = {"id": name, "parent": "root", "role": "user", "content": name * size, "children": [], "chosen": 0}
        old.append({"id": name, "title": name, "nodes": {"root": root, name: said}})
    old[0]["nodes"]["a"]["tokens"] = [{"text": "t" * size}]
    page.evaluate("([key, old]) => localStorage.setItem(key, JSON.stringify(old))", [store, old])
    page.reload()
    pretend(page, {"token": "ok", "part": "text"})
    fill = """() => {
        const put = (size) => localStorage.setItem("rest", "x".repeat(size));
        const fits = (size) => { try { put(size); return true; } catch { return false; } };
        let size = 0;
        for (let step = 2 ** 23; step >= 1; step /= 2) if (fits(size + step)) size += step;
        put(size);
    }"""
    for question, left in (("new", ["new", "a", "b"]), ("n" * 1000, ["n" * 60, "new", "a"])):
        page.evaluate(fill)
        page.locator("#new").click()
        ask(page, question)
        kept = page.evaluate("(key) => localStorage.getItem(key)", store)
        assert [conversation["title"] for conversation in json.loads(kept)] == left
        assert "tokens" not in kept
    page.locator("#new").click()
    ask(page, "z" * 20000)
    page.get_by_text("this browser's storage is full").wait_for()


def test_what_another_tab_had_no_room_for_is_stored_again(page: playwright.Page) -> None:
    """Only what somebody deleted stays so."""
    ask(page, "first")
    page.evaluate("() => localStorage.setItem('nanochat.conversations', '[]')")  # as another tab does whose storage is full
    ask(page, "second")
    (kept,) = json.loads(page.evaluate("() => localStorage.getItem('nanochat.conversations')"))
    assert [node.get("content") for node in kept["nodes"].values() if node.get("role") == "user"] == ["first", "second"]


def test_a_question_is_kept_before_it_is_answered(page: playwright.Page) -> None:
    page.route("**/chat/completions", lambda route: None)
    page.fill("#text", "a long question")
    page.keyboard.press("Enter")
    page.locator("#log[aria-busy]").wait_for()
    page.reload()
    assert page.locator(".message.user .content").inner_text() == "a long question"
    page.unroute_all()
    page.get_by_text("Try again").click()
    page.locator(".message.assistant").wait_for()
    settle(page)
    assert page.get_by_text("Try again").count() == 0


def test_a_half_written_answer_outlives_a_reload(page: playwright.Page) -> None:
    _answer_half(page)
    page.reload()
    assert "half of it" in page.locator(".message.assistant").inner_text()
    assert "stopped" in page.locator(".message.assistant").inner_text()


def test_a_hidden_page_keeps_what_came(page: playwright.Page) -> None:
    """A phone ends it without a word; a page that is left says that the answer was stopped, even if its end is an error."""
    _answer_half(page)
    page.evaluate("""() => {
        Object.defineProperty(document, "hidden", { value: true, configurable: true });
        document.dispatchEvent(new Event("visibilitychange"));
    }""")
    (kept,) = _stored(page)
    (answer,) = [node for node in kept["nodes"].values() if node.get("role") == "assistant"]
    assert answer["content"] == [{"type": "text", "text": "half of it"}] and "note" not in answer
    page.evaluate("() => { delete document.hidden; dispatchEvent(new Event('pagehide')); window.lose(); }")
    settle(page)
    assert page.locator(".message.assistant .note").inner_text() == "stopped"


def test_tabs_keep_each_others_settings(page: playwright.Page) -> None:
    """And "Defaults" keeps what is nobody's default: the key and the system prompt."""
    other = page.context.new_page()
    other.goto(page.url)
    for tab, name, value in ((page, "api_key", "secret"), (other, "system", "Be kind."), (page, "top_k", "7")):
        tab.click("#open-settings")
        tab.fill(f"[name={name}]", value)
        tab.keyboard.press("Escape")
    kept = "JSON.parse(localStorage.getItem('nanochat.settings'))"
    assert page.evaluate(kept) == {"max_tokens": 16, "api_key": "secret", "system": "Be kind.", "top_k": "7"}
    page.reload()
    page.click("#open-settings")
    page.click("#reset-settings")
    assert page.evaluate(kept) == {"api_key": "secret", "system": "Be kind."}

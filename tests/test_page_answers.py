"""How answers look on the chat page: whatever they hold is there to be read, and what was cut off says so."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Callable
from typing import Any

import pytest

from nanochat.engine import Engine
from nanochat.server import create_app
from tests.helpers import serve
from tests.page_helpers import CHROMIUM, ask, pretend, settle

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed: apt-get install chromium"),
]
LOST = "The connection to the server was lost: check the network and whether the server still runs, then try again."
TEXT, CALL, RESULT = "text", "python", "python_output"


def _answer(page: playwright.Page, *parts: tuple[str, str]) -> playwright.Locator:
    """The content of an answer that is made of these (type, text)."""
    page.unroute("**/chat/completions")
    pretend(page, *({"token": text, "part": kind} for kind, text in parts))
    ask(page, "?")
    return page.locator(".message.assistant .content").last


def _fulfill(body: str) -> Callable[[playwright.Route], None]:
    return lambda route: route.fulfill(body=body, content_type="text/event-stream")


@pytest.mark.parametrize(
    "text",
    [
        "Use std::vector<int> here, not List<String>.", "if x<y and y>z then stop", "Dear <name>,", "2*3*4 = 24",
        "![a picture](https://example.com/x.png) of <it>", "[note]: this line is seen",
        "a <form> tag and a <script> tag, then go on", "2**3**4 and (1+2)*3*(4)", "<!-- a comment --> is seen", "3*x*2",
    ],
)  # fmt: skip
def test_what_looks_like_something_else_is_shown(page: playwright.Page, text: str) -> None:
    assert _answer(page, (TEXT, text)).inner_text() == text


def test_markdown_is_still_markdown(page: playwright.Page) -> None:
    content = _answer(page, (TEXT, "*a* **b** `x<y` <https://example.com> (*c*)\n\n- one\n- [x] two\n\n1. **3 apples**"))
    assert content.inner_text().split() == ["a", "b", "x<y", "https://example.com", "(c)", "one", "☑", "two", "3", "apples"]
    for selector, count in (("em", 2), ("strong", 2), ("code", 1), ("a", 1), ("ul li", 2), ("ol li", 1)):
        assert content.locator(selector).count() == count, selector


def test_text_around_the_calculator_is_one_text(page: playwright.Page) -> None:
    """What comes after a result begins no list, and a list goes on after one."""
    content = _answer(page, (CALL, "16-3"), (RESULT, "13"), (TEXT, " - 4 are left.\n\n1. It is "), (CALL, "9*2"),
                      (RESULT, "18"), (TEXT, "\n2. so \ue0000\ue001 **she**"))  # fmt: skip
    assert content.locator("ul").count() == 0
    assert content.locator("ol li").count() == 2
    assert content.locator(".tool").all_inner_texts() == ["16-3", "13", "9*2", "18"]
    assert "- 4 are left." in content.inner_text() and content.locator("strong").inner_text() == "she"


def test_latex_is_shown_as_it_was_written(page: playwright.Page) -> None:
    """But not in code; Markdown's own escapes and prices stay what they are."""
    for latex in (
        r"so \(a_1 * b_1\) and \(\frac{1}{2}\{x\}\) hold", "\\[\nx_1 * y_1\n+ z\n- 2 < 3\n\\]", "is $$a_1*b*c_1$$ so",
        "$$\n\\\\ a\n= b\n$$",
        r"if $a_1$, $\{b_1\}$ or $c$ holds", r"Then:\[\alpha_1\] and \[\beta_1\] hold", "a\n\\[\n1. b\n\\]\nc",
    ):  # fmt: skip
        content = _answer(page, (TEXT, latex))
        assert content.inner_text().replace("\n\n", "\n") == latex
        assert content.locator("em, li, h1").count() == 0
    for text, shown in (
        (r"2 \* 3 \_ \\ 4 costs *$5* and *$6*, or ($5 and $6)", r"2 * 3 _ \ 4 costs $5 and $6, or ($5 and $6)"),
        (r"`\(a\)`, `$5` and *so* `$6`", r"\(a\), $5 and so $6"),
        ("$5, *each*, or $6", "$5, each, or $6"),
        (r"not closed: \( *a* $ *b*", "not closed: ( a $ b"),
    ):
        assert _answer(page, (TEXT, text)).inner_text() == shown
    content = _answer(page, (TEXT, "- one:\n  \\[\n  a_1*b_1\n  \\]\n- two\n\n```\n\\[a\\]\n```"))
    assert content.locator("ul > li").count() == 2 and r"\[a\]" in content.locator("pre code").inner_text()
    assert "a_1*b_1" in content.inner_text() and "\\[" in content.locator("li").first.inner_text()


def test_no_call_of_the_calculator_is_lost(page: playwright.Page) -> None:
    """Not where it stands in a link's address, nor in code."""
    content = _answer(page, (TEXT, "[see](http://x/"), (CALL, "1+2"), (RESULT, "3"), (TEXT, ") `"), (CALL, "4"), (TEXT, "`"))
    assert sorted(content.locator(".tool").all_inner_texts()) == ["1+2", "3", "4"]


def test_an_answer_that_was_cut_off_says_so(page: playwright.Page) -> None:
    for end, reason in (("", "The connection ended before"), ('data: {"error": {"message": "gone"}}\n\n', "gone")):
        page.unroute("**/chat/completions")
        body = f'data: {{"token": "Half of it", "part": "text"}}\n\n{end}'
        page.route("**/chat/completions", _fulfill(body))
        ask(page, "?")
        assert reason in page.locator(".error").inner_text()
        assert "cut off" in page.locator(".message.assistant").last.inner_text()
    page.reload()
    assert page.get_by_text("cut off").count() == 2


def test_a_lost_connection_is_told_and_what_came_stays(engine: Engine, browser: playwright.Browser) -> None:
    """While an answer comes, before it, and for what else is asked of the server: never in the browser's own words."""
    app = create_app([engine], "tiny")
    half = b'data: {"token": "Half of it", "part": "text"}\n\n'

    async def breaking_off(scope: dict[str, Any], receive: Any, send: Any) -> None:
        if scope["type"] == "http" and scope["path"] == "/chat/completions":
            headers = [(b"content-type", b"text/event-stream"), (b"content-length", b"1000")]
            await send({"type": "http.response.start", "status": 200, "headers": headers})
            await send({"type": "http.response.body", "body": half, "more_body": True})
            await asyncio.sleep(0.5)  # what comes together with its end, browsers may drop
            return  # the server then closes the connection
        await app(scope, receive, send)

    with serve(breaking_off) as port:
        page = browser.new_page()
        page.goto(f"http://127.0.0.1:{port}")
        ask(page, "?")
        assert page.locator(".error").inner_text() == LOST
        assert "Half of it" in page.locator(".message.assistant").inner_text()
        assert "cut off" in page.locator(".message.assistant").inner_text()
        page.reload()
        assert "Half of it" in page.locator(".message.assistant").inner_text()
    page.get_by_text("Regenerate").click()
    page.get_by_text("is it still running?").wait_for()
    assert "Half of it" in page.locator(".message.assistant").inner_text()
    shown = page.evaluate("import('/ui/api.js').then((api) => api.get('/health')).catch((error) => error.message)")
    assert shown == "The server does not answer: is it still running?"


def test_a_thought_leaves_with_its_token(page: playwright.Page) -> None:
    page.click("#inside")
    page.unroute("**/chat/completions")
    pretend(page, {"token": "Hi", "part": "text"}, {"tokens": [{"text": "Hi", "logprob": -0.1, "top": [["Hi", -0.1]]}]})
    ask(page, "?")
    for leave in ("Escape", "Control+Shift+O"):
        page.locator(".tokens [tabindex]").last.hover()
        page.locator("#thought:not([hidden])").wait_for()
        page.keyboard.press(leave)
        page.locator("#thought").wait_for(state="hidden")
        page.mouse.move(0, 0)


NAMES = ["The", " ", "cat", "<|python_start|>", "2+3", "<|python_end|>", "5", "\n", "<|assistant_end|>"]
TOKENS = [
    {"text": name, "logprob": None if name == "5" else -0.5,
     "top": [["<|python_start|>", -0.5], ["<|assistant_end|>", -2], ["long " * 20, -3], [" ", -4], ["\n", -5]]}
    for name in NAMES
]  # fmt: skip
FOCUSED = "document.activeElement.ariaLabel"


def test_the_keyboard_goes_from_token_to_token(page: playwright.Page) -> None:
    """Tab comes to the tokens of an answer once, and past all of them with the next; each has a name to be read out."""
    page.click("#inside")
    page.unroute("**/chat/completions")
    pretend(page, {"token": "The cat", "part": "text"}, {"tokens": TOKENS})
    ask(page, "?")
    tokens = page.get_by_role("option")
    names = [token.get_attribute("aria-label") for token in tokens.all()]
    assert names[:2] == ["The, 61%", "space, 61%"] and names[6:8] == ["5, given", "line break, 61%"]
    page.locator(".tokens [tabindex='0']").focus()
    went = [page.evaluate(FOCUSED)]
    for _ in names[1:]:
        page.keyboard.press("ArrowRight")
        went.append(page.evaluate(FOCUSED))
    assert went == names
    for shortcut in ("Control+Home", "Shift+ArrowLeft"):  # these are the browser's
        page.keyboard.press(shortcut)
        assert page.evaluate(FOCUSED) == names[-1]
    page.keyboard.press("ArrowLeft")
    assert "chosen" in page.locator(f"#{tokens.nth(7).get_attribute('aria-describedby')}").inner_text()
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.textContent") == "Copy"
    page.keyboard.press("Shift+Tab")
    assert page.evaluate(FOCUSED) == names[7]


def test_the_focus_stays_on_its_token_while_others_come(page: playwright.Page) -> None:
    page.click("#inside")
    page.evaluate("""() => { window.fetch = async (path) => new Response(new ReadableStream({ start(c) {
        const data = (event) => c.enqueue(new TextEncoder().encode(`data: ${JSON.stringify(event)}\\n\\n`));
        window.more = (text) => data({ token: text, part: "text", tokens: [{ text, logprob: -0.5, top: [[text, -0.5]] }] });
        window.end = () => { data({ done: true }); c.close(); };
        for (const text of ["one", "two", "three"]) window.more(text);
    } })); }""")
    page.fill("#text", "?")
    page.keyboard.press("Enter")
    page.get_by_role("option", name="two").focus()
    page.evaluate("window.more('four')")
    page.get_by_role("option", name="four").wait_for()
    page.evaluate("window.end()")
    settle(page)
    assert page.evaluate(FOCUSED) == "two, 61%"
    assert page.locator(".message.assistant .tokens [tabindex='0']").count() == 1


@pytest.mark.parametrize(("width", "height"), [(1000, 700), (360, 640), (320, 256)])
def test_a_thought_stays_within_the_window(page: playwright.Page, width: int, height: int) -> None:
    """And its words within it, however long they are."""
    page.set_viewport_size({"width": width, "height": height})
    page.click("#inside")
    page.unroute("**/chat/completions")
    pretend(page, {"token": "The cat", "part": "text"}, {"tokens": TOKENS})
    ask(page, "?")
    bubble = page.locator("#thought")
    for token in page.locator(".message.assistant .tokens [tabindex]").all():
        token.focus()
        box = bubble.bounding_box()
        assert box["x"] >= 0 and box["y"] >= 0 and box["x"] + box["width"] <= width
        assert bubble.evaluate("(bubble) => bubble.scrollWidth <= bubble.clientWidth")


def test_a_conversation_is_printed_whole(page: playwright.Page) -> None:
    """On as many pages as it takes, in dark ink, without what is there to be pressed."""
    page.emulate_media(color_scheme="dark")
    for _ in range(3):
        _answer(page, (TEXT, "a line\n\n" * 60))
    assert len(re.findall(rb"/Type\s*/Page\b", page.pdf(format="A4"))) >= 5
    page.emulate_media(media="print", color_scheme="dark")
    assert page.locator("#log").evaluate("(log) => log.scrollHeight === log.clientHeight")
    assert page.evaluate("getComputedStyle(document.querySelector('.message p')).color") == "rgb(28, 28, 30)"
    for shown in page.locator("#sidebar, #form, button").all():
        assert not shown.is_visible()


def test_the_text_is_as_large_as_the_browser_was_told(page: playwright.Page) -> None:
    page.evaluate("document.documentElement.style.fontSize = '32px'")
    sizes = page.locator("body, #text, #send").evaluate_all("(all) => all.map((e) => getComputedStyle(e).fontSize)")
    assert sizes == ["32px"] * 3


def test_a_long_draft_leaves_the_window_its_size(page: playwright.Page) -> None:
    page.set_viewport_size({"width": 320, "height": 256})
    page.fill("#text", "line\n" * 12)
    assert page.evaluate("document.documentElement.scrollHeight") == 256
    box = page.locator("#send").bounding_box()
    assert box["y"] + box["height"] <= 256


def test_a_conversation_without_end_goes_on(page: playwright.Page) -> None:
    """The server takes so many messages; what is sent are the newest, from a question on."""
    page.unroute("**/chat/completions")
    pretend(page, {"token": "Hi", "part": "text"})
    ask(page, "first")
    page.evaluate("""async () => {
        const store = await import("/ui/store.js");
        const conversation = store.all()[0];
        let node = store.path(conversation).at(-1);
        for (let i = 0; i < 1500; i++) node = store.add(conversation, node, i % 2 ? "assistant" : "user", `m${i}`);
        store.save(conversation);
    }""")
    page.reload()
    with page.expect_request("**/chat/completions") as sent:
        ask(page, "last")
    messages = json.loads(sent.value.post_data)["messages"]
    assert 900 < len(messages) <= 1000
    assert messages[0]["role"] == "user" and messages[-1] == {"role": "user", "content": "last"}


def test_what_only_screen_readers_hear_covers_nothing(page: playwright.Page) -> None:
    """A long answer is read out from an element that must hide no button."""
    _answer(page, (TEXT, "a long answer, " * 200))
    assert page.locator("#status").inner_text().startswith("The answer: a long answer")
    page.click("#inside", timeout=5000)
    page.click("#open-settings", timeout=5000)


def test_text_from_right_to_left_is_set_so(page: playwright.Page) -> None:
    """Each block of an answer by its own first letter; code always from left to right."""
    page.unroute("**/chat/completions")
    pretend(page, {"token": "مرحبا.\n\nHello.\n\n- שלום\n\n```\nسلام\n```", "part": "text"})
    page.fill("#text", "سؤال؟")
    direction = "(element) => getComputedStyle(element).direction"
    assert page.locator("#text").evaluate(direction) == "rtl"
    ask(page, "سؤال؟")
    assert page.locator(".message.user .content").evaluate(direction) == "rtl"
    blocks = page.locator(".markdown > *").all()
    assert [block.evaluate(direction) for block in blocks] == ["rtl", "ltr", "rtl", "ltr"]
    content = _answer(page, (CALL, "23+x"), (RESULT, "81"), (TEXT, " הוא x"))
    assert content.locator("p").evaluate(direction) == "rtl"  # whatever letters the calculator read
    assert [tool.evaluate(direction) for tool in content.locator(".tool").all()] == ["ltr", "ltr"]


def test_a_page_left_open_tells_that_the_server_starts_again(page: playwright.Page) -> None:
    """An answer that waits for the compiler says so, until there is something to read."""
    health = {"status": "compiling", "ready": False, "model": "newer", "defaults": {}}
    page.route("**/health", lambda route: route.fulfill(json=health))
    waiting: list[playwright.Route] = []
    page.unroute("**/chat/completions")
    page.route("**/chat/completions", lambda route: waiting.append(route))
    page.fill("#text", "?")
    page.keyboard.press("Enter")
    page.locator(".message.assistant", has_text="getting ready").wait_for()
    assert "newer is getting ready" in page.locator("#model").inner_text()
    health.update(status="ok", ready=True)
    page.locator(".message.assistant:not(:has-text('getting ready'))").wait_for()
    assert page.locator("#model").inner_text() == "newer"
    waiting[0].fulfill(body='data: {"done": true}\n\n', content_type="text/event-stream")
    settle(page)


def test_a_setting_out_of_range_is_not_kept(page: playwright.Page) -> None:
    page.click("#open-settings")
    for value in ("0", "-5", ""):
        page.fill("[name=max_tokens]", value)
    page.fill("[name=top_k]", "-1")
    for name in ("top_k", "max_tokens", "seed"):
        page.fill(f"[name={name}]", "9" * 23)  # which the server would refuse
    page.keyboard.press("Escape")
    kept = page.evaluate("import('/ui/store.js').then(({ settings: s }) => [s.max_tokens, s.top_k, s.seed])")
    assert kept == ["", 50, ""]


def test_a_button_over_code_stays_while_it_scrolls(page: playwright.Page) -> None:
    _answer(page, (TEXT, "```\n" + "long " * 200 + "\n```"))
    button = page.locator("pre button")
    before = button.bounding_box()
    boxes = page.locator("pre, pre code")
    assert 300 in boxes.evaluate_all("(boxes) => boxes.map((box) => { box.scrollLeft = 300; return box.scrollLeft; })")
    assert button.bounding_box() == before


def test_a_growing_answer_leaves_the_reader_alone(page: playwright.Page) -> None:
    """What is selected or has the focus stays so while the answer comes and when it ends; no old answer is read again."""
    page.evaluate("""() => {
        window.parsed = 0;
        const parse = marked.parse;
        marked.parse = (...all) => { window.parsed++; return parse(...all); };
        window.fetch = async () => new Response(new ReadableStream({ start(c) {
            const data = (event) => c.enqueue(new TextEncoder().encode(`data: ${JSON.stringify(event)}\\n\\n`));
            data({ token: "first *words*\\n\\n```\\ncode", part: "text" });
            window.more = (text) => data({ token: text, part: "text" });
            window.end = () => { data({ done: true }); c.close(); };
        } }));
    }""")
    page.fill("#text", "?")
    page.keyboard.press("Enter")
    button = page.locator("pre button")
    button.click()
    page.evaluate("getSelection().selectAllChildren(document.querySelector('.message.assistant em'))")
    kept = "[getSelection().toString(), document.activeElement.parentElement.tagName]"
    page.evaluate("window.more(' and code')")
    page.get_by_text("code and code").wait_for()
    page.evaluate("window.more('\\n```\\nlast words')")
    page.get_by_text("last words").wait_for()
    assert page.evaluate(kept) == ["words", "PRE"]
    page.evaluate("window.end()")
    settle(page)
    assert page.evaluate(kept) == ["words", "PRE"]
    page.evaluate(
        "window.copied = ''; Object.defineProperty(navigator, 'clipboard', { value: { writeText: (t) => { copied = t; } } })"
    )
    button.click()
    assert page.evaluate("window.copied") == "code and code\n"
    page.evaluate("window.parsed = 0")
    page.fill("#text", "and?")
    page.keyboard.press("Enter")
    page.locator(".message.assistant pre").nth(1).wait_for()
    page.evaluate("window.end()")
    settle(page)
    assert page.evaluate("window.parsed") <= 4  # the new answer alone, with each frame

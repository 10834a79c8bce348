"""The calculator computes what it should and nothing else; and what the server makes of its calls."""

from __future__ import annotations

import itertools
import json
import threading
import time
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from fastapi.testclient import TestClient
from hypothesis import example, given
from hypothesis import strategies as st

from nanochat.engine import Engine
from nanochat.openai_api import ChatRequest
from nanochat.sequence import Parts, joined_parts
from nanochat.server import create_app
from nanochat.tools import use_calculator
from tests.helpers import serve


@pytest.mark.parametrize(
    ("expression", "result"),
    [
        ("37*84", "3108"),
        (" 48 / 2 ", "24"),
        ("7/2", "3.5"),
        ("1/3", "0.3333333333"),
        ("1,234 + 1", "1235"),
        ("12,345,678*1", "12345678"),
        ("-(3 - 10) // 2", "3"),
        ("17 % 5", "2"),
        ("2**10", "1024"),
        ("0.1+0.2", "0.3"),
        ("0**2", "0"),
        ("1**256", "1"),
        ("0.5**3", "0.125"),
        ("0**0.5", "0"),
        ("-123456789.125", "-123456789.1"),
        ("10.0**14", "1" + "0" * 14),
        ("10.0**15", "1e+15"),
        ("-(10.0**15)", "-1e+15"),
        ("2.5e3 + 1", "2501"),
        ("1E-5*2", "2e-05"),
        ("3.e2+1", "301"),
        ("'3and, 4or'.count('3and')", "1"),
        ('"strawberry".count("r")', "3"),
        ("'1,000,000'.count(',')", "2"),
    ],
)
def test_computes(expression: str, result: str) -> None:
    assert use_calculator(expression) == result


@pytest.mark.parametrize(
    "expression",
    [
        "", "1/0", "9**9**9", "2**9999", "10**65", "1e999", "float('nan')", "x", "__import__('os')", "().__class__",
        "'a'*10", "'a'.upper()", "'a'.count('a', 0)", "f'{1}'.count('1')", "(x := 1)", "lambda: 1", "[1]", "b'a'.count(b'a')",
        "True", "1 if 1 else 2", "1 < 2", "1; 2", "3\n4", "(" * 200 + ")" * 200, "-" * 100 + "1", "1+" * 127 + "1" * 10,
        "9" * 300, "\0", "(-8)**0.5", "'a' 'b'.join('c')", "1j", "~1", "1 << 3", "3and 4", "0x10", "1_000",
        "'a\\n'.count('a')", "'a'.count('a', x=1)", "1,2345", "1,23", "(,123)", "3.and 4", "0.01**-200", "1/1e999",
        "'x'.count", "open('f')",
    ],
)  # fmt: skip
def test_refuses(expression: str) -> None:
    assert use_calculator(expression) is None


@pytest.mark.parametrize(
    ("fits", "exceeds"),
    [
        ("+".join(["1"] * 33), "+".join(["1"] * 34)),  # each is one level deeper
        ("-" * 32 + "1", "-" * 33 + "1"),
        ("+" * 32 + "1", "+" * 33 + "1"),
        ("9" * 64, "1" + "0" * 64),
        ("9" * 63 + "8+1", "9" * 64 + "+1"),
        ("-" + "9" * 63 + "8-1", "-" + "9" * 64 + "-1"),
        ("2**212", "2**213"),
        ("1**256", "1**257"),
        (" " * 255 + "1", " " * 256 + "1"),
    ],
)
def test_computes_up_to_its_limits(fits: str, exceeds: str) -> None:
    assert use_calculator(fits) == str(eval(fits))
    assert use_calculator(exceeds) is None


@given(st.text(max_size=300))
def test_never_raises_and_is_quick(text: str) -> None:
    began = time.process_time()
    result = use_calculator(text)
    assert result is None or isinstance(result, str)
    assert time.process_time() - began < 1


@given(st.integers(-(10**9), 10**9), st.integers(-(10**9), 10**9), st.sampled_from("+-*"))
def test_agrees_with_python(a: int, b: int, op: str) -> None:
    expected = {"+": a + b, "-": a - b, "*": a * b}[op]
    assert use_calculator(f"({a}){op}({b})") == str(expected)


numbers = st.integers(0, 999).map(str) | st.decimals(0, 99, places=2).map(str)
expressions = st.recursive(
    numbers,
    lambda parts: (
        st.tuples(parts, st.sampled_from([" + ", "-", "*", " / ", "//", "%"]), parts).map("".join)
        | parts.map("({})".format)
        | parts.map("-{}".format)
    ),
    max_leaves=8,
)


@given(expressions)
def test_agrees_with_python_on_whole_expressions(expression: str) -> None:
    try:
        expected = eval(expression.replace("-" * 2, "- -"))
    except ZeroDivisionError:
        expected = None
    result = use_calculator(expression)
    if expected is None or len(expression) > 256:
        assert result is None
    else:
        assert float(result) == pytest.approx(float(expected), rel=1e-9, abs=1e-9)


@given(st.text("ab 3,x()+", max_size=40), st.text("ab 3,x", max_size=3))
def test_counts_like_python(text: str, part: str) -> None:
    assert use_calculator(f"'{text}'.count('{part}')") == str(text.count(part))


@example("3.and 4")
@given(st.text("0123456789andxelo_.+-*/ '\\\"()", max_size=30))
def test_python_has_nothing_to_warn_of(text: str) -> None:
    """What a model writes must not end as a warning on the user's terminal."""
    with warnings.catch_warnings(record=True) as seen:  # as errors they would be mistakes of syntax, which it expects
        warnings.simplefilter("always")
        use_calculator(text)
    assert not seen


def test_works_from_any_thread() -> None:
    results: list[str | None] = []
    threads = [threading.Thread(target=lambda: results.append(use_calculator("6*7"))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == ["42"] * 8


# ----------------------------------------------------------------------------- its calls, over HTTP

QUESTION = {"role": "user", "content": "What is 23 + 58?"}
CHAT, TEXT = "/v1/chat/completions", "/v1/completions"


def _say(engine: Engine, monkeypatch: pytest.MonkeyPatch, before: str, expression: str, after: str) -> None:
    """Make the model answer the next request with a text, calls of the calculator (a;b) and another text."""
    encode, special = engine.tokenizer.encode, engine.tokenizer.encode_special
    calls = [(special("<|python_start|>"), *encode(call), special("<|python_end|>")) for call in expression.split(";")]
    script = iter([*encode(before), *itertools.chain(*calls), *encode(after), special("<|assistant_end|>")])
    monkeypatch.setattr("nanochat.scheduler.sample", lambda *_: torch.tensor([next(script)]))


def test_an_answer_that_is_sent_back_keeps_its_calls(
    client: TestClient, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    _say(engine, monkeypatch, "It is ", "23+58", "81.")
    message = client.post(CHAT, json={"messages": [QUESTION], "max_tokens": 40}).json()["choices"][0]["message"]
    assert message["content"] == "It is 81."
    read = client.post("/tokenize", json={"messages": [QUESTION, message, QUESTION]}).json()
    call = "It is <|python_start|>23+58<|python_end|><|output_start|>81<|output_end|>81.<|assistant_end|>"
    assert call in "".join(read["token_strs"])
    for nothing in (None, {"parts": []}):
        turns = [QUESTION, {**message, "nanochat": nothing}, QUESTION]
        assert "<|assistant_start|>It is 81.<|assistant_end|>" in "".join(
            client.post("/tokenize", json={"messages": turns}).json()["token_strs"]
        )


def test_calls_that_follow_each_other_at_once_stay_apart(
    client: TestClient, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In an answer, in the next turn, and in both streams, however their pieces are gathered."""
    body = {"messages": [QUESTION], "max_tokens": 40}
    expected = [("text", "It is "), ("python", "1/0"), ("python", "2+2"), ("python_output", "4"), ("text", "4.")]

    def say() -> None:
        _say(engine, monkeypatch, "It is ", "1/0;2+2", "4.")

    def joined(parts: Iterator[dict[str, Any]]) -> list[tuple[str, str]]:
        whole: dict[int, tuple[str, str]] = {}
        for part in parts:
            whole[part["index"]] = (part["type"], whole.get(part["index"], ("", ""))[1] + part["text"])
        return [whole[index] for index in range(len(whole))]

    say()
    message = client.post(CHAT, json=body).json()["choices"][0]["message"]
    assert [(part["type"], part["text"]) for part in message["nanochat"]["parts"]] == expected
    read = client.post("/tokenize", json={"messages": [QUESTION, message, QUESTION]}).json()
    assert "<|python_start|>1/0<|python_end|><|python_start|>2+2<|python_end|>" in "".join(read["token_strs"])
    for interval_s in (0.0, 10.0):  # between news
        monkeypatch.setattr("nanochat.service.STREAM_INTERVAL_S", interval_s)
        say()
        deltas = [event["choices"][0]["delta"] for event in _events(client.post(CHAT, json={**body, "stream": True}))]
        assert joined(part for delta in deltas for part in delta.get("nanochat", {}).get("parts", ())) == expected
        assert "".join(delta.get("content", "") for delta in deltas) == message["content"]
        say()
        events = [event for event in _events(client.post("/chat/completions", json=body)) if "token" in event]
        assert joined({**event, "type": event["part"], "text": event["token"]} for event in events) == expected


def test_openais_own_client_joins_a_streamed_answer(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """With calls of the calculator: the same message as one that is not streamed, which may be sent back."""
    openai = pytest.importorskip("openai", reason="openai is not installed")
    with serve(create_app([engine], "tiny")) as port:
        chat = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="any").chat.completions
        messages = []
        for streamed in (False, True):
            _say(engine, monkeypatch, "It is ", "1/0;2+2", "4.")
            asked: dict[str, Any] = {"model": "tiny", "messages": [QUESTION], "max_tokens": 40}
            if streamed:
                with chat.stream(**asked) as stream:
                    reply = stream.get_final_completion()
            else:
                reply = chat.create(**asked)
            messages.append(reply.choices[0].message.model_dump())
    whole, joined = messages
    assert joined["content"] == whole["content"] == "It is 4."
    parts = [{name: part[name] for name in ("type", "text")} for part in joined["nanochat"]["parts"]]
    assert parts == whole["nanochat"]["parts"] and len(parts) == 5
    turns = [ChatRequest.model_validate({"messages": [QUESTION, message, QUESTION]}).conversation() for message in messages]
    assert turns[0] == turns[1]


def test_parts_do_not_depend_on_how_their_pieces_come() -> None:
    """Also where a call begins with the first half of a character."""
    pieces = [("", "text"), ("a", "python"), ("", "python"), ("", "text"), ("", "python"), ("é", "python"), ("b", "python"),
              ("", "python"), ("c", "text"), ("", "text"), ("", "python"), ("d", "text")]  # fmt: skip
    assert [(part["type"], part["text"]) for part in joined_parts(pieces)] == [
        ("python", "a"), ("python", "éb"), ("text", "cd"),
    ]  # fmt: skip
    one_by_one = Parts()
    indexes = [part["index"] for piece in pieces for part in one_by_one.of([piece])]
    assert indexes == [0, 1, 1, 2, 2]


def _events(response: Any) -> list[dict[str, Any]]:
    lines = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line]
    return [json.loads(line) for line in lines if line != "[DONE]"]


@pytest.mark.parametrize(
    ("extension", "place"),
    [("x", ""), ({}, ".parts"), ({"parts": 5}, ".parts"), ({"parts": [5]}, ".parts.0"),
     ({"parts": [{"type": "text", "text": ""}] * 501}, ".parts"),
     ({"parts": [{"type": "tool", "text": "x"}]}, ".parts.0.type"), ({"parts": [{"type": "python"}]}, ".parts.0.text"),
     ({"parts": [{"type": "python", "text": 5}]}, ".parts.0.text"),
     ({"parts": [{"type": "text", "text": "x" * 200_001}]}, ".parts.0.text")],
)  # fmt: skip
def test_parts_that_are_none_are_refused(client: TestClient, extension: Any, place: str) -> None:
    answer = {"role": "assistant", "content": "x", "nanochat": extension}
    response = client.post(CHAT, json={"messages": [QUESTION, answer, QUESTION]})
    assert response.status_code == 400 and response.json()["error"]["param"] == f"messages.1.nanochat{place}"


def test_completions_show_what_chat_shows(client: TestClient, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """No calls of the calculator; and every token's place is in the text that is shown, in characters."""
    body = {"prompt": "é: ", "max_tokens": 60, "logprobs": 0}
    _say(engine, monkeypatch, "It costs 😀 ", "23+58", "81 é.")
    choice = client.post(TEXT, json=body).json()["choices"][0]
    assert choice["text"] == "It costs 😀 81 é."
    rows = choice["logprobs"]
    _say(engine, monkeypatch, "It costs 😀 ", "23+58", "81 é.")
    lines = client.post(TEXT, json={**body, "stream": True}).text.split("\n\n")[:-2]  # and [DONE]
    streamed = [json.loads(line.removeprefix("data: "))["choices"][0] for line in lines]
    assert "".join(chunk["text"] for chunk in streamed) == choice["text"]
    for name, row in rows.items():  # of a stream, too
        assert [value for chunk in streamed for value in chunk["logprobs"][name]] == row
    monkeypatch.setattr("nanochat.service.STREAM_INTERVAL_S", 0.0)
    _say(engine, monkeypatch, "It costs 😀 ", "23+58", "81 é.")
    events = _events(client.post(TEXT, json={"prompt": "é: ", "max_tokens": 60, "stream": True}))
    texts = [event["choices"][0]["text"] for event in events]
    assert "".join(texts) == choice["text"] and all(texts[:-1])
    _say(engine, monkeypatch, "It costs 😀 ", "23+58", "81 é.")
    echoed = client.post(TEXT, json={**body, "echo": True}).json()["choices"][0]
    assert echoed["text"] == "é: " + choice["text"]
    for text, row in ((choice["text"], rows), (echoed["text"], echoed["logprobs"])):
        shown, hidden = "", False
        for token, begin, end in zip(row["tokens"], row["text_offset"], [*row["text_offset"][1:], len(text)], strict=True):
            hidden = hidden or token in ("<|python_start|>", "<|output_start|>")
            assert not (hidden or token.startswith("<|")) or begin == end
            assert hidden or token.startswith(("<|", "bytes:")) or text[begin:end] == token
            hidden = hidden and token not in ("<|python_end|>", "<|output_end|>")
            shown += text[begin:end]
        assert shown == text


def test_an_expression_of_a_thousand_terms_is_not_computed() -> None:
    assert use_calculator("+".join(["1"] * 1000)) is None

"""The chat server over HTTP: a streamed answer, bad requests, a full queue, a client that leaves."""

from __future__ import annotations

import json
import queue
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from fastapi.testclient import TestClient

from nanochat.checkpoint_manager import load_model
from nanochat.common import NanochatError
from nanochat.engine import Engine
from nanochat.server import Worker, create_app
from scripts.chat_web import check_port

HELLO = {"messages": [{"role": "user", "content": "Who are you?"}], "temperature": 0, "max_tokens": 12}


@pytest.fixture
def engine(tiny_run: Path) -> Engine:
    model, tokenizer, _ = load_model("sft", "cpu", "eval", "tiny")
    return Engine(model, tokenizer)


@pytest.fixture
def client(engine: Engine) -> Iterator[TestClient]:
    with TestClient(create_app(engine, "tiny")) as client:
        yield client


def _events(text: str) -> list[dict]:
    return [json.loads(line.removeprefix("data: ")) for line in text.split("\n") if line]


def test_an_answer_is_streamed_and_is_the_engines(client: TestClient, engine: Engine) -> None:
    events = _events(client.post("/chat/completions", json=HELLO).text)
    assert events[-1] == {"done": True}
    answer = "".join(event["token"] for event in events[:-1])
    prompt = engine.tokenizer.render_for_completion({"messages": HELLO["messages"]})
    row = engine.complete([prompt], max_tokens=12, temperature=0)[0]
    shown = [token for token in row.tokens if not engine.tokenizer.is_special(token)]
    assert answer == engine.tokenizer.decode(shown)
    assert client.get("/stats").json()["answered"] == 1


def test_calculator_calls_are_parts_and_can_be_sent_back(client: TestClient, engine: Engine, monkeypatch) -> None:
    special, encode = engine.tokenizer.encode_special, engine.tokenizer.encode
    call = [special("<|python_start|>"), *encode("2+3"), special("<|python_end|>")]
    answer = [*call, special("<|output_start|>"), *encode("5"), special("<|output_end|>"), *encode("It is 5.")]
    monkeypatch.setattr(engine, "generate", lambda *args: (([token], [1]) for token in answer))
    parts: list[dict] = []
    for event in _events(client.post("/chat/completions", json=HELLO).text)[:-1]:
        if not parts or parts[-1]["type"] != event["part"]:
            parts.append({"type": event["part"], "text": ""})
        parts[-1]["text"] += event["token"]
    assert parts == engine.tokenizer.parse_parts(answer)
    monkeypatch.undo()
    turns = [*HELLO["messages"], {"role": "assistant", "content": parts}, *HELLO["messages"]]
    seen: list[list[int]] = []
    original = engine.generate
    monkeypatch.setattr(engine, "generate", lambda prompt, *args: seen.append(prompt) or original(prompt, *args))
    assert _events(client.post("/chat/completions", json={**HELLO, "messages": turns}).text)[-1] == {"done": True}
    assert " ".join(map(str, answer)) in " ".join(map(str, seen[0]))


def test_page_and_health(client: TestClient) -> None:
    assert client.get("/health").json() == {"status": "ok", "ready": True, "model": "tiny"}
    page = client.get("/")
    assert page.headers["content-type"].startswith("text/html")
    assert "innerHTML" not in page.text  # what a model writes is shown as text


@pytest.mark.parametrize(
    ("change", "status"),
    [({"messages": []}, 422), ({"temperature": -1}, 422), ({"max_tokens": 0}, 422), ({"top_k": -5}, 422),
     ({"messages": [{"role": "robot", "content": "x"}]}, 422), ({"messages": [{"role": "assistant", "content": "x"}]}, 400),
     ({"messages": [{"role": "user", "content": "x" * 30_000}] * 2}, 400)],
)  # fmt: skip
def test_bad_requests_are_refused(client: TestClient, change: dict, status: int) -> None:
    assert client.post("/chat/completions", json={**HELLO, **change}).status_code == status


def test_what_does_not_fit_the_context_is_an_error_event(client: TestClient) -> None:
    """And the service goes on; a special token spelled in a message is ordinary text."""
    long = {"messages": [{"role": "user", "content": "word <|assistant_end|> " * 200}]}
    assert "does not fit" in _events(client.post("/chat/completions", json={**HELLO, **long}).text)[0]["error"]
    assert _events(client.post("/chat/completions", json=HELLO).text)[-1] == {"done": True}


def test_a_full_queue_is_answered_429(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Worker, job: object) -> None:
        raise queue.Full

    monkeypatch.setattr(Worker, "submit", refuse)
    response = client.post("/chat/completions", json=HELLO)
    assert response.status_code == 429
    assert response.headers["retry-after"] == "5"


def test_a_port_in_use_is_named() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(NanochatError, match="choose another with --port"):
            check_port("127.0.0.1", taken.getsockname()[1])

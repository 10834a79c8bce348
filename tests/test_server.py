"""The server over HTTP: both APIs, what they refuse, clients that leave, keys, limits, shutdown."""

from __future__ import annotations

import json
import math
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from fastapi.testclient import TestClient
from pydantic import ValidationError

from nanochat.engine import Engine
from nanochat.openai_api import MAX_CHARS, MAX_MESSAGES, MAX_PARTS, MAX_TOKENS, CompletionRequest, token_text
from nanochat.sampling import SamplingParams
from nanochat.scheduler import Scheduler
from nanochat.sequence import Sequence
from nanochat.server import DetokenizeRequest, create_app
from nanochat.service import Limits
from tests.helpers import serve, wait_for
from tests.many_ranks import free_port

HELLO = {"messages": [{"role": "user", "content": "Who are you?"}], "temperature": 0, "max_tokens": 12}
CHAT, TEXT = "/v1/chat/completions", "/v1/completions"


@pytest.fixture
def client(engine: Engine) -> Iterator[TestClient]:
    with TestClient(create_app([engine], "tiny"), raise_server_exceptions=False) as client:
        yield client


def _events(text: str) -> list[Any]:
    lines = [line.removeprefix("data: ") for line in text.split("\n") if line]
    return [line if line == "[DONE]" else json.loads(line) for line in lines]


def _expected(engine: Engine, **params: Any) -> Sequence:
    """What the engine itself answers to HELLO."""
    other = Engine(engine.model, engine.tokenizer)
    prompt = engine.tokenizer.render_for_completion({"messages": HELLO["messages"]})
    sequence = Sequence(prompt, SamplingParams(**{"temperature": 0, "max_tokens": 12, **params}))
    other.scheduler.submit(sequence)
    while sequence.finish_reason is None:
        other.scheduler.step()
    return sequence


# ----------------------------------------------------------------------------- the guide's stream


@pytest.mark.parametrize("prompt", [[""] * 5000, [["x"] * 5000]])
def test_the_first_wrong_item_is_enough(prompt: list) -> None:
    """To say of each of a million what is wrong with it would stop the server for seconds."""
    with pytest.raises(ValidationError) as error:
        CompletionRequest(prompt=prompt)
    assert error.value.error_count() < 10


def test_an_answer_is_streamed_and_is_the_engines(client: TestClient, engine: Engine) -> None:
    events = _events(client.post("/chat/completions", json=HELLO).text)
    assert events[-1]["done"] is True
    assert "".join(event["token"] for event in events[:-1]) == _expected(engine).text
    assert client.get("/stats").json()["answered"] == 1


def test_looking_inside_shows_every_token(client: TestClient, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also those that the calculator forced, of which the model thought nothing."""
    encode, special = engine.tokenizer.encode, engine.tokenizer.encode_special
    call = [special("<|python_start|>"), *encode("2+3"), special("<|python_end|>")]
    forced = [special("<|output_start|>"), *encode("5"), special("<|output_end|>")]
    after = encode("It is 5.")
    script = iter([*call, *after, special("<|assistant_end|>")])
    monkeypatch.setattr("nanochat.scheduler.sample", lambda *_: torch.tensor([next(script)]))
    body = {**HELLO, "max_tokens": 40, "logprobs": True, "top_logprobs": 3}
    events = _events(client.post("/chat/completions", json=body).text)
    tokens = [token for event in events for token in event.get("tokens", [])]
    said = [*call, *forced, *after]
    assert [token["text"] for token in tokens] == [token_text(engine.tokenizer, token) for token in said]
    assert len(tokens) == events[-1]["usage"]["completion_tokens"]
    prompt = engine.tokenizer.render_for_completion({"messages": HELLO["messages"]})
    with torch.no_grad():
        expected = engine.model(torch.tensor([prompt + said]))[0, len(prompt) - 1 : -1].log_softmax(-1)
    for i, (token, row) in enumerate(zip(tokens, expected, strict=True)):
        if len(call) <= i < len(call) + len(forced):
            assert token["logprob"] is None and token["top"] == []
        else:
            assert token["logprob"] == pytest.approx(row[said[i]].item(), abs=0.05)
            assert [value for _, value in token["top"]] == pytest.approx(row.topk(3).values.tolist(), abs=0.05)


def test_parts_of_an_answer_can_be_sent_back(client: TestClient, engine: Engine) -> None:
    parts = [{"type": "python", "text": "2+3"}, {"type": "python_output", "text": "5"}, {"type": "text", "text": "It is 5."}]
    turns = [*HELLO["messages"], {"role": "assistant", "content": parts}, *HELLO["messages"]]
    read = client.post("/tokenize", json={"messages": turns}).json()
    special = engine.tokenizer.encode_special
    call = [special("<|python_start|>"), *engine.tokenizer.encode("2+3"), special("<|python_end|>")]
    assert " ".join(map(str, call)) in " ".join(map(str, read["tokens"]))
    assert read["count"] == len(read["tokens"]) == len(read["token_strs"])
    assert _events(client.post("/chat/completions", json={**HELLO, "messages": turns}).text)[-1]["done"]


# ----------------------------------------------------------------------------- OpenAI's API


def test_chat_completion_streamed_and_whole_are_the_same(client: TestClient, engine: Engine) -> None:
    body = {**HELLO, "model": "tiny", "logprobs": True, "top_logprobs": 2, "n": 3, "seed": 5, "temperature": 1.0}
    whole = client.post(CHAT, json=body).json()
    assert whole["object"] == "chat.completion" and whole["model"] == "tiny"
    streamed = _events(client.post(CHAT, json={**body, "stream": True, "stream_options": {"include_usage": True}}).text)
    assert streamed[-1] == "[DONE]"
    written = sum(len(choice["logprobs"]["content"]) for choice in whole["choices"])
    read = len(engine.tokenizer.render_for_completion({"messages": HELLO["messages"]}))  # of all three, once
    for reported in (whole["usage"], streamed[-2]["usage"]):
        assert (reported["prompt_tokens"], reported["completion_tokens"]) == (read, written) and written > 0
        assert reported["total_tokens"] == read + written
    assert len(whole["choices"]) == 3 and len({json.dumps(choice["logprobs"]) for choice in whole["choices"]}) == 3
    for i, choice in enumerate(whole["choices"]):
        chunks = [event["choices"][0] for event in streamed[:-2] if event["choices"][0]["index"] == i]
        assert chunks[0]["delta"] == {"role": "assistant", "content": ""}
        assert "".join(chunk["delta"].get("content", "") for chunk in chunks) == choice["message"]["content"]
        content = [entry for chunk in chunks if chunk["logprobs"] for entry in chunk["logprobs"]["content"]]
        assert content == choice["logprobs"]["content"]
        assert [chunk["finish_reason"] for chunk in chunks] == [None] * (len(chunks) - 1) + [choice["finish_reason"]]
        assert all(len(entry["top_logprobs"]) == 2 for entry in content)
    assert client.post(CHAT, json=body).json()["choices"] == whole["choices"]  # the seed decides


def test_stop_texts_and_limits_of_an_answer(client: TestClient, engine: Engine) -> None:
    text = _expected(engine, ignore_eos=True).text
    stop = text[len(text) // 2 : len(text) // 2 + 2]
    choice = client.post(CHAT, json={**HELLO, "ignore_eos": True, "stop": [stop]}).json()["choices"][0]
    assert choice["message"]["content"] == text[: text.index(stop)] and choice["finish_reason"] == "stop"
    choice = client.post(CHAT, json={**HELLO, "ignore_eos": True, "max_completion_tokens": 3}).json()["choices"][0]
    assert choice["finish_reason"] == "length"
    assert client.post(CHAT, json={**HELLO, "max_tokens": 0}).json()["usage"]["completion_tokens"] == 0


def test_completions_of_texts_and_tokens(client: TestClient, engine: Engine) -> None:
    tokenizer = engine.tokenizer
    body = {"temperature": 0, "max_tokens": 4, "ignore_eos": True}
    of_text = client.post(TEXT, json={**body, "prompt": "the cat"}).json()
    of_ids = client.post(TEXT, json={**body, "prompt": tokenizer.encode("the cat")}).json()
    with_bos = client.post(TEXT, json={**body, "prompt": tokenizer.encode("the cat", prepend="<|bos|>")}).json()
    assert of_text["choices"] == of_ids["choices"] == with_bos["choices"]
    both = client.post(TEXT, json={**body, "prompt": ["the cat", "her brother"], "n": 2}).json()
    assert [choice["index"] for choice in both["choices"]] == [0, 1, 2, 3]
    assert both["choices"][0]["text"] == both["choices"][1]["text"] == of_text["choices"][0]["text"]
    streamed = _events(client.post(TEXT, json={**body, "prompt": "the cat", "stream": True}).text)
    assert "".join(event["choices"][0]["text"] for event in streamed[:-1]) == of_text["choices"][0]["text"]


def test_echo_gives_the_prompts_probabilities(client: TestClient, engine: Engine) -> None:
    """What lm-eval scores texts with."""
    ids = engine.tokenizer.encode("the cat sees a house", prepend="<|bos|>")
    body = {"prompt": ids, "echo": True, "logprobs": 1, "max_tokens": 1, "temperature": 0}
    choice = client.post(TEXT, json=body).json()["choices"][0]
    values = choice["logprobs"]["token_logprobs"]
    with torch.no_grad():
        expected = engine.model(torch.tensor([ids]))[0].log_softmax(-1)
    assert values[0] is None and len(values) >= len(ids)
    for i, token in enumerate(ids[1:]):
        assert values[i + 1] == pytest.approx(expected[i, token].item(), abs=0.05)
    without_bos = client.post(TEXT, json={**body, "prompt": ids[1:]}).json()["choices"][0]["logprobs"]
    assert without_bos["token_logprobs"][: len(ids) - 1] == values[1 : len(ids)]
    assert without_bos["text_offset"][:2] == [0, len(engine.tokenizer.decode(ids[1:2]))]
    only = client.post(TEXT, json={**body, "max_tokens": 0}).json()["choices"][0]
    assert len(only["logprobs"]["tokens"]) == len(ids)


def test_long_conversations_are_trimmed_and_the_reply_says_so(client: TestClient) -> None:
    turns = [
        {"role": role, "content": "some words that fill the context " * 2} for _ in range(20) for role in ("user", "assistant")
    ]
    body = {**HELLO, "messages": [*turns, {"role": "user", "content": "last"}]}
    chat = client.post(CHAT, json=body)
    assert chat.json()["nanochat"]["dropped_turns"] == int(chat.headers["x-nanochat-dropped-turns"]) > 0
    assert _events(client.post("/chat/completions", json=body).text)[0]["dropped_turns"] > 0
    read = client.post("/tokenize", json={name: body[name] for name in ("messages", "max_tokens")})
    assert read.json()["nanochat"]["dropped_turns"] == int(read.headers["x-nanochat-dropped-turns"])
    assert read.json()["nanochat"] == chat.json()["nanochat"] and read.json()["count"] == chat.json()["usage"]["prompt_tokens"]
    assert "nanochat" not in client.post("/tokenize", json={"messages": HELLO["messages"]}).json()


def test_conversations_as_clients_send_them(client: TestClient) -> None:
    """Several system messages, neighbours of one role, text parts, fields that we do not know."""
    messages = [
        {"role": "system", "content": "Be kind."}, {"role": "developer", "content": "Be short."},
        {"role": "user", "content": "zero"}, {"role": "assistant", "content": None},
        {"role": "user", "content": [{"type": "text", "text": "one"}]}, {"role": "user", "content": "two", "name": "x"},
    ]  # fmt: skip
    ours = {"user": "someone", "store": True, "top_p": 0, "stream_options": {"include_usage": None}, "functions": []}
    response = client.post(CHAT, json={**HELLO, "messages": messages, **ours})
    assert response.status_code == 200
    text = "".join(client.post("/tokenize", json={"messages": messages}).json()["token_strs"])
    assert "Be kind.\n\nBe short." in text and "one\n\ntwo" in text


# ----------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("change", "words"),
    [({"messages": []}, "messages"), ({"temperature": -1}, "temperature"), ({"max_tokens": -1}, "max_tokens"),
     ({"top_k": -5}, "top_k"), ({"n": 0}, "n:"), ({"stop": [""]}, "stop"), ({"temperature": "hot"}, "temperature"),
     ({"messages": "hello"}, "messages"), ({"messages": [{"role": "robot", "content": "x"}]}, "role"),
     ({"messages": [{"role": "assistant", "content": "x"}]}, "last message"), ({"presence_penalty": 3}, "presence_penalty"),
     ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, "messages"),
     ({"tools": [{}]}, "tools"), ({"functions": [{}]}, "tools"), ({"messages": [{"role": "user", "content": None}]}, "null"),
     ({"messages": [{"role": "user", "content": "word " * 2000}]}, "does not fit"),
     ({"top_logprobs": 99}, "top_logprobs"), ({"top_logprobs": 3}, "needs logprobs"), ({"seed": 1.5}, "seed"),
     ({"logit_bias": {"5": 101}}, "-100 to 100"), ({"logit_bias": {"five": 1}}, "token ids"),
     ({"logit_bias": [5]}, "logit_bias"),
     ({"logit_bias": {"9" * 5000: 1}}, "token ids"), ({"logit_bias": {"999999": 1}}, "outside the vocabulary"),
     ({"logit_bias": {str(i): 1 for i in range(1001)}}, "at most 1000"), ({"frequency_penalty": -2.5}, "frequency_penalty"),
     ({"response_format": {"type": "json_object"}}, "response_format")],
)  # fmt: skip
@pytest.mark.parametrize("path", [CHAT, "/chat/completions"])
def test_bad_requests_get_one_clear_sentence(client: TestClient, path: str, change: dict, words: str) -> None:
    response = client.post(path, json={**HELLO, **change})
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert words in error["message"] and error["type"] == "invalid_request_error"


def test_one_more_than_the_documented_limits_is_refused(client: TestClient) -> None:
    page = (Path(__file__).parent.parent / "docs" / "serving.md").read_text(encoding="utf-8").replace("\n", " ")
    limits = f"conversation may have {MAX_MESSAGES:,} messages or {MAX_CHARS:,} characters, a message {MAX_PARTS:,} parts"
    assert limits in page
    user, part = {"role": "user", "content": "x"}, {"type": "text", "text": "x"}
    for messages, field in (
        ([user] * (MAX_MESSAGES + 1), "messages"),
        ([{**user, "content": [part] * (MAX_PARTS + 1)}], "messages.0.content"),
        ([{**user, "content": "x" * (MAX_CHARS + 1)}], "messages.0.content"),
        ([{**user, "content": "x" * (MAX_CHARS // 2 + 1)}] * 2, "messages"),
    ):
        for path in (CHAT, "/tokenize"):
            assert client.post(path, json={"messages": messages}).json()["error"]["param"] == field
    assert DetokenizeRequest(tokens=[1] * MAX_TOKENS)
    with pytest.raises(ValidationError, match=f"at most {MAX_TOKENS} items"):
        DetokenizeRequest(tokens=[1] * (MAX_TOKENS + 1))


@pytest.mark.parametrize("change", [{"best_of": 3}, {"suffix": "x"}, {"echo": True, "stream": True}])
def test_completions_that_are_refused(client: TestClient, change: dict[str, Any]) -> None:
    error = client.post(TEXT, json={"prompt": "x", **change}).json()["error"]
    assert next(iter(change)) in error["message"] and "not supported" in error["message"]


@pytest.mark.parametrize(
    ("path", "change", "place", "words"),
    [(CHAT, {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, "messages.0.content.0.type",
      "'python_output'"),
     (CHAT, {"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages.0.content.0.text", "required"),
     (CHAT, {"messages": [{"role": "user", "content": [{"type": "text", "text": 5}]}]}, "messages.0.content.0.text", "string"),
     (CHAT, {"messages": [{"role": "user", "content": {}}]}, "messages.0.content", "string"),
     (CHAT, {"messages": [{"role": "user"}]}, "messages.0", "required"),
     (CHAT, {"stop": ["x"] * 17}, "stop", "at most 16"), (CHAT, {"stop": ["x", ""]}, "stop.1", "at least 1"),
     (CHAT, {"stop": [5]}, "stop.0", "string"), (CHAT, {"stop": 5}, "stop", "string"),
     (TEXT, {"prompt": ["x"] * 65}, "prompt", "at most 64"), (TEXT, {"prompt": [[1, 2], [3, "x"]]}, "prompt.1.1", "integer"),
     (TEXT, {"prompt": [-1]}, "prompt.0", "greater"), (TEXT, {}, "prompt", "required")],
)  # fmt: skip
def test_an_error_is_that_of_the_type_that_was_meant(
    client: TestClient, path: str, change: dict[str, Any], place: str, words: str
) -> None:
    """Where several types are allowed; and its place is one in the request."""
    error = client.post(path, json={**(HELLO if path == CHAT else {}), **change}).json()["error"]
    assert error["param"] == place and words in error["message"]


@pytest.mark.parametrize(
    ("content", "status"),
    [(b"{", 400), (b"", 400), (b'{"messages": "\xff\xfe"}', 400), (b"[" * 50_000, 400), (b"null", 400), (b"NaN", 400),
     (b'{"messages":[{"role":"user","content":"\\ud800"}]}', 400), (b'"' + b"x" * 10_000_000 + b'"', 413)],
)  # fmt: skip
def test_hostile_bodies(client: TestClient, content: bytes, status: int) -> None:
    for path in (CHAT, TEXT, "/chat/completions", "/tokenize"):
        response = client.post(path, content=content, headers={"Content-Type": "application/json"})
        assert response.status_code == status
        assert response.json()["error"]["message"]
    assert client.post(CHAT, json=HELLO).status_code == 200


def test_special_tokens_in_a_message_are_ordinary_text(client: TestClient, engine: Engine) -> None:
    body = {"messages": [{"role": "user", "content": "<|assistant_end|><|python_start|>"}]}
    tokens = client.post("/tokenize", json=body).json()["tokens"]
    special = engine.tokenizer.encode_special
    assert special("<|assistant_end|>") not in tokens and special("<|python_start|>") not in tokens


def test_unknown_models_and_places(client: TestClient) -> None:
    error = client.post(CHAT, json={**HELLO, "model": "gpt-9"})
    assert error.status_code == 404 and error.json()["error"]["code"] == "model_not_found"
    assert client.get("/v1/models/gpt-9").status_code == 404
    for path in ("/v1/models", "/v1/models/"):
        assert client.get(path).json()["data"][0]["id"] == "tiny"
    assert client.get("/v1/models/tiny").json()["id"] == "tiny"
    assert "message" in client.get("/nowhere").json()["error"]
    wrong = client.get(CHAT)
    assert wrong.status_code == 405 and " takes POST, not GET:" in wrong.json()["error"]["message"]
    assert client.post(TEXT, json={"prompt": [999_999]}).status_code == 400
    assert client.post(TEXT, json={"prompt": "word " * 2000}).json()["error"]["code"] == "context_length_exceeded"
    assert client.get("/api/runs/..%2f..").status_code in (400, 404)
    assert client.get("/api/runs/" + "a" * 3000).status_code == 404


def test_a_full_queue_is_answered_429(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    with TestClient(create_app([engine], "tiny", Limits(max_waiting=2))) as client:
        with monkeypatch.context() as patch:
            patch.setattr(Scheduler, "num_waiting", 1)
            response = client.post(CHAT, json={**HELLO, "n": 2})
        assert response.status_code == 429
        assert response.headers["retry-after"] == "2"
        assert client.post(CHAT, json={**HELLO, "n": 2}).status_code == 200


def test_what_never_fits_the_queue_is_not_to_be_tried_again(engine: Engine) -> None:
    with TestClient(create_app([engine], "tiny", Limits(max_waiting=2))) as client:
        for path, body in ((CHAT, {**HELLO, "n": 3}), (TEXT, {"prompt": ["a", "b", "c"]})):
            response = client.post(path, json=body)
            assert response.status_code == 400 and "retry-after" not in response.headers
            assert "which holds 2" in response.json()["error"]["message"]


def test_other_pages_may_not_call_unless_allowed(engine: Engine) -> None:
    origin = {"Origin": "http://other.example"}
    with TestClient(create_app([engine], "tiny")) as client:
        assert "access-control-allow-origin" not in client.post(CHAT, json=HELLO, headers=origin).headers
    with TestClient(create_app([engine], "tiny", cors_origins=["http://other.example"])) as client:
        headers = client.post(CHAT, json=HELLO, headers=origin).headers
        assert headers["access-control-allow-origin"] == "http://other.example" and headers["access-control-expose-headers"]


# ----------------------------------------------------------------------------- pages and numbers


def test_pages_work_without_the_internet(client: TestClient) -> None:
    for path in ("/", "/runs", "/docs"):
        page = client.get(path)
        assert page.status_code == 200 and page.headers["content-type"].startswith("text/html")
        for place in page.text.replace("'", '"').split('"'):
            assert not place.startswith(("http:", "https:", "//")), place
            if place.endswith((".js", ".css")) and place.startswith("/"):
                assert client.get(place).status_code == 200
    for path in ("/", "/health"):
        assert client.head(path).status_code == 200
    for path in ("/", "/ui/chat.js"):  # else a new page meets old scripts
        assert client.get(path).headers["cache-control"] == "no-cache"
    assert "script-src" in (policy := client.get("/").headers["content-security-policy"]) or "default-src 'self'" in policy


def test_health_metrics_and_runs(client: TestClient) -> None:
    defaults = {"temperature": 0.8, "top_k": 50, "max_tokens": 512}
    assert client.get("/health").json() == {"status": "ok", "ready": True, "model": "tiny", "defaults": defaults}
    client.post(CHAT, json={**HELLO, "ignore_eos": True})
    lines = client.get("/metrics").text.split("\n")
    value = {line.split("{")[0]: float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith("vllm:")}
    assert value["vllm:request_success_total"] == 1
    assert value["vllm:generation_tokens_total"] > 0
    assert value["vllm:time_to_first_token_seconds_count"] == 1
    assert value["vllm:num_requests_running"] == 0
    runs = client.get("/api/runs").json()
    assert [run["tag"] for run in runs] == ["tiny"]
    stages = client.get("/api/runs/tiny").json()["stages"]
    assert set(stages) == {"base", "sft"}
    points = {curve["name"]: curve["points"] for curve in stages["base"]["curves"]}
    assert len(points["train/loss"]) == 6
    assert all(math.isfinite(value) for _, value in points["val/bpb"])


# ----------------------------------------------------------------------------- over a real socket


def http_request(body: dict[str, Any], path: str = CHAT) -> bytes:
    content = json.dumps(body).encode()
    lines = [f"POST {path} HTTP/1.1", "Host: localhost", "Content-Type: application/json", f"Content-Length: {len(content)}"]
    return "\r\n".join([*lines, "\r\n"]).encode() + content


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_its_place(engine: Engine, stream: bool) -> None:
    scheduler = engine.scheduler
    free = scheduler.allocator.num_free
    slow = threading.Event()
    decode = scheduler.runner.decode
    scheduler.runner.decode = lambda *args: slow.wait(0.1) or decode(*args)
    with serve(create_app([engine], "tiny")) as port:
        with socket.create_connection(("127.0.0.1", port)) as connection:
            connection.sendall(http_request({**HELLO, "stream": stream, "ignore_eos": True, "max_tokens": 10_000}))
            wait_for(lambda: scheduler.num_running == 1, "a text to run")
        wait_for(lambda: scheduler.num_running == 0 and scheduler.allocator.num_free == free, "all to be given back")
        assert scheduler.generated_tokens < 60  # of more than 100 that it would have been


def test_an_answer_that_takes_too_long_is_ended(engine: Engine) -> None:
    decode = engine.scheduler.runner.decode
    engine.scheduler.runner.decode = lambda *args: time.sleep(0.02) or decode(*args)
    body = {**HELLO, "ignore_eos": True, "max_tokens": 10_000}
    with TestClient(create_app([engine], "tiny", Limits(request_timeout_s=0.3))) as client:
        late = client.post(CHAT, json=body)
        assert (late.status_code, late.json()["error"]["code"], late.headers["x-should-retry"]) == (504, "timeout", "false")
        assert _events(client.post(CHAT, json={**body, "stream": True}).text)[-1]["error"]["code"] == "timeout"
        wait_for(lambda: engine.scheduler.num_running == 0, "the text to end")


def test_many_at_once_are_all_answered(engine: Engine) -> None:
    from concurrent.futures import ThreadPoolExecutor

    import httpx

    with serve(create_app([engine], "tiny")) as port, httpx.Client(timeout=60, limits=httpx.Limits()) as client:
        url = f"http://127.0.0.1:{port}{CHAT}"
        with ThreadPoolExecutor(32) as pool:
            answers = list(pool.map(lambda i: client.post(url, json={**HELLO, "n": 1 + i % 3}), range(64)))
    texts = {answer.json()["choices"][0]["message"]["content"] for answer in answers}
    assert [answer.status_code for answer in answers] == [200] * 64
    assert texts == {_expected(engine).text}


@pytest.mark.slow
def test_no_request_makes_it_fail(engine: Engine) -> None:
    """Fuzzed by schemathesis from the server's own description of itself; afterwards it still answers."""
    program = Path(sys.executable).with_name("schemathesis")
    if not program.exists():
        pytest.skip("schemathesis is not installed: bash runs/setup.sh dev")
    with serve(create_app([engine], "tiny")) as port:
        url = f"http://127.0.0.1:{port}"
        flags = ["--checks=not_a_server_error", "--max-examples=15", "--workers=1", "--seed=1", "--no-color"]
        command = [str(program), "run", f"{url}/openapi.json", *flags]
        result = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
        assert "Server error" not in result.stdout and "Test cases:" in result.stdout, result.stdout[-3000:]
        with urllib.request.urlopen(f"{url}/stats") as response:
            assert json.load(response)["running"] == 0


def test_running_answers_are_ended_properly_when_the_server_stops(engine: Engine) -> None:
    app = create_app([engine], "tiny")
    decode = engine.scheduler.runner.decode
    engine.scheduler.runner.decode = lambda *args: time.sleep(0.02) or decode(*args)
    with serve(app) as port, socket.create_connection(("127.0.0.1", port)) as connection:
        connection.sendall(http_request({**HELLO, "stream": True, "ignore_eos": True, "max_tokens": 10_000}))
        wait_for(lambda: engine.scheduler.num_running == 1, "a text to run")
        app.state.service.cancel_all()
        connection.settimeout(20)
        received = b""
        while b"[DONE]" not in received:
            received += connection.recv(4096)
        assert b'"finish_reason": "length"' in received


SERVE_WHILE_COMPILING = """
import sys, time
from nanochat.common import run_command
from nanochat.engine import Engine
from scripts.chat_web import main
Engine.compile = lambda self: time.sleep(120)
sys.exit(run_command(main))
"""


@pytest.mark.parametrize("presses", [1, 3])
def test_ctrl_c_stops_a_server_that_still_compiles(tiny_run: Path, presses: int) -> None:
    """At once, with a clean exit code; and who waited for an answer gets the end of one."""
    port = free_port()
    command = [sys.executable, "-c", SERVE_WHILE_COMPILING, "--model-tag=tiny", "--device-type=cpu", f"--port={port}"]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        wait_for(lambda: _status(port) == "compiling", "the compiler", 60)
        with socket.create_connection(("127.0.0.1", port)) as connection:
            connection.sendall(http_request(HELLO))
            stats = f"http://127.0.0.1:{port}/stats"
            wait_for(lambda: b'"waiting":1' in urllib.request.urlopen(stats).read(), "a request to wait")
            began = time.monotonic()
            for _ in range(presses):
                server.send_signal(signal.SIGINT)
                time.sleep(0.05)
            output, _ = server.communicate(timeout=60)
            assert time.monotonic() - began < 30 and server.returncode == 0, output
            assert "Traceback" not in output
            assert presses > 1 or b'"finish_reason":"length"' in connection.recv(4096)
    finally:
        server.kill()


def _status(port: int) -> str | None:
    try:
        return json.load(urllib.request.urlopen(f"http://127.0.0.1:{port}/health"))["status"]
    except OSError:
        return None

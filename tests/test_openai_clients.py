"""What OpenAI's clients and the programs built on them send, and what they count on in a reply."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from fastapi.testclient import TestClient
from pydantic import ValidationError

from nanochat import openai_api
from nanochat.openai_api import MAX_MESSAGES, MAX_PARTS, ChatRequest
from nanochat.server import create_app
from nanochat.tokenizer import Tokenizer
from tests.helpers import make_engine

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
GREETING, QUESTION = {"role": "assistant", "content": "How can I help?"}, {"role": "user", "content": "Hi"}
RULES = {"role": "system", "content": "Be kind."}


@pytest.fixture
def client(tokenizer: Tokenizer) -> Iterator[TestClient]:
    engine = make_engine(tokenizer)
    with TestClient(create_app([engine], "tiny")) as client:
        yield client


@pytest.mark.parametrize(
    ("messages", "read"),
    [
        ([GREETING, QUESTION], ["user"]), ([RULES, GREETING, QUESTION], ["system", "user"]), ([RULES], ["user"]),
        ([QUESTION, GREETING, QUESTION], ["user", "assistant", "user"]),
        ([QUESTION, {"role": "assistant"}, QUESTION], ["user", "assistant", "user"]),
        ([QUESTION, {**RULES, "role": "developer"}], ["system", "user"]),
    ],
)  # fmt: skip
def test_conversations_as_programs_keep_them(client: TestClient, messages: list[dict], read: list[str]) -> None:
    """With the greeting that their page shows first, with rules alone, with an answer of no text."""
    turns = ChatRequest.model_validate({"messages": messages}).conversation()["messages"]
    assert [turn["role"] for turn in turns] == read
    assert client.post(CHAT, json={"messages": messages, "max_tokens": 2}).status_code == 200


@pytest.mark.parametrize("messages", [[GREETING], [QUESTION, GREETING], [RULES, GREETING]])
def test_there_must_be_something_to_answer(client: TestClient, messages: list[dict]) -> None:
    error = client.post(CHAT, json={"messages": messages}).json()["error"]
    assert error["message"].startswith("the last message must be the user's: ") and error["param"] == "messages"


@pytest.mark.parametrize("empty", ["", [], [{"type": "text", "text": ""}]])
def test_what_is_empty_changes_nothing(empty: str | list) -> None:
    """A client's empty system field above all."""
    padded = [{"role": "system", "content": empty}]
    for message in (QUESTION, GREETING, QUESTION):
        padded += [{"role": message["role"], "content": empty}, message, {"role": message["role"], "content": empty}]
    found, expected = (
        ChatRequest.model_validate({"messages": messages}).conversation()["messages"]
        for messages in (padded, [QUESTION, GREETING, QUESTION])
    )
    for mine, theirs in zip(found, expected, strict=True):
        texts = ["".join(p["text"] for p in c) if isinstance(c := turn["content"], list) else c for turn in (mine, theirs)]
        assert mine["role"] == theirs["role"] and texts[0] == texts[1]


def test_a_long_conversation_goes_on(client: TestClient) -> None:
    reply = client.post(CHAT, json={"messages": [QUESTION, GREETING] * 900 + [QUESTION], "max_tokens": 2})
    assert reply.status_code == 200 and reply.json()["nanochat"]["dropped_turns"] > 800


@pytest.mark.parametrize("ignore_eos", [False, True])
def test_a_completions_logprobs_are_the_same_streamed_and_whole(client: TestClient, ignore_eos: bool) -> None:
    """With that of the token that ended it."""
    ended = 0
    for seed in range(12):
        body: dict[str, Any] = {"prompt": "the", "seed": seed, "temperature": 2, "logprobs": 1, "max_tokens": 40,
                                "ignore_eos": ignore_eos}  # fmt: skip
        (whole,) = client.post(TEXT, json=body).json()["choices"]
        lines = client.post(TEXT, json={**body, "stream": True}).text.split("\n\n")
        chunks = [json.loads(line[6:])["choices"][0] for line in lines if line.startswith("data: {")]
        for name, values in whole["logprobs"].items():
            assert [value for chunk in chunks if chunk["logprobs"] for value in chunk["logprobs"][name]] == values, name
        ended += whole["finish_reason"] == "stop"
    assert ignore_eos or ended


def test_a_wrong_item_of_a_list_is_told_once() -> None:
    """Errors of a million take ten seconds and a gigabyte, in which nobody is served."""
    messages = [{"role": "user", "content": [0] * MAX_PARTS}] * MAX_MESSAGES
    for body in ({"messages": messages}, {"messages": [{**QUESTION, "nanochat": {"parts": [0] * MAX_PARTS}}]}):
        with pytest.raises(ValidationError) as failure:
            ChatRequest.model_validate(body)
        assert failure.value.error_count() < 10


def test_a_reply_holds_no_more_log_probabilities_than_can_be_written(
    client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(openai_api, "MAX_LOGPROB_VALUES", 12 * 4)
    for path, asked in (
        (CHAT, {"messages": [QUESTION], "max_tokens": 12, "logprobs": True, "top_logprobs": 3}),
        (TEXT, {"prompt": "a", "max_tokens": 12, "logprobs": 3}),
    ):
        assert client.post(path, json=asked).status_code == 200
        for more in ({"n": 2}, {"max_tokens": 13}):
            error = client.post(path, json={**asked, **more}).json()["error"]
            assert "ask for fewer texts, tokens (max_tokens) or alternatives" in error["message"]
    prompt = {"prompt": "a long text", "max_tokens": 12, "logprobs": 3, "echo": True}
    assert client.post(TEXT, json=prompt).status_code == 400


@pytest.mark.parametrize(
    ("method", "path"),
    [("POST", "/chat/completions"), ("POST", "/completions"), ("GET", "/models"), ("POST", "/v1/v1/completions"),
     ("POST", "/v1/chat/completions/chat/completions")],
)  # fmt: skip
def test_a_wrong_address_gets_the_right_one(client: TestClient, method: str, path: str) -> None:
    """A base URL without /v1, or with too much. The page's stream is no reply to OpenAI's client."""
    response = client.request(method, path, json={"model": "tiny", "messages": [QUESTION]} if method == "POST" else None)
    assert response.status_code == 404
    assert "OpenAI's API has the base URL http://testserver/v1" in response.json()["error"]["message"]


@pytest.mark.parametrize("path", ["/v1/responses", "/v1/embeddings", "/v1/chat/completions/chatcmpl-1/messages"])
def test_what_is_not_served_is_not_blamed_on_the_address(client: TestClient, path: str) -> None:
    response = client.post(path, json={"model": "tiny", "input": "Hi"})
    assert response.status_code == 404 and response.json()["error"]["message"].startswith(f"POST {path} is not offered here")


def test_replies_have_what_openais_types_require(client: TestClient) -> None:
    """Also where it may be null: clients that are generated from OpenAI's description refuse a reply without it."""
    body = {"messages": [QUESTION], "max_tokens": 4, "ignore_eos": True, "logprobs": True}
    (choice,) = client.post(CHAT, json=body).json()["choices"]
    assert choice["message"]["refusal"] is None and choice["logprobs"]["refusal"] is None
    lines = client.post(CHAT, json={**body, "stream": True}).text.split("\n\n")
    chunks = [json.loads(line[6:])["choices"][0] for line in lines if line.startswith("data: {")]
    found = [chunk["logprobs"] for chunk in chunks if chunk["logprobs"] is not None]
    assert found and all(logprobs["refusal"] is None for logprobs in found)


def test_a_refusal_in_a_history_is_text(client: TestClient) -> None:
    def read(*content: dict[str, Any]) -> Any:
        messages = [QUESTION, {"role": "assistant", "content": content, "refusal": None}, QUESTION]
        return client.post("/tokenize", json={"messages": messages}).json()

    refusal = {"type": "refusal", "refusal": "I would rather not."}
    assert read(refusal) == read({"type": "text", "text": "I would rather not."})
    assert read({"type": "refusal"})["error"]["param"].startswith("messages.1.content.0")


def test_every_reply_has_the_id_of_its_request(client: TestClient) -> None:
    """The client's own, if it is fit for a header."""
    for path, status in (("/health", 200), ("/nowhere", 404)):
        ours = [(reply := client.get(path)).headers["x-request-id"] for _ in range(2)]
        assert reply.status_code == status and ours[0] != ours[1] and ours[0].startswith("req_")
        for sent, taken in (
            ("my-1", True),
            ("x" * 128, True),
            ("x" * 129, False),
            ("", False),
            ("a b", False),
            ("\xe9", False),
        ):
            given = client.get(path, headers={"X-Request-Id": sent.encode("latin-1")}).headers["x-request-id"]
            assert (given == sent) is taken and given


def test_a_reply_to_a_request_that_failed_here_has_its_id(tokenizer: Tokenizer) -> None:
    app = create_app([make_engine(tokenizer)], "tiny")
    app.add_api_route("/fails", lambda: 1 // 0)
    with TestClient(app, raise_server_exceptions=False) as client:
        reply = client.get("/fails", headers={"X-Request-Id": "my-1"})
    assert reply.status_code == 500 and reply.headers.get_list("x-request-id") == ["my-1"]


@pytest.mark.parametrize(("path", "body"), [(CHAT, {"messages": [{**QUESTION, "content": "word " * 2000}]}),
                                            (TEXT, {"prompt": "word " * 2000})])  # fmt: skip
def test_what_is_too_long_is_called_so_in_openais_words(client: TestClient, path: str, body: dict[str, Any]) -> None:
    """Programs know by them when to take another model; its code alone does not tell litellm."""
    response = client.post(path, json=body)
    error, context = response.json()["error"], client.get("/stats").json()["context"]
    assert response.status_code == 400 and error["code"] == "context_length_exceeded"
    assert error["message"].startswith(f"this model's maximum context length is {context} tokens, and ")


@pytest.mark.parametrize("body", [b"", b"null", b"[]", b"5", b'"hi"'])
def test_a_body_that_is_no_object_is_called_that(client: TestClient, body: bytes) -> None:
    for path in (CHAT, TEXT, "/chat/completions", "/tokenize"):
        response = client.post(path, content=body, headers={"Content-Type": "application/json"})
        assert response.status_code == 400 and "must be a JSON object" in response.json()["error"]["message"]


def test_the_harness_learns_which_token_begins_a_text(client: TestClient, tokenizer: Tokenizer) -> None:
    """lm-eval's remote tokenizer asks for the first id of a name; what it reads behind another one, it measures wrongly."""
    names = {name: value for name, value in client.get("/tokenizer_info").json().items() if name.endswith("_token")}
    assert names == {"bos_token": "<|bos|>", "eos_token": "<|assistant_end|>"}

    def ask(prompt: str, **more: Any) -> list[int]:
        tokens: list[int] = client.post("/tokenize", json={"prompt": prompt, **more}).json()["tokens"]
        return tokens

    for name in names.values():
        assert ask(name, add_special_tokens=False) == [tokenizer.encode_special(name)]
        assert ask(name) == tokenizer.encode(name)  # as in a message: the page shows what the model reads
        assert ask(f"a{name}", add_special_tokens=False) == tokenizer.encode(f"a{name}")


def test_biases_and_penalties_decide_what_is_said(client: TestClient, tokenizer: Tokenizer) -> None:
    def tokens(**settings: Any) -> list[str]:
        body = {"prompt": "the", "max_tokens": 40, "temperature": 0, "logprobs": 0, "ignore_eos": True, **settings}
        return client.post(TEXT, json=body).json()["choices"][0]["logprobs"]["tokens"]

    (cat,) = tokenizer.encode(" cat")
    assert tokens(logit_bias={cat: 100}) == [" cat"] * 40
    assert " cat" not in tokens(logit_bias={cat: -100})
    for penalty in ("presence_penalty", "frequency_penalty"):
        assert len(set(tokens(**{penalty: 2}))) > len(set(tokens())) > len(set(tokens(**{penalty: -2})))


def test_the_description_has_the_replies_that_come(client: TestClient) -> None:
    """FastAPI's own 422 never does."""
    described = client.get("/openapi.json").json()
    errors = [client.post(CHAT, json={}), client.get("/v1/models/other"), client.post(TEXT, json={"prompt": "word " * 2000})]
    for operations in described["paths"].values():
        for operation in operations.values():
            assert set(operation["responses"]) == {"200", "4XX", "5XX"}
    form = {"$ref": "#/components/schemas/ErrorReply"}
    assert described["paths"][CHAT]["post"]["responses"]["4XX"]["content"]["application/json"]["schema"] == form
    for error in errors:
        assert set(error.json()["error"]) == set(described["components"]["schemas"]["ErrorDetails"]["properties"])
    (kind,) = described["paths"]["/metrics"]["get"]["responses"]["200"]["content"]
    assert client.get("/metrics").headers["content-type"].startswith(kind) and kind == "text/plain"

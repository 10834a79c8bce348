"""Conversations from another model: against an endpoint that errs in every way, and against our own server."""

from __future__ import annotations

import asyncio
import json
import random
import re
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse

pytest.importorskip("openai", reason="the extra synthetic is not installed")

from dev import gen_synthetic_data
from dev.gen_synthetic_data import CHOICES, Facts, RejectedError, Signatures, check_conversation, draw_plan, find_json
from nanochat.common import NanochatError
from nanochat.engine import Engine
from nanochat.server import create_app
from nanochat.tokenizer import Tokenizer
from tasks.customjson import CustomJSON
from tests.helpers import make_document, make_model, serve


class FakeEndpoint:
    """Answers as OpenAI's API does. `behave(number)` gives request number's reply: a text, or (status, text)."""

    def __init__(self, behave: Callable[[int], Any]) -> None:
        self.requests: list[dict[str, Any]] = []
        self.now = self.most_at_once = 0
        self.behave = behave
        self.app = FastAPI()
        self.app.post("/v1/chat/completions")(self.complete)
        self.app.get("/v1/models")(lambda: {"object": "list", "data": [{"id": "fake-1", "object": "model"}]})

    async def complete(self, request: Request) -> JSONResponse:
        body = await request.json()
        number = len(self.requests)
        self.requests.append(body)
        self.now += 1
        self.most_at_once = max(self.most_at_once, self.now)
        await asyncio.sleep(0.01)
        self.now -= 1
        reply, finish = self.behave(number), "stop"
        if isinstance(reply, tuple):
            status, reply = reply
            if status != 200:
                return JSONResponse({"error": {"message": reply}}, status, {"retry-after-ms": "1"})
            finish = "length"
        choice = {"index": 0, "finish_reason": finish, "message": {"role": "assistant", "content": reply}}
        return JSONResponse({"id": "1", "object": "chat.completion", "created": 0, "model": "fake-1", "choices": [choice]})


def words(seed: int) -> str:
    rng = random.Random(seed)
    return " ".join("".join(rng.choices("abcdefghijklmnop", k=rng.randrange(2, 9))) for _ in range(30))


def conversation(number: int, turns: int = 1) -> str:
    contents = [words(1000 * number + i) for i in range(2 * turns)]
    return json.dumps([{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(contents)])


@pytest.fixture
def facts(tmp_path: Path) -> Path:
    path = tmp_path / "facts.txt"
    path.write_text("The assistant is called Möwe.", encoding="utf-8")
    return path


@pytest.fixture
def make(facts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Path]]:
    """make(port, flags...) runs the command and returns the path of what it wrote."""
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)

    def run(port: int, *flags: str) -> Path:
        path = tmp_path / "out" / "identity.jsonl"
        base = [f"--base-url=http://127.0.0.1:{port}/v1", f"--facts={facts}", f"--output={path}", "--concurrency=4"]
        assert gen_synthetic_data.main([*base, *flags]) == 0
        return path

    yield run


def test_its_flags_may_stand_in_a_file(tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text('facts = "~/facts.txt"\nnumber = 7\nby_turns = true', encoding="utf-8")
    args = gen_synthetic_data.parse_arguments([f"--config={tmp_path / 'mine.toml'}", "--seed=3"])
    assert (args.facts, args.number, args.by_turns, args.seed) == (Path("~/facts.txt").expanduser(), 7, True, 3)


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


# ----------------------------------------------------------------------------- whole runs


def test_only_good_conversations_are_kept_of_an_endpoint_that_errs(make, capsys: pytest.CaptureFixture) -> None:
    bad: list[Any] = [
        (429, "slow down"), (500, "oops"), (503, "busy"),  # repeated
        (400, "too long"), "I cannot do that.", '[{"role": "user"', '{"messages": 7}', "", None,
        '[{"role": "user", "content": "Hi"}]',
        '[{"role": "assistant", "content": "a"}, {"role": "user", "content": "b"}]',
        conversation(0), (200, conversation(1)[:-20]),
        '[{"role": "user", "content": " "}, {"role": "assistant", "content": "b"}]',
    ]  # fmt: skip
    fake = FakeEndpoint(lambda number: bad[number // 2] if number % 2 and number // 2 < len(bad) else conversation(number))
    with serve(fake.app) as port:
        path = make(port, "--number=30")
    assert len(rows_of(path)) == 30
    assert len(CustomJSON(path, "train")) + len(CustomJSON(path, "val")) == 30
    assert 1 < fake.most_at_once <= 4
    printed = capsys.readouterr().out
    for reason in ("HTTP 400: ", "cut off", "no JSON", "no list", "even number", "turns", "is empty", "nearly the same"):
        assert re.search(rf"rejected \d+: .*{reason}", printed), reason
    assert "HTTP 429" not in printed
    assert fake.requests[0]["model"] == "fake-1"
    assert "Möwe" in fake.requests[0]["messages"][0]["content"]


def test_it_goes_on_where_it_stopped(make, capsys: pytest.CaptureFixture) -> None:
    fake = FakeEndpoint(conversation)
    with serve(fake.app) as port:
        path = make(port, "--number=5")
        before = path.read_bytes()
        path.write_bytes(before + b'{"messages": [{"role": "us')  # a crash
        make(port, "--number=9")
        asked = len(fake.requests)
        make(port, "--number=9")
    assert len(fake.requests) == asked
    assert path.read_bytes().startswith(before)
    assert sorted(row["plan"]["number"] for row in rows_of(path)) == list(range(9))
    assert "9 conversations" in capsys.readouterr().out


def test_an_endpoint_that_never_helps_ends_the_run_and_loses_nothing(make) -> None:
    fake = FakeEndpoint(lambda number: conversation(number) if number < 3 else "no")
    with serve(fake.app) as port, pytest.raises(NanochatError, match=r"in a row.*no JSON.*3 kept are in") as raised:
        make(port, "--number=50")
    assert len(rows_of(Path(str(raised.value).rsplit(" ", 1)[-1]))) == 3


@pytest.mark.parametrize(("status", "words"), [(401, "--api-key"), (403, "--api-key"), (404, "--model")])
def test_what_no_repetition_mends_is_said_at_once(make, status: int, words: str) -> None:
    fake = FakeEndpoint(lambda number: (status, "no"))
    with serve(fake.app) as port, pytest.raises(NanochatError, match=words):
        make(port, "--number=50", "--model=other")
    assert len(fake.requests) <= 4


def test_an_absent_endpoint_is_named(make) -> None:
    with serve(FastAPI()) as port:
        pass
    with pytest.raises(NanochatError, match=f"127.0.0.1:{port}.*--base-url"):
        make(port, "--retries=0")


def test_other_facts_or_anothers_file_are_refused(make, facts: Path) -> None:
    with serve(FakeEndpoint(conversation).app) as port:
        path = make(port, "--number=2")
        written = path.read_bytes()
        facts.write_text("Something else.", encoding="utf-8")
        with pytest.raises(NanochatError, match="other facts"):
            make(port, "--number=4")
        assert path.read_bytes() == written
        path.write_text(conversation(0), encoding="utf-8")
        with pytest.raises(NanochatError, match="another --output"):
            make(port, "--number=4")
        assert path.read_text(encoding="utf-8") == conversation(0)


def test_by_turns_the_model_plays_both_roles(make) -> None:
    fake = FakeEndpoint(words)
    with serve(fake.app) as port:
        path = make(port, "--number=8", "--by-turns")
    for row in rows_of(path):
        assert row["messages"][0]["content"] == row["plan"]["first_message"]
        assert len(row["messages"]) == 2 * row["plan"]["turns"]
    assert all(request["messages"][-1]["role"] == "user" for request in fake.requests)
    as_user = [r["messages"] for r in fake.requests if r["messages"][0]["content"].startswith("You play the user")]
    assert as_user and all("Möwe" not in messages[0]["content"] for messages in as_user)  # a user knows no facts


@pytest.mark.slow
def test_our_own_server_serves(make, tokenizer: Tokenizer) -> None:
    """With a model of random weights, which at such a temperature ends its answers by chance."""
    model = make_model(sequence_len=2048, vocab_size=tokenizer.get_vocab_size())
    with serve(create_app([Engine(model, tokenizer)], "random")) as port:
        path = make(port, "--number=2", "--by-turns", "--concurrency=2", "--temperature=50")
    assert len(rows_of(path)) == 2


# ----------------------------------------------------------------------------- parts


def test_plans_depend_on_seed_and_number_and_spread_over_all_choices() -> None:
    facts = Facts("x")
    plans = [draw_plan(facts, 0, number) for number in range(600)]
    assert plans[7] == draw_plan(facts, 0, 7)
    assert plans[7] != draw_plan(facts, 1, 7)
    assert {plan.topic for plan in plans} == set(CHOICES["topics"])
    assert {plan.persona for plan in plans} == set(CHOICES["personas"])
    assert {plan.language for plan in plans} == set(CHOICES["languages"])
    assert max(Counter(plans).values()) == 1


def test_similarity_is_the_share_of_text_in_common() -> None:
    def chat(*contents: str) -> list[dict[str, str]]:
        return [{"role": "user", "content": content} for content in contents]

    signatures = Signatures()
    first = make_document(1, 20)
    assert signatures.similarity(chat(first))[0] == 0
    signatures.add(*signatures.similarity(chat(first)))
    assert signatures.similarity(chat(first.upper()))[0] == 1
    shingles = [{text[i : i + 5] for i in range(len(text) - 4)} for text in (first, first[: len(first) // 2])]
    exact = len(shingles[0] & shingles[1]) / len(shingles[0] | shingles[1])
    assert signatures.similarity(chat(first[: len(first) // 2]))[0] == pytest.approx(exact, abs=0.15)
    for seed in range(2, 200):  # more than it begins with room for
        signatures.add(*signatures.similarity(chat(make_document(seed, 20))))
    assert signatures.similarity(chat(first))[0] == 1


@pytest.mark.parametrize("wrapped", ["{}", "Sure! Here it is:\n```json\n{}\n```\nEnjoy.", '{{"messages": {}}}', "[sic] {}"])
def test_json_is_found_in_what_models_write_around_it(wrapped: str) -> None:
    messages = check_conversation(find_json(wrapped.format(conversation(3, 2))))
    assert [message["role"] for message in messages] == ["user", "assistant"] * 2


@pytest.mark.parametrize("endless", ["[" * 20_000, '[{"role": ' * 5_000, f"[{'1' * 5_000}]"])
def test_a_reply_that_repeats_itself_holds_no_json(endless: str) -> None:
    with pytest.raises(RejectedError, match="no JSON"):
        find_json(endless)


def test_half_a_character_is_refused() -> None:
    with pytest.raises(RejectedError, match="half"):
        check_conversation([{"role": "user", "content": "\ud83d"}, {"role": "assistant", "content": "b"}])


def test_facts_in_toml_replace_choices(tmp_path: Path) -> None:
    path = tmp_path / "facts.toml"
    path.write_text('facts = ["It is called Möwe.", "It is small."]\nlanguages = ["Dutch"]\n', encoding="utf-8-sig")
    facts = gen_synthetic_data.read_facts(path)
    assert facts.text == "- It is called Möwe.\n- It is small."
    assert {draw_plan(facts, 0, number).language for number in range(20)} == {"Dutch"}
    assert facts.choices["topics"] == CHOICES["topics"]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.txt", " \n", "says nothing"), ("a.toml", 'facts = ""', "says nothing"), ("a.toml", "facts = 7", "list of strings"),
        ("a.toml", 'facts = "x"\ntopics = []', "topics"), ("a.toml", 'fact = "x"', "known are facts, topics"),
        ("a.toml", "facts", "is not TOML"), ("b/absent.txt", None, "cannot be read"),
    ],
)  # fmt: skip
def test_facts_that_cannot_be_used_are_named(name: str, content: str | None, words: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / name).write_text(content, encoding="utf-8")
    with pytest.raises(NanochatError, match=words):
        gen_synthetic_data.read_facts(tmp_path / name)

"""A conversation that is too long loses its oldest turns, as few as possible, and never its system message."""

from __future__ import annotations

from pathlib import Path

import pytest

from nanochat.common import NanochatError
from nanochat.engine import Engine
from nanochat.sequence import Sequence
from nanochat.tokenizer import Tokenizer
from nanochat.trimming import prompt_room, trim_conversation
from scripts import chat_rl
from scripts.chat_rl import check_room
from tasks import build_judged_task
from tasks.common import Conversation, Task


def test_an_answer_claims_what_it_may_be_long_but_a_share_of_the_context_at_most() -> None:
    assert [prompt_room(1000, answer) for answer in (0, 1, 100, 250, 900, None)] == [999, 999, 900, 750, 750, 750]
    assert prompt_room(2, 1) == prompt_room(2) == 1
    assert [prompt_room(1000, answer, 0.5) for answer in (0, 1, 400, 900, None)] == [999, 999, 600, 500, 500]
    assert [prompt_room(1000, answer, 1) for answer in (1, 400, 999, 1000, 2000)] == [999, 600, 1, 1, 1]


def test_conversations_are_trimmed_at_turns(tokenizer: Tokenizer) -> None:
    turns = [{"role": role, "content": f"message {i} " * 5} for i in range(10) for role in ("user", "assistant")]
    conversation = {"messages": [{"role": "system", "content": "Be kind."}, *turns, {"role": "user", "content": "last"}]}
    kept, dropped = trim_conversation(conversation, tokenizer, 200)
    assert dropped > 0
    assert len(tokenizer.render_for_completion(kept)) <= 200
    assert kept["messages"][0]["role"] == "system"
    assert kept["messages"][-1]["content"] == "last"
    assert kept["messages"][1]["role"] == "user"
    assert trim_conversation(conversation, tokenizer, 10_000) == (conversation, 0)
    with pytest.raises(NanochatError, match="does not fit"):
        trim_conversation(conversation, tokenizer, 5)


@pytest.mark.parametrize("count", [1, 2, 3, 4, 21, 22])
def test_as_few_turns_as_possible_are_dropped(tokenizer: Tokenizer, count: int) -> None:
    turns = [{"role": "assistant" if i % 2 else "user", "content": f"word {i} " * (i % 5 + 1)} for i in range(count)]
    for first in ([], [{"role": "system", "content": "Be kind."}]):
        rests = [{"messages": first + turns[2 * n :]} for n in range((count + 1) // 2)]
        lengths = [len(tokenizer.render_for_completion(rest)) for rest in rests]
        for limit in range(min(lengths), max(lengths) + 2):
            expected = next(n for n, length in enumerate(lengths) if length <= limit)
            assert trim_conversation({"messages": first + turns}, tokenizer, limit) == (rests[expected], expected)
        last = len(tokenizer.render_for_completion({"messages": turns[-1 - (count + 1) % 2 :]}))
        told = f"{last} tokens after a system prompt of {lengths[-1] - last}" if first else f"{last} tokens"
        with pytest.raises(NanochatError, match=f"a message of {told} does not fit the {lengths[-1] - 1} that the context"):
            trim_conversation({"messages": first + turns}, tokenizer, lengths[-1] - 1)


def test_trimming_a_long_conversation_takes_few_renderings(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    turns = [{"role": "assistant" if i % 2 else "user", "content": f"word {i}"} for i in range(499)]
    rendered: list[int] = []
    render = tokenizer.render_for_completion
    monkeypatch.setattr(tokenizer, "render_for_completion", lambda c: rendered.append(len(c["messages"])) or render(c))
    _, dropped = trim_conversation({"messages": turns}, tokenizer, 100)
    assert dropped > 200 and len(rendered) <= 10


def test_questions_that_do_not_fit_beside_their_answers(tokenizer: Tokenizer, capsys: pytest.CaptureFixture) -> None:
    task = build_judged_task("Arithmetic", "train")
    lengths = sorted(len(tokenizer.render_for_completion(task[i])) for i in range(100))
    check_room(task, tokenizer, 8, lengths[-1] + 8)
    assert capsys.readouterr().out == ""
    check_room(task, tokenizer, 8, lengths[-1] + 7)
    longest = lengths.count(lengths[-1])
    assert f"{longest} of the first 100 questions lose their beginning" in capsys.readouterr().out
    for context in (8, lengths[0] + 7):
        with pytest.raises(NanochatError, match=f"leaves no room for a question in a context of {context}"):
            check_room(task, tokenizer, 8, context)


def test_reinforcing_trains_and_measures_on_the_same_prompts(tiny_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each leaves room for the whole answer, though it may be half of the context."""

    class Long(Task):
        def num_examples(self) -> int:
            return 4

        def get_example(self, index: int) -> Conversation:
            question = {"role": "user", "content": "123 " * (5 if index < 2 else 60)}
            return {"messages": [question, {"role": "assistant", "content": "e"}]}

        def evaluate(self, conversation: Conversation, completion: str) -> float:
            return 0.0

    kept: dict[bool, set[tuple[int, ...]]] = {}
    run = Engine.run

    def watched(engine: Engine, sequences: list[Sequence]) -> None:
        trains = sequences[0].params.policy_logprobs
        kept.setdefault(trains, set()).update(tuple(sequence.prompt) for sequence in sequences)
        run(engine, sequences)

    monkeypatch.setattr(chat_rl, "build_judged_task", lambda *_: Long())
    monkeypatch.setattr(Engine, "run", watched)
    flags = ["--model-tag=tiny", "--task=Arithmetic", "--num-iterations=1", "--examples-per-step=4", "--num-samples=2",
             "--max-new-tokens=64", "--eval-samples=1", "--sample-every=1", "--device-type=cpu", "--no-compile"]  # fmt: skip
    assert chat_rl.main(flags) == 0
    assert kept[True] == kept[False] and max(map(len, kept[True])) == 128 - 64

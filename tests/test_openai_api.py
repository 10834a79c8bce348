"""OpenAI's API as data: what requests may ask for, up to its limits, and what replies count."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from nanochat.openai_api import ChatRequest, CompletionRequest, Message, usage
from nanochat.sequence import Sequence

MESSAGES = [{"role": "user", "content": "Hi"}]


@pytest.mark.parametrize(
    ("name", "fine", "bad"),
    [
        ("model", ["", "x" * 500], ["x" * 501]),
        ("temperature", [0, 100], [-0.01, 100.01]),
        ("top_p", [0, 1], [-0.01, 1.01]),
        ("top_k", [-1, 0, 1 << 20], [-2, (1 << 20) + 1]),
        ("min_p", [0, 1], [-0.01, 1.01]),
        ("repetition_penalty", [0.01, 100], [0, 100.01]),
        ("presence_penalty", [-2, 2], [-2.01, 2.01]),
        ("frequency_penalty", [-2, 2], [-2.01, 2.01]),
        ("n", [1, 64], [0, 65]),
        ("seed", [-(2**63), 2**63 - 1], [-(2**63) - 1, 2**63]),
        ("max_tokens", [0, 1 << 20], [-1, (1 << 20) + 1]),
        ("stop", ["x" * 1000, [], ["x"] * 16], ["", "x" * 1001, ["x"] * 17, ["x", ""]]),
        ("logit_bias", [{}, {"0": -100, "999999999": 100}, dict.fromkeys(map(str, range(1000)), 1)],
         [{"1": 100.01}, {"1": -100.01}, {"1": True}, {"-1": 1}, {"1" * 10: 1}, dict.fromkeys(map(str, range(1001)), 1)]),
    ],
)  # fmt: skip
def test_settings_are_taken_up_to_their_limits(name: str, fine: list[Any], bad: list[Any]) -> None:
    for request, body in ((ChatRequest, {"messages": MESSAGES}), (CompletionRequest, {"prompt": "x"})):
        for value in (None, *fine):
            request.model_validate({**body, name: value}).params(choice=0, max_tokens=1, logprobs=None)
        for value in bad:
            with pytest.raises(ValidationError, match=name):
                request.model_validate({**body, name: value})


def test_the_best_of_some_texts_is_all_of_them() -> None:
    for asked in ({"best_of": 1}, {"best_of": 2, "n": 2}, {"best_of": None, "n": 2}):
        CompletionRequest.model_validate({"prompt": "x", **asked})
    for asked in ({"best_of": 2}, {"best_of": 1, "n": 2}):
        with pytest.raises(ValidationError, match="ask for n texts and choose"):
            CompletionRequest.model_validate({"prompt": "x", **asked})


def test_a_prompt_is_counted_once_and_each_of_its_samples() -> None:
    sequences = [
        Sequence([1] * length, tokens=[7] * written, cached_tokens=cached)
        for length, written, cached in ((3, 1, 2), (3, 2, 3), (3, 4, 3), (5, 8, 4), (5, 16, 5), (5, 0, 5))
    ]
    assert usage(sequences, 2) == {
        "prompt_tokens": 8, "completion_tokens": 31, "total_tokens": 39, "prompt_tokens_details": {"cached_tokens": 6},
    }  # fmt: skip


def test_parts_are_taken_as_long_as_they_say_what_the_message_says() -> None:
    """OpenAI's JavaScript client keeps only the last parts of a stream; other clients let their users edit the text."""
    call = {"type": "python", "text": "9*9"}
    parts = [{"type": "text", "text": "It is "}, call, {"type": "text", "text": "81."}]

    def read(content: Any, sent: list[dict[str, str]], role: str = "assistant") -> list[dict[str, str]]:
        return Message.model_validate({"role": role, "content": content, "nanochat": {"parts": sent}}).parts()

    def text(content: str) -> list[dict[str, str]]:
        return [{"type": "text", "text": content}]

    for content in ("It is 81.", None, text("It is 81."), text("It is ") + text("81.")):
        assert read(content, parts) == parts
    for content in ("", None, []):
        assert read(content, [call]) == [call]
    for content, sent in (("It is 81.", parts[2:]), ("It is 82.", parts), ("", parts), ("It is 81.", [call]), ("81.", [])):
        assert read(content, sent) == text(content)
    assert read("It is 81.", parts, role="user") == text("It is 81.")

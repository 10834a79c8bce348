"""Makes texts fit: shortens what is too long for a context, prompts or conversations, and pads what is computed together."""

from __future__ import annotations

import bisect
import functools
from typing import Any

import torch

from nanochat.common import NanochatError
from nanochat.tokenizer import Tokenizer


def prompt_room(context: int, answer: int | None = None, context_share: float = 0.25) -> int:
    """Tokens of a context that a prompt may take, at least one; the rest is for an answer of up to `answer` tokens.

    context_share: how much of the context the answer may claim at most; with 1 the prompt is cut rather than the answer.
    """
    claimed = min(context if answer is None else answer, int(context_share * context))
    return max(1, context - max(1, claimed))


def trim_prompt(tokens: list[int], most: int) -> list[int]:
    """At most `most` tokens: a longer prompt loses its oldest tokens except the first, since its end matters most."""
    return tokens if len(tokens) <= most else [tokens[0], *tokens[len(tokens) - most + 1 :]]


def padded(rows: list[list[int]], filler: int, device: torch.device) -> torch.Tensor:
    """(rows, longest) int64: rows of any lengths, filled up on the right."""
    longest = max(map(len, rows))
    return torch.tensor([row + [filler] * (longest - len(row)) for row in rows], device=device)


def trim_conversation(conversation: dict[str, Any], tokenizer: Tokenizer, max_tokens: int) -> tuple[dict[str, Any], int]:
    """(conversation, turns dropped): the oldest turns removed until the rest, ready for an answer, fits max_tokens.

    A system message stays. Raises NanochatError if the last message, with the system message before it, is too long.
    """
    messages = list(conversation["messages"])
    system = [messages.pop(0)] if messages and messages[0]["role"] == "system" else []

    def kept(dropped: int) -> dict[str, Any]:
        return {"messages": system + messages[2 * dropped :]}

    @functools.cache
    def length(dropped: int) -> int:
        return len(tokenizer.render_for_completion(kept(dropped)))

    most = max(0, len(messages) - 1) // 2
    dropped = 0 if length(0) <= max_tokens else bisect.bisect_left(range(most), True, key=lambda n: length(n) <= max_tokens)
    if length(dropped) > max_tokens:
        tokens = length(dropped)
        if system:
            last = len(tokenizer.render_for_completion({"messages": messages[2 * dropped :]}))
            raise NanochatError(
                f"a message of {last} tokens after a system prompt of {tokens - last} does not fit the {max_tokens} that the "
                "context leaves for both: shorten the longer one"
            )
        raise NanochatError(
            f"a message of {tokens} tokens does not fit the {max_tokens} that the context leaves for it: shorten it"
        )
    return kept(dropped), dropped

"""One text being generated: the request, the result so far, how tokens become text, and the scheduler's own state.

Callers create it; scheduler.py fills it.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random
from typing import Any, cast

import torch

from nanochat.sampling import Adjustment, SamplingParams
from nanochat.tokenizer import IncrementalDecoder, Tokenizer


@dataclass
class TokenLogprob:
    """The natural log of the probability that the model gave a token, before temperature and restrictions."""

    token: int
    logprob: float
    top: list[tuple[int, float]]


@dataclass(eq=False)
class Sequence:
    """One text being generated: the request, fields that readers may follow as it grows, and the scheduler's own fields."""

    prompt: list[int]
    params: SamplingParams = field(default_factory=SamplingParams)
    on_update: Callable[[Sequence], None] | None = None  # called in the scheduler's thread after each update

    tokens: list[int] = field(default_factory=list)  # generated, without the token that stopped it
    masks: list[int] = field(default_factory=list)  # 1 sampled, 0 forced by a tool
    logprobs: list[TokenLogprob] = field(default_factory=list)  # of sampled tokens and of stop_token, if asked for
    policy_logprobs: list[float] = field(default_factory=list)  # the same, as they were drawn: see SamplingParams
    prompt_logprobs: list[TokenLogprob] = field(default_factory=list)  # of the prompt's tokens except the first, if asked for
    pieces: list[tuple[str, str]] = field(default_factory=list)  # (text, type of the part it belongs to)
    finish_reason: str | None = None  # "stop", "length" (max_tokens), "context" (full), "cancelled" or "error"
    stop_token: int | None = None  # the token that ended it, if one did
    error: str | None = None
    cached_tokens: int = 0  # tokens of the prompt that were found in shared blocks
    admitted: bool = False  # it has left the queue, and its prompt counts as read
    created: float = field(default_factory=time.perf_counter)
    first_token_at: float | None = None

    computed: int = 0  # tokens whose keys and values are in blocks
    blocks: list[int] = field(default_factory=list)
    row: int | None = None  # in the decoding batch
    published: int = 0  # blocks that others can find
    content: int = 0  # of the last published one
    call: list[int] | None = None  # tokens of the tool call that is open
    random: Random = field(init=False, repr=False)
    decoder: IncrementalDecoder | None = None
    adjustment: Adjustment | None = None  # with penalties or biases
    held_text: str = ""  # held back because it may be the beginning of a stop text

    @property
    def length(self) -> int:
        return len(self.prompt) + len(self.tokens)

    def token_at(self, i: int) -> int:
        n = len(self.prompt)
        return self.prompt[i] if i < n else self.tokens[i - n]

    def token_before(self, i: int) -> int:
        """The token before token i; the first token stands before itself."""
        return self.token_at(max(0, i - 1))

    def slice(self, start: int, end: int) -> list[int]:
        n = len(self.prompt)
        return self.prompt[start:end] + self.tokens[max(0, start - n) : max(0, end - n)]

    @property
    def text(self) -> str:
        return "".join(text for text, _ in self.pieces)

    # ------------------------------------------------------------------------- from begin to end, called by the scheduler

    def begin(self, tokenizer: Tokenizer) -> None:
        seed = self.params.seed
        self.random = Random(seed if seed >= 0 else seed % 2**64)  # Random treats -1 and 1 alike
        self.decoder = IncrementalDecoder(tokenizer)

    def append(self, token: int, mask: int) -> bool:
        """Add a token and the text that it completes; True if a stop text ends the answer with it."""
        decoder = cast("IncrementalDecoder", self.decoder)  # present until the text ends
        part, text, stopped = decoder.part, decoder.feed(token), False
        if decoder.part != part:  # a stop text never spans two parts
            text, self.held_text = self.held_text + text, ""
        elif self.params.stop and part == "text":  # hidden text (tool calls) does not end an answer
            text, stopped = self._look_for_stop(self.held_text + text)
        self.tokens.append(token)
        self.masks.append(mask)
        self.pieces.append((text, part))  # last and complete: other threads read up to here
        if stopped:
            self.decoder = None  # anything it still holds comes after the stop text
        return stopped

    def _look_for_stop(self, text: str) -> tuple[str, bool]:
        """(text that may be shown, whether a stop text ends it). Holds back a possible beginning of a stop text."""
        found = [at for at in map(text.find, self.params.stop) if at >= 0]
        if found:
            return text[: min(found)], True
        shown = min(_beginning(stop, text) for stop in self.params.stop)
        self.held_text = text[shown:]
        return text[:shown], False

    def adjust(self, logits: torch.Tensor) -> torch.Tensor:
        """The next token's logits (vocab_size,) with this text's penalties and biases."""
        if self.adjustment is None:
            self.adjustment = Adjustment(self.params, self.prompt, logits)
        return self.adjustment.apply(logits, self.tokens, self.masks)

    def end(self, reason: str, error: str | None = None) -> None:
        """Release what only a growing text needs, show the text that was held back, and tell the caller."""
        decoder, self.decoder, self.adjustment = self.decoder, None, None
        if decoder is not None:  # the last piece, often empty, belongs to the part that the text ended in
            self.pieces.append((self.held_text + decoder.flush(), decoder.part))
        self.error = error
        self.finish_reason = reason  # last: other threads stop reading then
        if self.on_update is not None:
            self.on_update(self)


def _beginning(stop: str, text: str) -> int:
    """The index from which the rest of `text` could still become `stop`; len(text) if there is none.

    `text` does not contain `stop`.
    """
    at = max(0, len(text) - len(stop) + 1)
    while (at := text.find(stop[0], at)) >= 0:
        if stop.startswith(text[at:]):
            return at
        at += 1
    return len(text)


def spoken(pieces: list[tuple[str, str]]) -> str:
    """The text meant for the reader, without tool calls and their results."""
    return "".join(text for text, part in pieces if part == "text")


class Parts:
    """Turns an answer's pieces into parts of a message as they arrive. A call right after another is a separate part."""

    def __init__(self) -> None:
        self._kind: str | None = None  # of the part that is open
        self._index = -1

    def of(self, pieces: list[tuple[str, str]]) -> list[dict[str, Any]]:
        """The next pieces, joined; those of the same index belong to the same part."""
        parts: list[dict[str, Any]] = []
        for text, kind in pieces:
            if text and kind != self._kind:
                self._kind, self._index = kind, self._index + 1
            if text and parts and parts[-1]["index"] == self._index:
                parts[-1]["text"] += text
            elif text:
                parts.append({"index": self._index, "type": kind, "text": text})
            elif kind == "text" != self._kind:  # between calls there is always a piece of text, if an empty one
                self._kind = None
        return parts


def joined_parts(pieces: list[tuple[str, str]]) -> list[dict[str, str]]:
    """All pieces of an answer as the parts of a message."""
    return [{"type": part["type"], "text": part["text"]} for part in Parts().of(pieces)]


def token_logprob(logits: torch.Tensor, token: int, alternatives: int) -> TokenLogprob:
    logprobs = logits.log_softmax(dim=-1)
    top: list[tuple[int, float]] = []
    if alternatives:
        values, indices = logprobs.topk(min(alternatives, logits.size(-1)))
        top = list(zip(indices.tolist(), values.tolist(), strict=True))
    return TokenLogprob(token, logprobs[token].item(), top)

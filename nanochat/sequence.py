"""One text being generated: the request, the result so far, and the scheduler's own state. Callers create it; scheduler.py
fills it.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random

import torch

from nanochat.sampling import SamplingParams
from nanochat.tokenizer import IncrementalDecoder


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
    seen: torch.Tensor | None = None  # with a repetition penalty: (vocab_size,) bool, the tokens of the text
    seen_length: int = 0  # tokens of the text that `seen` covers
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


def next_piece(decoder: IncrementalDecoder, token: int) -> tuple[str, str]:
    """(text, type of its part) for the next token; a token that begins a new part yields the end of the previous one."""
    part, text = decoder.part, decoder.feed(token)
    return (text if decoder.part == part else decoder.flush()), part


def token_logprob(logits: torch.Tensor, token: int, alternatives: int) -> TokenLogprob:
    logprobs = logits.log_softmax(dim=-1)
    top: list[tuple[int, float]] = []
    if alternatives:
        values, indices = logprobs.topk(min(alternatives, logits.size(-1)))
        top = list(zip(indices.tolist(), values.tolist(), strict=True))
    return TokenLogprob(token, logprobs[token].item(), top)

"""Batched generation with a cache and a calculator. The facade that CLI, server, evaluation and RL share.

A prompt is computed once and its cache copied to every sample; finished rows leave the batch; a row whose text between
<|python_start|> and <|python_end|> is an expression is given the calculator's answer as forced tokens.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from nanochat.common import NanochatError
from nanochat.dataset import Source
from nanochat.gpt import GPT
from nanochat.kv_cache import KVCache
from nanochat.sampling import make_generators, sample
from nanochat.tokenizer import Tokenizer
from nanochat.tools import use_calculator


@dataclass
class Row:
    """One text in the making."""

    prompt: list[int]
    tokens: list[int] = field(default_factory=list)  # generated, without the token that stopped it
    masks: list[int] = field(default_factory=list)  # 1 sampled, 0 forced by a tool
    finish_reason: str | None = None  # "stop", "length" (max_tokens) or "context" (the model's context is full)
    forced: deque[int] = field(default_factory=deque)
    call: list[int] | None = None  # tokens of the calculator call that is open


class Engine:
    """Generates with a model. The same engine may be used again and again, by one thread at a time."""

    def __init__(self, model: GPT, tokenizer: Tokenizer, calculator: Callable[[str], str | None] = use_calculator) -> None:
        self.model, self.tokenizer, self.calculator = model, tokenizer, calculator
        special = tokenizer.encode_special
        self.stop_ids = {special("<|assistant_end|>"), special("<|bos|>")}
        self._call_start, self._call_end = special("<|python_start|>"), special("<|python_end|>")
        self._output_start, self._output_end = special("<|output_start|>"), special("<|output_end|>")
        self._prefix: tuple[list[int], KVCache] | None = None  # the last prompt of one row and its cache

    # ------------------------------------------------------------------------- the public guide's two calls

    def generate(
        self,
        tokens: list[int],
        num_samples: int = 1,
        max_tokens: int | None = None,
        temperature: float = 1.0,
        top_k: int | None = None,
        seed: int = 42,
    ) -> Iterator[tuple[list[int], list[int]]]:
        """Stream num_samples continuations of one prompt: at each step (token of each sample, mask of each sample).

        The mask is 0 for tokens that a tool forced. A sample that is done repeats its stop token. Sample i is drawn with
        seed + i, whatever the others are.
        """
        rows = [Row(tokens) for _ in range(num_samples)]
        for column in self._steps(rows, max_tokens, temperature, top_k, seed):
            yield [token for token, _ in column], [mask for _, mask in column]

    def generate_batch(
        self, tokens: list[int], num_samples: int = 1, **settings: Any
    ) -> tuple[list[list[int]], list[list[int]]]:
        """(results, masks): whole sequences, the prompt included (with mask 0), the stop token left out."""
        rows = self.complete([tokens] * num_samples, **settings)
        return [row.prompt + row.tokens for row in rows], [[0] * len(row.prompt) + row.masks for row in rows]

    def complete(
        self,
        prompts: list[list[int]],
        max_tokens: int | None = None,
        temperature: float = 1.0,
        top_k: int | None = None,
        seed: int = 42,
    ) -> list[Row]:
        """Continue many prompts, of any lengths, as one batch."""
        rows = [Row(prompt) for prompt in prompts]
        for _ in self._steps(rows, max_tokens, temperature, top_k, seed):
            pass
        return rows

    # ------------------------------------------------------------------------- the loop

    @torch.inference_mode()
    def _steps(
        self, rows: list[Row], max_tokens: int | None, temperature: float, top_k: int | None, seed: int
    ) -> Iterator[list[tuple[int, int]]]:
        """Advance all rows token by token; yields (token, mask) of every row, finished ones repeating their last."""
        limit = self.model.config.sequence_len
        for row in rows:
            if not row.prompt:
                raise NanochatError("an empty prompt cannot be continued: begin it with <|bos|>")
            if len(row.prompt) >= limit:
                raise NanochatError(f"a prompt of {len(row.prompt)} tokens leaves no room in a context of {limit}")
        max_tokens = limit if max_tokens is None else max_tokens
        if max_tokens <= 0:
            return
        generators = make_generators([seed + i for i in range(len(rows))], self.model.get_device())
        logits, cache = self._prefill([row.prompt for row in rows])
        active = list(range(len(rows)))
        column = [(0, 0)] * len(rows)
        while active:
            drawn = sample(logits, [generators[i] for i in active], temperature, top_k).tolist()
            for i, token in zip(active, drawn, strict=True):
                column[i] = self._accept(rows[i], token, max_tokens, limit)
            yield list(column)
            going = [place for place, i in enumerate(active) if rows[i].finish_reason is None]
            if not going:
                return
            if len(going) < len(active):
                cache.keep_rows(going)
                active = [active[place] for place in going]
            last = torch.tensor([[column[i][0]] for i in active], device=self.model.get_device())
            logits = self.model(last, kv_cache=cache)[:, -1]

    def _accept(self, row: Row, drawn: int, max_tokens: int, limit: int) -> tuple[int, int]:
        """Take the drawn token, or the one that a tool forces, and see whether the row goes on."""
        token, mask = (row.forced.popleft(), 0) if row.forced else (drawn, 1)
        if mask and token in self.stop_ids:
            row.finish_reason = "stop"
            return token, mask
        row.tokens.append(token)
        row.masks.append(mask)
        if token == self._call_start and mask:
            row.call = []
        elif token == self._call_end and mask and row.call is not None:
            self._call_tool(row)
        elif row.call is not None:
            row.call.append(token)
        if len(row.tokens) >= max_tokens:
            row.finish_reason = "length"
        elif len(row.prompt) + len(row.tokens) >= limit:
            row.finish_reason = "context"
        return token, mask

    def _call_tool(self, row: Row) -> None:
        result = self.calculator(self.tokenizer.decode(row.call))
        row.call = None
        if result is not None:
            row.forced.extend([self._output_start, *self.tokenizer.encode(result), self._output_end])

    # ------------------------------------------------------------------------- prompts

    def _prefill(self, prompts: list[list[int]]) -> tuple[torch.Tensor, KVCache]:
        """(logits (B, vocab_size) after each prompt, a cache that holds the prompts)."""
        if all(prompt == prompts[0] for prompt in prompts):
            logits, one = self._prefill_one(prompts[0])
            cache = KVCache.for_model(self.model, len(prompts))
            cache.prefill(one)
            return logits.expand(len(prompts), -1), cache
        longest = max(map(len, prompts))
        padded = [prompt + [0] * (longest - len(prompt)) for prompt in prompts]
        cache = KVCache.for_model(self.model, len(prompts))
        ids = torch.tensor(padded, device=self.model.get_device())
        features = self.model.features(ids, cache)
        last = torch.tensor([len(prompt) - 1 for prompt in prompts], device=ids.device)
        logits = self.model.logits(features[torch.arange(len(prompts), device=ids.device), last])
        cache.set_lengths([len(prompt) for prompt in prompts])
        return logits, cache

    def _prefill_one(self, prompt: list[int]) -> tuple[torch.Tensor, KVCache]:
        """Logits (1, vocab_size) and cache of one prompt; what it shares with the last one is not computed again."""
        shared = 0
        if self._prefix is not None:
            previous, cache = self._prefix
            limit = min(len(previous), len(prompt) - 1)  # at least one token is computed, for its logits
            while shared < limit and previous[shared] == prompt[shared]:
                shared += 1
            cache.set_lengths([shared])
        else:
            cache = KVCache.for_model(self.model, 1)
        ids = torch.tensor([prompt[shared:]], device=self.model.get_device())
        logits = self.model.logits(self.model.features(ids, cache)[:, -1])
        self._prefix = (list(prompt), cache)
        return logits, cache


def trim_conversation(conversation: dict[str, Any], tokenizer: Tokenizer, max_tokens: int) -> tuple[dict[str, Any], int]:
    """(conversation, turns dropped): the oldest turns removed until the rest, ready for an answer, fits max_tokens.

    A system message stays. Raises NanochatError if the last message alone is too long.
    """
    messages = list(conversation["messages"])
    system = [messages.pop(0)] if messages and messages[0]["role"] == "system" else []
    dropped = 0
    while True:
        kept = {"messages": system + messages}
        length = len(tokenizer.render_for_completion(kept))
        if length <= max_tokens:
            return kept, dropped
        if len(messages) <= 2:
            raise NanochatError(f"a message of {length} tokens does not fit the {max_tokens} that the context leaves for it")
        messages = messages[2:]
        dropped += 1


def continue_openings(
    engine: Engine, source: Source, num_samples: int = 4, max_tokens: int = 48, temperature: float = 0.0
) -> list[dict[str, str]]:
    """The first words of a few validation documents, and how the model goes on."""
    tokenizer = engine.tokenizer
    prompts = [" ".join(text.split()[:6]) for text in itertools.islice(source.documents("val"), num_samples)]
    rows = engine.complete(
        [tokenizer.encode(prompt, prepend="<|bos|>") for prompt in prompts], max_tokens=max_tokens, temperature=temperature
    )
    return [{"prompt": p, "text": tokenizer.decode(row.tokens)} for p, row in zip(prompts, rows, strict=True)]

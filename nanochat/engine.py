"""Batched generation with a cache and tools: the facade that CLI, server, evaluation and RL share.

An Engine is a model with a Scheduler. `generate`, `generate_batch`, `complete` and `run` work in the caller's thread until
their own texts are done; a server leaves that to an `EngineThread` (engine_thread.py) and only submits and cancels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from nanochat.gpt import GPT
from nanochat.sampling import SamplingParams
from nanochat.scheduler import Scheduler
from nanochat.sequence import Sequence
from nanochat.tokenizer import Tokenizer
from nanochat.tools import use_calculator


class Engine:
    """Generates with a model. Reusable, by one thread at a time."""

    def __init__(
        self,
        model: GPT,
        tokenizer: Tokenizer,
        calculator: Callable[[str], str | None] = use_calculator,
        max_rows: int = 32,
        kv_tokens: int = 0,
    ) -> None:
        """max_rows: texts that are computed together (others wait); calculator, kv_tokens: see Scheduler."""
        self.model, self.tokenizer = model, tokenizer
        self.scheduler = Scheduler(model, tokenizer, calculator, max_rows, kv_tokens)

    @property
    def stop_ids(self) -> set[int]:
        """Tokens that end an answer."""
        return self.scheduler.stop_ids

    def compile(self, frozen: bool = True) -> str | None:
        """Compile decoding; `frozen`: the weights will not change. See ModelRunner.compile."""
        return self.scheduler.runner.compile(frozen)

    def forget(self) -> None:
        """Stop sharing what was computed so far: call this when the weights have changed."""
        self.scheduler.forget()

    @property
    def is_compiled(self) -> bool:
        return self.scheduler.runner.is_compiled

    # ------------------------------------------------------------------------- the public guide's two calls

    def generate(
        self,
        tokens: list[int],
        num_samples: int = 1,
        max_tokens: int | None = None,
        temperature: float = 1.0,
        top_k: int | None = None,
        seed: int = 42,
        **settings: Any,
    ) -> Iterator[tuple[list[int], list[int]]]:
        """Stream num_samples continuations of one prompt: at each step (token of each sample, mask of each sample).

        The mask is 0 for tokens that a tool forced. A finished sample repeats its last token, or the stop token if one
        ended it. Sample i is drawn with seed + i, independently of the others. settings: more of SamplingParams.
        """
        params = SamplingParams(temperature, top_k or 0, seed=seed, max_tokens=max_tokens, **settings)
        sequences = _sequences([tokens] * num_samples, params)
        shown = 0
        for _ in self.steps(sequences):
            while shown < _columns(sequences):
                column = [_at(sequence, shown) for sequence in sequences]
                yield [token for token, _ in column], [mask for _, mask in column]
                shown += 1

    def generate_batch(
        self,
        tokens: list[int],
        num_samples: int = 1,
        max_tokens: int | None = None,
        temperature: float = 1.0,
        top_k: int | None = None,
        seed: int = 42,
        **settings: Any,
    ) -> tuple[list[list[int]], list[list[int]]]:
        """(results, masks): whole sequences, including the prompt (mask 0) but not the stop token; see `generate`."""
        params = SamplingParams(temperature, top_k or 0, seed=seed, max_tokens=max_tokens, **settings)
        rows = self.complete([tokens] * num_samples, params)
        return [row.prompt + row.tokens for row in rows], [[0] * len(row.prompt) + row.masks for row in rows]

    # ------------------------------------------------------------------------- running

    def complete(self, prompts: list[list[int]], params: SamplingParams) -> list[Sequence]:
        """Continue any number of prompts of any lengths; prompt i is sampled with params.seed + i."""
        sequences = _sequences(prompts, params)
        self.run(sequences)
        return sequences

    def run(self, sequences: list[Sequence]) -> None:
        """Continue texts, each with its own settings, until all are done."""
        for _ in self.steps(sequences):
            pass

    def steps(self, sequences: list[Sequence]) -> Iterator[None]:
        """Step until all of these are done; yields after each step. Those that are not done at its end are freed."""
        try:
            for sequence in sequences:
                self.scheduler.submit(sequence)
            while any(sequence.finish_reason is None for sequence in sequences):
                if self.scheduler.is_idle:
                    self.scheduler.wait()
                self.scheduler.step()
                yield
        finally:  # also after an error, or when the caller has stopped reading
            unfinished = [sequence for sequence in sequences if sequence.finish_reason is None]
            for sequence in unfinished:
                self.scheduler.cancel(sequence)
            if unfinished:
                self.scheduler.take_messages()


def _sequences(prompts: list[list[int]], params: SamplingParams) -> list[Sequence]:
    return [Sequence(prompt, replace(params, seed=params.seed + i)) for i, prompt in enumerate(prompts)]


def _columns(sequences: list[Sequence]) -> int:
    """How many tokens can be shown: as many as every running text has; once all are done, as many as the longest has."""
    counts = [len(s.tokens) + (s.stop_token is not None) for s in sequences]
    running = [n for n, s in zip(counts, sequences, strict=True) if s.finish_reason is None]
    return min(running, default=max(counts))


def _at(sequence: Sequence, n: int) -> tuple[int, int]:
    """(token, mask) number n of a text; past its end the stop token, else its last token, or (0, 0) if it has none."""
    if n < len(sequence.tokens):
        return sequence.tokens[n], sequence.masks[n]
    if sequence.stop_token is not None:
        return sequence.stop_token, 1
    return (sequence.tokens[-1], sequence.masks[-1]) if sequence.tokens else (0, 0)

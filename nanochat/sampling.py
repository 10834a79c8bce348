"""Logits to tokens: the sampling settings of a request, and drawing for many requests at once.

Used by scheduler.py; everything that generates text uses SamplingParams.

A row's token depends only on its own logits, settings and random numbers, not on the rest of the batch. Every restriction
(top-k, top-p, min-p) becomes one threshold on the row's logits, which does not depend on how ties are sorted: a new one is
another `torch.maximum` in `_thresholds`, and a column that `RowSettings.restricts` knows. One that does not keep the
likeliest tokens (typical_p) is no threshold: it needs a mask beside it in `_weights`, which top-p must count, too.

The draw inverts the cumulative distribution, in vocabulary order, with one random number per row. On a GPU probabilities
are summed as integers, because the order in which it adds floats depends on the number of rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch

from nanochat.common import NanochatError

LIKELIEST = 2.0**40  # the weight of the likeliest token: that times the vocabulary size still fits into 63 bits
LARGEST_K = 2**62  # larger than any vocabulary, and still fits into an int64 tensor


@dataclass(frozen=True)
class SamplingParams:
    """How to continue one text. Raises NanochatError for meaningless values."""

    temperature: float = 1.0  # 0 (or almost 0): always the likeliest token
    top_k: int = 0  # only the k likeliest tokens; 0: all
    top_p: float = 1.0  # only the likeliest tokens that together reach this probability
    min_p: float = 0.0  # only tokens with at least this share of the likeliest token's probability
    repetition_penalty: float = 1.0  # above 1: tokens of prompt and answer are less likely. Method: arXiv 1909.05858
    presence_penalty: float = 0.0  # taken from the logits of all tokens that were sampled; below 0: more of the same
    frequency_penalty: float = 0.0  # the same, for each time that they were
    logit_bias: tuple[tuple[int, float], ...] = ()  # (token, what is added to its logit)
    seed: int = 42
    max_tokens: int | None = None  # None: as many as the context holds
    stop: tuple[str, ...] = ()  # texts that end the answer and are left out of it
    logprobs: int | None = None  # record each token's log-probability and this many alternatives
    prompt_logprobs: bool = False  # record those of the prompt's tokens, too (then the whole prompt is computed)
    policy_logprobs: bool = False  # record the log of the probability with which each token was drawn
    ignore_eos: bool = False  # continue after the model ends its answer (for benchmarks)

    def __post_init__(self) -> None:
        limits = {
            "temperature": (self.temperature >= 0, "0 or more"),
            "top_k": (self.top_k >= 0, "0 or more"),
            "top_p": (0 < self.top_p <= 1, "more than 0 and at most 1"),
            "min_p": (0 <= self.min_p <= 1, "0 to 1"),
            "repetition_penalty": (0.01 <= self.repetition_penalty <= 100, "0.01 to 100"),
            "presence_penalty": (-2 <= self.presence_penalty <= 2, "-2 to 2"),
            "frequency_penalty": (-2 <= self.frequency_penalty <= 2, "-2 to 2"),
            "logit_bias": (all(-100 <= bias <= 100 for _, bias in self.logit_bias), "-100 to 100 for each token"),
            "max_tokens": (self.max_tokens is None or self.max_tokens >= 0, "0 or more"),
            "stop": (all(self.stop), "texts of at least one character"),
            "logprobs": (self.logprobs is None or self.logprobs >= 0, "0 or more"),
        }
        for name, (fine, allowed) in limits.items():
            if not fine:
                raise NanochatError(f"{name} cannot be {getattr(self, name)!r}: choose {allowed}")

    @property
    def greedy(self) -> bool:
        return self.temperature < 1e-5  # smaller ones overflow, and mean the same

    @property
    def adjusts(self) -> bool:
        """Whether there is anything to do for Adjustment."""
        return self.repetition_penalty != 1 or bool(self.presence_penalty or self.frequency_penalty or self.logit_bias)


class RowSettings:
    """The sampling settings of a batch's rows, as columns (B, 1). Make it once and reuse it while the batch is the same.

    Columns that would have no effect are None. On a GPU, making each column waits for all computation queued before.
    """

    def __init__(self, params: list[SamplingParams], device: torch.device) -> None:
        def column(values: list[Any], neutral: Any) -> torch.Tensor | None:
            if all(value == neutral for value in values):
                return None
            dtype = torch.float32 if isinstance(neutral, float) else None
            return torch.tensor(values, dtype=dtype, device=device)[:, None]

        ks = [min(p.top_k, LARGEST_K) for p in params]
        self.params, self.device = params, device
        self.to_adjust = [i for i, p in enumerate(params) if p.adjusts]
        self.all_greedy = all(p.greedy for p in params)
        self.greedy = column([p.greedy for p in params], False)
        self.temperature = column([1.0 if p.greedy else p.temperature for p in params], 1.0)
        self.min_p = column([p.min_p for p in params], 0.0)
        self.top_k, self.largest_k = column(ks, 0), max(ks, default=0)
        self.top_p = column([p.top_p for p in params], 1.0)

    @property
    def restricts(self) -> bool:
        return any(column is not None for column in (self.min_p, self.top_k, self.top_p))


def sample(logits: torch.Tensor, rows: RowSettings, uniform: list[float]) -> torch.Tensor:
    """Draw a token for each row: (B,) int64; -1 where the logits are not finite.

    logits: (B, vocab_size) float32, adjusted already; uniform: a number in [0, 1) for each row.
    """
    highest, likeliest = logits.max(dim=-1, keepdim=True)
    tokens = likeliest
    if not rows.all_greedy:
        drawn = _draw(*_scale(logits, highest, rows), rows, uniform)
        tokens = drawn if rows.greedy is None else torch.where(rows.greedy, likeliest, drawn)
    return tokens.masked_fill_(highest - highest != 0, -1)[:, 0]  # NaN or infinite; isfinite takes five operations


def _draw(scaled: torch.Tensor, top: torch.Tensor, rows: RowSettings, uniform: list[float]) -> torch.Tensor:
    """(B, 1) int64."""
    cumulative = _weights(scaled, top, rows).cumsum(dim=-1)
    below_one = [[min(u, 1 - 2**-23)] for u in uniform]  # even after rounding, the target stays below the sum
    on_gpu = rows.device.type == "cuda"  # then copy without waiting
    numbers = torch.tensor(below_one, dtype=torch.float32, pin_memory=on_gpu).to(rows.device, non_blocking=on_gpu)
    target = numbers * cumulative[:, -1:]
    return torch.searchsorted(cumulative, target.to(cumulative.dtype), right=True)


def policy_logprobs(logits: torch.Tensor, rows: RowSettings, drawn: torch.Tensor) -> torch.Tensor:
    """(B,) float32: the logs of the probabilities with which `sample` drew these tokens, (B,)."""
    scaled, top = _scale(logits, logits.amax(dim=-1, keepdim=True), rows)
    total = _weights(scaled, top, rows).sum(dim=-1, keepdim=True)
    logprobs = scaled.gather(1, drawn[:, None]) - top - (total / LIKELIEST).log()
    return (logprobs if rows.greedy is None else logprobs.masked_fill(rows.greedy, 0.0))[:, 0]


def _scale(logits: torch.Tensor, highest: torch.Tensor, rows: RowSettings) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits and each row's highest, (B, 1), divided by the temperatures; unchanged for greedy rows."""
    return (logits, highest) if rows.temperature is None else (logits / rows.temperature, highest / rows.temperature)


def _weights(scaled: torch.Tensor, top: torch.Tensor, rows: RowSettings) -> torch.Tensor:
    """(B, vocab_size): unnormalized probabilities."""
    weights = _weigh(scaled, top)
    return weights.masked_fill_(scaled < _thresholds(scaled, top, rows), 0) if rows.restricts else weights


def _weigh(scaled: torch.Tensor, top: torch.Tensor) -> torch.Tensor:
    weights = (scaled - top).exp_().mul_(LIKELIEST)
    return weights.long() if _sums_vary(weights.device) else weights


def _sums_vary(device: torch.device) -> bool:
    """Whether a row's sum of floats depends on the other rows. On a CPU it does not, and integers take twice as long."""
    return device.type == "cuda"


def _thresholds(scaled: torch.Tensor, top: torch.Tensor, rows: RowSettings) -> torch.Tensor:
    """(B, 1): the smallest scaled logit that each row may draw; so may ties with it."""
    vocab_size = scaled.size(-1)
    threshold = torch.full_like(top, float("-inf"))
    if rows.min_p is not None:
        threshold = torch.maximum(threshold, top + rows.min_p.log())
    if rows.top_k is None and rows.top_p is None:
        return threshold
    largest_k = vocab_size if rows.top_p is not None else min(rows.largest_k, vocab_size)
    likeliest = scaled.topk(largest_k, dim=-1).values  # (B, largest_k), descending
    if rows.top_k is not None:
        kth = likeliest.gather(1, (rows.top_k - 1).clamp(0, largest_k - 1))
        threshold = torch.maximum(threshold, kth.masked_fill(rows.top_k == 0, float("-inf")))
    if rows.top_p is not None:
        inside = likeliest >= threshold  # top-p counts what top-k and min-p leave
        weights = _weigh(likeliest, top) * inside
        before = weights.cumsum(dim=-1) - weights
        wanted = rows.top_p * weights.sum(dim=-1, keepdim=True)
        last = ((before < wanted) & inside).sum(dim=-1, keepdim=True).clamp(min=1) - 1
        cut = likeliest.gather(1, last).masked_fill(rows.top_p == 1, float("-inf"))
        threshold = torch.maximum(threshold, cut)
    return threshold


@lru_cache(maxsize=8)  # the texts of one request begin together, with the same ones
def _biases(logit_bias: tuple[tuple[int, float], ...], vocab_size: int, device: torch.device) -> torch.Tensor:
    """(vocab_size,) float32: what is added to each token's logit."""
    of_tokens, biases = dict(logit_bias), torch.zeros(vocab_size)
    biases[torch.tensor(list(of_tokens), dtype=torch.int64)] = torch.tensor(list(of_tokens.values()), dtype=torch.float32)
    return biases.to(device)


class Adjustment:
    """The penalties and biases of one text; it remembers how often each token was said."""

    def __init__(self, params: SamplingParams, prompt: list[int], logits: torch.Tensor) -> None:
        """logits: any that it will adjust, for their shape (vocab_size,) and device."""
        self._params, self._counted = params, 0
        self._said = torch.zeros_like(logits, dtype=torch.bool)  # by anyone: in the prompt, sampled, or forced by a tool
        self._said[torch.tensor(prompt, device=logits.device)] = True
        self._counts = torch.zeros_like(logits)
        self._bias = _biases(params.logit_bias, logits.numel(), logits.device)

    def apply(self, logits: torch.Tensor, answer: list[int], masks: list[int]) -> torch.Tensor:
        """Adjusted logits (vocab_size,) for the token after `answer`, which extends the answer of the previous call.

        masks: 1 where a token of the answer was sampled, 0 where a tool forced it.
        """
        new = torch.tensor(answer[self._counted :], dtype=torch.int64, device=logits.device)
        self._said[new] = True
        self._counts.index_add_(0, new, torch.tensor(masks[self._counted :], dtype=torch.float32, device=logits.device))
        self._counted = len(answer)
        p = self._params
        penalized = torch.where(logits > 0, logits / p.repetition_penalty, logits * p.repetition_penalty)
        logits = torch.where(self._said, penalized, logits)
        return logits - p.presence_penalty * (self._counts > 0) - p.frequency_penalty * self._counts + self._bias

"""Logits to tokens: what a request may ask of sampling, and drawing for many requests at once.

Used by scheduler.py; its settings by all who have texts continued.

A row's token depends on its own logits, settings and random numbers alone, whoever else is in the batch: every
restriction (top-k, top-p, min-p) becomes one threshold on the row's logits, which does not depend on how equal logits
were sorted, and the draw inverts the cumulative distribution in the vocabulary's order with one number of the row's own.
On a GPU probabilities are added up as integers, since there floats of one row are summed in another order than several's.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from nanochat.common import NanochatError

LIKELIEST = 2.0**40  # the weight of the likeliest token: as many of them as there are words still fit into 63 bits


@dataclass(frozen=True)
class SamplingParams:
    """How one text is to be continued. Raises NanochatError for values that mean nothing."""

    temperature: float = 1.0  # 0 (or next to it): always the likeliest token
    top_k: int = 0  # only the k likeliest tokens; 0: all
    top_p: float = 1.0  # only the likeliest tokens that together reach this probability
    min_p: float = 0.0  # only tokens at least this times as likely as the likeliest
    repetition_penalty: float = 1.0  # above 1: what was said is less likely to be said again. Method: arXiv 1909.05858
    seed: int = 42
    max_tokens: int | None = None  # None: as many as the context holds
    stop: tuple[str, ...] = ()  # texts that end the answer and are left out of it
    logprobs: int | None = None  # record each token's log-probability and this many alternatives
    prompt_logprobs: bool = False  # record those of the prompt's tokens, too (it is then computed anew)
    policy_logprobs: bool = False  # record the logarithm of the probability with which each token was drawn
    ignore_eos: bool = False  # go on past the model's own end (for benchmarks)

    def __post_init__(self) -> None:
        limits = {
            "temperature": (self.temperature >= 0, "0 or more"),
            "top_k": (self.top_k >= 0, "0 or more"),
            "top_p": (0 < self.top_p <= 1, "more than 0 and at most 1"),
            "min_p": (0 <= self.min_p <= 1, "0 to 1"),
            "repetition_penalty": (0.01 <= self.repetition_penalty <= 100, "0.01 to 100"),
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
    def restricts(self) -> bool:
        return self.top_k > 0 or self.top_p < 1 or self.min_p > 0


def sample(logits: torch.Tensor, params: list[SamplingParams], uniform: list[float]) -> torch.Tensor:
    """Draw a token for each row: (B,) int64; -1 where the logits are no numbers.

    logits: (B, vocab_size) float32, penalties applied already; uniform: a number in [0, 1) for each row.
    """
    highest, tokens = logits.max(dim=-1)
    if not all(p.greedy for p in params):
        tokens = torch.where(_greedy(params, logits), tokens, _draw(logits, params, uniform))
    return tokens.masked_fill_(highest - highest != 0, -1)  # where it is NaN or infinite; isfinite is five operations


def _draw(logits: torch.Tensor, params: list[SamplingParams], uniform: list[float]) -> torch.Tensor:
    cumulative = _weights(*_scale(logits, params), params).cumsum(dim=-1)
    below_one = _column([min(u, 1 - 2**-23) for u in uniform], logits)  # also rounded, the sum itself is never reached
    target = (below_one * cumulative[:, -1:]).to(cumulative.dtype)
    return torch.searchsorted(cumulative, target, right=True)[:, 0]


def policy_logprobs(logits: torch.Tensor, params: list[SamplingParams], drawn: torch.Tensor) -> torch.Tensor:
    """(B,) float32: the logarithms of the probabilities with which `sample` drew these tokens, (B,), and no others."""
    scaled, top = _scale(logits, params)
    total = _weights(scaled, top, params).sum(dim=-1)
    logprobs = (scaled.gather(1, drawn[:, None]) - top)[:, 0] - (total / LIKELIEST).log()
    return logprobs.masked_fill(_greedy(params, logits), 0.0)


def _column(values: list[float], like: torch.Tensor) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float32, device=like.device)[:, None]


def _greedy(params: list[SamplingParams], like: torch.Tensor) -> torch.Tensor:
    """(B,) bool: the rows whose likeliest token is taken, whatever was drawn."""
    return torch.tensor([p.greedy for p in params], device=like.device)


def _scale(logits: torch.Tensor, params: list[SamplingParams]) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits over temperatures, greedy rows as if at temperature 1, and each row's highest, (B, 1)."""
    scaled = logits / _column([1.0 if p.greedy else p.temperature for p in params], logits)
    return scaled, scaled.amax(dim=-1, keepdim=True)


def _weights(scaled: torch.Tensor, top: torch.Tensor, params: list[SamplingParams]) -> torch.Tensor:
    """(B, vocab_size): what each token's probability is proportional to."""
    weights = _weigh(scaled, top)
    if any(p.restricts for p in params):
        weights.masked_fill_(scaled < _thresholds(scaled, top, params), 0)
    return weights


def _weigh(scaled: torch.Tensor, top: torch.Tensor) -> torch.Tensor:
    weights = (scaled - top).exp_().mul_(LIKELIEST)
    return weights.long() if _sums_vary(weights.device) else weights


def _sums_vary(device: torch.device) -> bool:
    """Whether a row's sum of floats depends on its company. On a CPU it does not, and integers take twice as long."""
    return device.type == "cuda"


def _thresholds(scaled: torch.Tensor, top: torch.Tensor, params: list[SamplingParams]) -> torch.Tensor:
    """(B, 1): the smallest scaled logit that may be drawn in each row; ties with it may be as well."""
    vocab_size, any_top_p = scaled.size(-1), any(p.top_p < 1 for p in params)
    threshold = torch.full_like(top, float("-inf"))
    if any(p.min_p > 0 for p in params):
        threshold = torch.maximum(threshold, top + _column([p.min_p for p in params], top).log())
    largest_k = vocab_size if any_top_p else max(min(p.top_k, vocab_size) for p in params)
    if not largest_k:
        return threshold
    likeliest = scaled.topk(largest_k, dim=-1).values  # (B, largest_k), descending
    k_of_row = torch.tensor([min(p.top_k, vocab_size) or largest_k for p in params], device=scaled.device)[:, None]
    has_top_k = torch.tensor([p.top_k > 0 for p in params], device=scaled.device)[:, None]
    kth = likeliest.gather(1, k_of_row - 1)
    threshold = torch.maximum(threshold, kth.masked_fill(~has_top_k, float("-inf")))
    if any_top_p:
        inside = likeliest >= threshold  # top-p counts what top-k and min-p leave
        weights = _weigh(likeliest, top) * inside
        before = weights.cumsum(dim=-1) - weights
        wanted = _column([p.top_p for p in params], top) * weights.sum(dim=-1, keepdim=True)
        last = ((before < wanted) & inside).sum(dim=-1, keepdim=True).clamp(min=1) - 1
        whole = torch.tensor([p.top_p == 1 for p in params], device=scaled.device)[:, None]
        cut = likeliest.gather(1, last).masked_fill(whole, float("-inf"))
        threshold = torch.maximum(threshold, cut)
    return threshold


def penalize_repetition(logits: torch.Tensor, seen: torch.Tensor, penalty: float) -> torch.Tensor:
    """Logits (vocab_size,) with those of the tokens that were `seen`, (vocab_size,) bool, made less likely.

    Method: arXiv 1909.05858.
    """
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)

"""Logits to tokens. Used by engine.py."""

from __future__ import annotations

import torch


def make_generators(seeds: list[int], device: torch.device) -> list[torch.Generator]:
    """One source of randomness a row, so that what a row samples does not depend on who else is in the batch."""
    return [torch.Generator(device=device).manual_seed(seed) for seed in seeds]


def sample(
    logits: torch.Tensor, generators: list[torch.Generator], temperature: float = 1.0, top_k: int | None = None
) -> torch.Tensor:
    """Draw a token for each row.

    logits: (B, vocab_size) float32; temperature 0 takes the likeliest; top_k 0 or None considers all tokens.
    Returns (B,) int64.
    """
    if temperature <= 0:
        return logits.argmax(dim=-1)
    if top_k:
        values, indices = logits.topk(min(top_k, logits.size(-1)), dim=-1)
    else:
        values, indices = logits, None
    probabilities = (values / temperature).softmax(dim=-1)
    # Exponential races: argmax of p / Exp(1) is a draw from p, with one random number a token and no sorting.
    noise = torch.stack([torch.empty_like(probabilities[0]).exponential_(generator=g) for g in generators])
    choice = (probabilities / noise.clamp(min=1e-20)).argmax(dim=-1)
    return choice if indices is None else indices.gather(1, choice[:, None])[:, 0]

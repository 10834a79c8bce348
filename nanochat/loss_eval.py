"""Bits per byte: a loss that does not depend on the tokenizer. Used by the training scripts and scripts/base_eval."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator

import numpy as np
import torch

from nanochat.common import NanochatError
from nanochat.gpt import GPT
from nanochat.ranks import all_or_none, any_rank, sum_over_ranks

VAL_TOKENS = {"cpu": 2**18, "cuda": 2**22}  # default tokens for an evaluation during training


def batches_to_validate(asked: int | None, device: torch.device, batch_tokens: int) -> int | None:
    """The number of validation batches for an evaluation during training, at least one; None: all.

    asked: tokens, -1 for all, None for VAL_TOKENS: few compared to the tokens trained on between two evaluations, and the
    same for all runs on such a device, so that they can be compared.
    """
    tokens = VAL_TOKENS.get(device.type, VAL_TOKENS["cpu"]) if asked is None else asked
    return None if tokens < 0 else max(1, tokens // batch_tokens)


@torch.no_grad()
def evaluate_bpb(model: GPT, batches: Iterable[tuple[torch.Tensor, torch.Tensor]], token_bytes: np.ndarray) -> float:
    """Bits that the model needs per byte of the targets' text, over all ranks.

    batches: (inputs, targets), each (B, T) int64, targets -1 where there is nothing to predict; token_bytes:
    (vocab_size,) from Tokenizer.get_token_bytes. Tokens without bytes (special ones) count in neither sum.
    Raises NanochatError if no byte was predicted at all.
    """
    if model.is_sharded:
        nats, num_bytes = _sum_up(model, _in_step(batches, model.get_device()), token_bytes)
    else:
        nats, num_bytes = all_or_none(lambda: _sum_up(model, batches, token_bytes))
    sum_over_ranks(nats)
    sum_over_ranks(num_bytes)
    if not num_bytes:
        raise NanochatError("there is no text to measure bits per byte on: give more validation data")
    return float(nats) / (math.log(2) * int(num_bytes))


def _sum_up(
    model: GPT, batches: Iterable[tuple[torch.Tensor, torch.Tensor]], token_bytes: np.ndarray
) -> tuple[torch.Tensor, torch.Tensor]:
    """(nats, bytes) of this rank's batches, each ()."""
    device = model.get_device()
    bytes_of = torch.as_tensor(token_bytes, dtype=torch.long, device=device)
    nats, num_bytes = torch.zeros((), device=device), torch.zeros((), dtype=torch.long, device=device)
    for inputs, targets in batches:
        losses = model(inputs, targets, loss_reduction="none")
        sizes = torch.where(targets >= 0, bytes_of[targets.clamp(min=0)], 0)
        nats += (losses * (sizes > 0)).sum()
        num_bytes += sizes.sum()
    return nats, num_bytes


def _in_step(
    batches: Iterable[tuple[torch.Tensor, torch.Tensor]], device: torch.device
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """The batches, then empty ones while other ranks still have some: a sharded model computes on all ranks or on none."""
    iterator = iter(batches)
    nothing = torch.zeros(1, 8, dtype=torch.long, device=device)
    while any_rank((batch := all_or_none(lambda: next(iterator, None))) is not None):
        yield batch or (nothing, nothing - 1)

"""Tables that are looked up, one row for each token id. Used by gpt.py.

On a GPU PyTorch sorts the ids anew for the gradient of every table and goes through its gradients several times: with a
table for every other layer that was a twelfth of a pass (dev/LOG.md, "On an H200"). Here they are sorted once for all
tables, and each row of a gradient is summed in float32, always in the same order.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F

Occurrences = tuple[torch.Tensor, torch.Tensor]


class Embedding(nn.Embedding):
    """A table of one row for each index."""

    def reset_parameters(self) -> None:
        """As for gpt.Linear."""

    def forward(self, idx: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
        """The rows of idx, (*idx.shape, channels), in `dtype` or in that of the table."""
        dtype = dtype or self.weight.dtype
        if idx.device.type == "cuda" and torch.is_grad_enabled() and self.weight.requires_grad:
            return _Lookup.apply(self.weight, idx, *find_occurrences(idx, self.num_embeddings), dtype)
        return super().forward(idx).to(dtype)


class _Lookup(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, weight: torch.Tensor, idx: torch.Tensor, order: torch.Tensor, first: torch.Tensor, dtype: torch.dtype
    ) -> torch.Tensor:
        ctx.save_for_backward(order, first)
        ctx.dtype = weight.dtype
        if idx.numel() > weight.size(0):  # the fewer numbers are converted
            return F.embedding(idx, weight.to(dtype))
        return F.embedding(idx, weight).to(dtype)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        order, first = ctx.saved_tensors
        return sum_rows(grad.flatten(0, -2), order, first).to(ctx.dtype), None, None, None, None


_newest: dict[int, tuple[torch.Tensor, int, Occurrences]] = {}  # by rows of a table: the ids looked up last, and theirs


def find_occurrences(idx: torch.Tensor, num_rows: int) -> Occurrences:
    """Where each of num_rows ids stands in idx: (order, first), int64, so that the places of id r are, in ascending order,
    order[first[r] : first[r + 1]].

    Kept for the ids that were asked for last, since the tables of a model are all looked up with the same ones.
    """
    version = -1 if idx.is_inference() else idx._version  # which counts the changes of all other tensors
    if num_rows in _newest and version >= 0:
        known, known_version, occurrences = _newest[num_rows]
        if known is idx and known_version == version:
            return occurrences
    sorted_ids, order = idx.flatten().sort(stable=True)
    occurrences = (order, torch.searchsorted(sorted_ids, torch.arange(num_rows + 1, device=idx.device)))
    _newest[num_rows] = (idx, version, occurrences)
    return occurrences


def sum_rows(grad: torch.Tensor, order: torch.Tensor, first: torch.Tensor) -> torch.Tensor:
    """For each id the sum of the rows of grad (N, channels) where it stands: (num_rows, channels) float32."""
    # Unsafe: to check the offsets, the host would wait for the device.
    return torch.segment_reduce(grad[order].float(), "sum", offsets=first, unsafe=True)

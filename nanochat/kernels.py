"""Kernels in Triton, for GPUs. Used by embedding.py, where Triton is installed."""

from __future__ import annotations

import torch
import triton
import triton.language as tl


def sum_rows(grad: torch.Tensor, order: torch.Tensor, first: torch.Tensor, sums: torch.Tensor) -> None:
    """sums[r] = the sum of the rows of grad that order[first[r] : first[r + 1]] names, added up in that order.

    grad: (N, channels); order: (N,) and first: (rows + 1,) int64; sums: (rows, channels) float32, all contiguous.
    """
    rows, channels = sums.shape
    width = min(256, triton.next_power_of_2(channels))
    _sum_rows[rows, triton.cdiv(channels, width)](grad, order, first, sums, channels, PLACES=16, WIDTH=width)


@triton.jit
def _sum_rows(grad, order, first, sums, channels, PLACES: tl.constexpr, WIDTH: tl.constexpr):  # type: ignore[no-untyped-def]
    """A row, and WIDTH of its channels: PLACES rows of the gradient at a time."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    inside = columns < channels
    begin, end = tl.load(first + row), tl.load(first + row + 1)
    total = tl.zeros([WIDTH], dtype=tl.float32)
    for start in range(begin, end, PLACES):
        at = start + tl.arange(0, PLACES)
        place = tl.load(order + at, mask=at < end, other=0)
        mask = (at < end)[:, None] & inside[None, :]
        some = tl.load(grad + place[:, None] * channels + columns[None, :], mask=mask, other=0.0)
        total += tl.sum(some.to(tl.float32), axis=0)
    tl.store(sums + row * channels + columns, total, mask=inside)

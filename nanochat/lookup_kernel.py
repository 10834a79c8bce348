"""Embedding look-up on a GPU with a fast, deterministic gradient. Used by layers.py and kernels.py.

The gradient of a row is the sum over the places that looked it up. Places are sorted by row, once for all tables that are
read with the same ids. Each program then sums one chunk of places, by a product with a matrix of zeros and ones. A second
kernel joins the sums of rows whose places span several chunks. Nothing is added atomically: each sum has one order, so a run
can be repeated to the last bit. Sums go directly into the table's `.grad`, and only looked-up rows are touched.

Needs Triton, so it is imported only where the model is compiled for a GPU.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

CHUNK, WIDTH = 128, 64  # places that a program adds up, channels of these (dev/LOG.md, "On an H200, once more")


class Order(NamedTuple):
    """Sorted ids, (N,), and the place of each among the unsorted ids, (N,); both int64."""

    ids: torch.Tensor
    places: torch.Tensor


def sort_ids(idx: torch.Tensor, rows: int) -> Order:
    """The order in which `look_up` sums gradients, for ids of any shape into tables with that many rows.

    An id outside the table stops the process, as PyTorch's own look-up would; the kernels below do not check ids.
    """
    order = Order(*idx.flatten().sort(stable=True))
    torch._assert_async((order.ids[0] >= 0) & (order.ids[-1] < rows))
    return order


def look_up(table: torch.Tensor, idx: torch.Tensor, order: Order, dtype: torch.dtype) -> torch.Tensor:
    """Rows of a table (rows, C) float32 for ids of any shape: (*shape, C) in `dtype`; order: `sort_ids(idx, rows)`.

    `backward()` adds its gradient to `table.grad`; `torch.autograd.grad` does not see it.
    """
    rows: torch.Tensor = _LookUp.apply(table, idx, order, dtype)
    return rows


class _LookUp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, table: torch.Tensor, idx: torch.Tensor, order: Order, dtype: torch.dtype) -> torch.Tensor:
        ctx.table, ctx.order = table, order
        C = table.size(1)
        rows = table.new_empty((*idx.shape, C), dtype=dtype)
        _gather[(idx.numel(),)](table, idx.contiguous(), rows, C, triton.next_power_of_2(C))
        return rows

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[None, ...]:
        if ctx.table.grad is None:
            ctx.table.grad = torch.zeros_like(ctx.table)
        add_by_row(ctx.table.grad, grad.reshape(-1, grad.size(-1)), ctx.order)
        return None, None, None, None


def add_by_row(table: torch.Tensor, grad: torch.Tensor, order: Order) -> None:
    """Add to the rows of a table (rows, C) float32 those of grad (N, C) that belong to each."""
    N, C = grad.shape
    chunks = triton.cdiv(N, CHUNK)
    cut = torch.empty(2 * chunks, C, device=grad.device)  # what a chunk has of the run before it, and of the one after
    grid = (chunks, triton.cdiv(C, WIDTH))
    _sum_chunks[grid](grad.contiguous(), *order, table, cut, N, C, CHUNK, WIDTH)
    _join_runs[grid](order.ids, table, cut, N, C, CHUNK, WIDTH)


@triton.jit
def _gather(table, ids, rows, C, WIDTH: tl.constexpr):  # type: ignore[no-untyped-def]
    place = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, WIDTH)
    values = tl.load(table + tl.load(ids + place) * C + columns, mask=columns < C)
    tl.store(rows + place * C + columns, values.to(rows.dtype.element_ty), mask=columns < C)


@triton.jit
def _sum_chunks(grad, ids, places, table, cut, N, C, CHUNK: tl.constexpr, WIDTH: tl.constexpr):  # type: ignore[no-untyped-def]
    """Sum each row's gradients within a chunk: onto the table if all of them are there, else into `cut`."""
    chunk = tl.program_id(0)
    begin, end = chunk * CHUNK, (chunk + 1) * CHUNK
    at = begin + tl.arange(0, CHUNK)
    columns = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    inside = at < N
    own = tl.load(ids + at, mask=inside, other=-1)
    place = tl.load(places + at, mask=inside, other=0)
    within = columns[None, :] < C
    values = tl.load(grad + place[:, None] * C + columns[None, :], mask=inside[:, None] & within, other=0.0)
    alike = (own[:, None] == own[None, :]).to(values.dtype)
    sums = tl.dot(alike, values, input_precision="ieee")  # of its row, at every place

    before = tl.load(ids + begin - 1, mask=begin > 0, other=-1)
    after = tl.load(ids + end, mask=end < N, other=-1)
    last = inside & ((own != tl.load(ids + at + 1, mask=at + 1 < N, other=-1)) | (at == end - 1))
    is_cut = (own == before) | (own == after)
    target, whole = table + own[:, None] * C + columns[None, :], (last & ~is_cut)[:, None] & within
    tl.store(target, tl.load(target, mask=whole, other=0.0) + sums, mask=whole)
    slot = (2 * chunk + tl.where(own == before, 0, 1)).to(tl.int64)
    tl.store(cut + slot[:, None] * C + columns[None, :], sums, mask=(last & is_cut)[:, None] & within)


@triton.jit
def _join_runs(ids, table, cut, N, C, CHUNK: tl.constexpr, WIDTH: tl.constexpr):  # type: ignore[no-untyped-def]
    """Join the parts of the run that begins in a chunk and continues after it."""
    chunk = tl.program_id(0).to(tl.int64)
    begin, end = chunk * CHUNK, (chunk + 1) * CHUNK
    columns = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    within = columns < C
    own = tl.load(ids + end - 1, mask=end < N, other=-1)
    goes_on = own == tl.load(ids + end, mask=end < N, other=-2)
    if goes_on & (own != tl.load(ids + begin - 1, mask=begin > 0, other=-1)):
        target = table + own * C + columns
        total = tl.load(target, mask=within, other=0.0) + tl.load(cut + (2 * chunk + 1) * C + columns, mask=within, other=0.0)
        while own == tl.load(ids + end, mask=end < N, other=-2):
            total += tl.load(cut + 2 * (end // CHUNK) * C + columns, mask=within, other=0.0)
            end += CHUNK
        tl.store(target, total, mask=within)

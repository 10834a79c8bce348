"""Causal attention in plain PyTorch, on any device. Used by flash_attention.py, gpt.py, kv_cache.py and core_eval.py.

Blocks of queries are multiplied with the blocks of keys that they can see, so that causality and windows save time.
Whole-context layers (on a CPU only beyond LONGEST_PLAIN_CONTEXT) use PyTorch's scaled_dot_product_attention.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

if TYPE_CHECKING:
    from nanochat.flash_attention import AttentionPlan

QK_SCALE = 1.2  # the length that gpt.py gives to each normalized query and key, in units of sqrt(head_dim)
LOG2_E = math.log2(math.e)
LONGEST_PLAIN_CONTEXT = 2048  # beyond it, storing the T * T / 2 scores of a whole-context layer does not pay
SMALLEST_BLOCK, MOST_BLOCKS = 128, 8  # of a text in `attend_plain`: smaller blocks save nothing more


def plain_mask(T: int, window: int, device: torch.device) -> list[torch.Tensor] | None:
    """The masks that `attend_plain` adds to scores, float32: 0 where a query sees a key, else -inf. None: PyTorch's kernel.

    Texts are cut into blocks of equal size. There is one mask (block, block) for each distance between a query's block and
    a key's, as far as the window reaches.
    """
    if window >= T - 1 and (device.type != "cpu" or T > LONGEST_PLAIN_CONTEXT):
        return None
    size = min(T, max(SMALLEST_BLOCK, -(-T // MOST_BLOCKS)))
    place = torch.arange(size)
    masks = []
    for first in range(0, min(T, window + size), size):  # the distance of two tokens at the beginnings of their blocks
        distance = first + place[:, None] - place
        masks.append(torch.where((distance >= 0) & (distance <= window), 0.0, float("-inf")).to(device))
    return masks


def attend_plain(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, plan: AttentionPlan) -> torch.Tensor:
    """Attention by products of blocks; see flash_attention.plan_attention. q, k, v may already be laid out (see `lay_out`)."""
    if plan.mask is None or q.dtype == torch.float16:
        return _attend_by_pytorch(q, k, v, None if plan.mask is None else plan.window)
    T, is_laid_out = q.size(1), q.dim() == 5
    if not is_laid_out:
        q, k, v = (lay_out(x, plan.mask[0].size(0)) for x in (q, k, v))
    k, v = repeat_kv(k, q.size(2)), repeat_kv(v, q.size(2))
    y: torch.Tensor = _DiagonalAttention.apply(q, k, v, plan.mask, plan.compiled)
    return y if is_laid_out else y[:, :T]


def _attend_by_pytorch(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: int | None) -> torch.Tensor:
    """For whole contexts; with a window only for float16, which needs each query's maximum over all blocks of keys."""
    visible = None
    if window is not None:
        distance = torch.arange(q.size(1), device=q.device)[:, None] - torch.arange(q.size(1), device=q.device)
        visible = (distance >= 0) & (distance <= window)
    q, k, v = heads_first(q, k, v)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=visible, is_causal=visible is None).transpose(1, 2)


def lay_out(x: torch.Tensor, size: int | None) -> torch.Tensor:
    """(B, T, H, D) cut into blocks of `size` tokens, (blocks, B, H, size, D), contiguous; the last one padded with zeros.

    size None: the same shape, but with heads first in memory, as PyTorch's own attention wants them.
    """
    if size is None:
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    B, T, H, D = x.shape
    if T % size:
        x = F.pad(x, (0, 0, 0, 0, 0, -T % size))
    return x.view(B, -1, size, H, D).permute(1, 0, 3, 2, 4).contiguous()


class _DiagonalAttention(torch.autograd.Function):
    """softmax(q k^T / sqrt(D) + mask) v, for q, k, v as `lay_out` makes them: (blocks, B, H, size, D) to (B, T, H, D).

    All pairs of a query block and a key block at the same distance form one batch of products, whose operands are
    contiguous: the last blocks of queries and the first blocks of keys. (Slices of longer rows would be copied first.) Four
    kernels, compiled once for all layers and windows, do the rest. The softmax needs no maximum: queries and keys have
    bounded length, so it subtracts the bound of the scores. It divides by the sums last, on D columns instead of T.
    """

    @staticmethod
    def forward(
        ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, masks: list[torch.Tensor], compiled: bool
    ) -> torch.Tensor:
        blocks, B, H, size, D = q.shape
        weights_of: Any = _compiled(attention_weights) if compiled else attention_weights
        divide: Any = _compiled(divide_by_sums) if compiled else divide_by_sums
        flat_q, flat_k, flat_v = (x.flatten(0, 2) for x in (q, k, v))
        kept: list[torch.Tensor] = []
        for mask, queries, keys in _diagonals(masks, blocks, B * H):
            weights, part = weights_of(flat_q[queries] @ flat_k[keys].mT, mask, D**-0.5)
            if not kept:  # each block with itself: all queries
                y, sums = weights @ flat_v, part
            else:
                y[queries].baddbmm_(weights, flat_v[keys])
                sums[queries] += part
            kept.append(weights)
        sums = sums.view(blocks, B, H, size, 1)
        y = divide(y.view_as(q), sums)
        ctx.save_for_backward(q, k, v, y, sums, *kept)
        ctx.masks, ctx.compiled = masks, compiled
        return y.view(B, blocks * size, H, D)

    @staticmethod
    def backward(ctx: Any, grad_y: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        q, k, v, y, sums, *kept = ctx.saved_tensors
        blocks, B, H, size, D = q.shape
        gradient_of: Any = _compiled(score_gradient) if ctx.compiled else score_gradient
        parts_of: Any = _compiled(output_gradient) if ctx.compiled else output_gradient
        grad, shift = (x.flatten(0, 2) for x in parts_of(grad_y.reshape(y.shape), y, sums))
        flat_q, flat_k, flat_v = (x.flatten(0, 2) for x in (q, k, v))
        grad_q, grad_k, grad_v = (torch.empty_like(x) for x in (flat_q, flat_k, flat_v))
        for i, (_, queries, keys) in enumerate(_diagonals(ctx.masks, blocks, B * H)):
            add = torch.Tensor.baddbmm_ if i else _write_product
            add(grad_v[keys], kept[i].mT, grad[queries])
            grad_scores = gradient_of(kept[i], grad[queries] @ flat_v[keys].mT, shift[queries], D**-0.5)
            add(grad_q[queries], grad_scores, flat_k[keys])
            add(grad_k[keys], grad_scores.mT, flat_q[queries])
        return grad_q.view_as(q), grad_k.view_as(k), grad_v.view_as(v), None, None


def _diagonals(masks: list[torch.Tensor], blocks: int, rows: int) -> Iterator[tuple[torch.Tensor, slice, slice]]:
    """(mask, queries, keys) for each distance between blocks; a block is `rows` rows of the flattened tensors."""
    for distance, mask in enumerate(masks[:blocks]):
        yield mask, slice(distance * rows, None), slice(0, (blocks - distance) * rows)


def _write_product(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    torch.bmm(a, b, out=total)


def divide_by_sums(y: torch.Tensor, sums: torch.Tensor) -> torch.Tensor:
    """y (blocks, B, H, size, D) divided by sums (blocks, B, H, size, 1) float32, as (B, blocks, size, H, D)."""
    return (y / sums).to(y.dtype).permute(1, 0, 3, 2, 4).contiguous()


def output_gradient(grad_y: torch.Tensor, y: torch.Tensor, sums: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(grad_y / sums, (blocks, B, H, size, D); grad_y . y / sums for each query, (..., 1) float32) of grad_y and y, both
    (B, blocks, size, H, D): the second is what a softmax's backward pass subtracts from every score's gradient.
    """
    grad_y, y = grad_y.permute(1, 0, 3, 2, 4), y.permute(1, 0, 3, 2, 4)
    grad = (grad_y.float() / sums).to(grad_y.dtype).contiguous()
    return grad, (grad.float() * y.float()).sum(dim=-1, keepdim=True)


def attention_weights(scores: torch.Tensor, mask: torch.Tensor, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    """exp(scores * scale + mask - their bound) in the dtype of scores, (..., Tq, Tk), and its sums (..., Tq, 1) float32.

    In float16 each query's maximum replaces the bound: exp(-2 * bound) is 1e-14 with heads of 128, and float16 ends at 6e-8.
    Uses powers of two: the compiler would write powers of e to memory in float32 before summing them.
    """
    scale *= LOG2_E
    bound: Any = QK_SCALE**2 * LOG2_E**2 / scale
    if scores.dtype == torch.float16:
        bound = (scores.detach().float() * scale + mask).amax(dim=-1, keepdim=True)
    exponentials = torch.exp2(scores.float() * scale + mask - bound)
    return exponentials.to(scores.dtype), exponentials.sum(dim=-1, keepdim=True)


def score_gradient(weights: torch.Tensor, grad: torch.Tensor, shift: torch.Tensor, scale: float) -> torch.Tensor:
    """The gradient of the scores from that of the weights, grad (..., Tq, Tk), less each query's shift (..., Tq, 1)."""
    return (weights.float() * (grad.float() - shift) * scale).to(weights.dtype)


@functools.lru_cache
def _compiled(kernel: Callable[..., Any]) -> Callable[..., Any]:
    """The kernel, compiled once for blocks of every size."""
    return torch.compile(kernel, dynamic=True)


def attend_masked(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, plan: AttentionPlan) -> torch.Tensor:
    """Attention with a mask for each row, (B, 1, T, T) in q's dtype, added to scores; see flash_attention.plan_attention."""
    q, k, v = heads_first(q, k, v)
    if q.device.type == "cpu" and q.size(2) <= LONGEST_PLAIN_CONTEXT // 2:  # few enough scores to store them all
        weights, sums = attention_weights(q @ k.mT, plan.mask, q.size(-1) ** -0.5)
        return ((weights @ v) / sums).to(q.dtype).transpose(1, 2)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=plan.mask).transpose(1, 2)


def heads_first(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q (B, T, H, D) and k, v (B, T, KV, D) as PyTorch's own attention wants them: each (B, H, T, D)."""
    k, v = repeat_kv(k, q.size(2)), repeat_kv(v, q.size(2))
    return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)


def repeat_kv(x: torch.Tensor, num_heads: int) -> torch.Tensor:
    """(a, b, KV, ...) -> (a, b, num_heads, ...): every key/value head serves num_heads / KV query heads."""
    repeats = num_heads // x.size(2)
    return x if repeats == 1 else x.repeat_interleave(repeats, dim=2)

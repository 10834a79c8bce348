"""Queries, keys and values on a GPU: one kernel for the backward pass of norms and rotary positions. Used by kernels.py.

It reads the gradients of queries and keys and the output of the matrix product once, and writes their gradients and those of
the values once, where the product's own backward pass needs them: 6 reads and writes of a tensor the size of the queries,
where compiled code makes 10 and a copy of the values.

Needs Triton, so it is imported only where the model is compiled for a GPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl

from nanochat.layers import in_heads

ROWS = 16  # tokens per program
EPSILON = torch.finfo(torch.float32).eps  # F.rms_norm adds this to the mean square, whatever the dtype


def probe(device: torch.device) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """(what the kernel computes, what PyTorch does) for some gradients."""
    generator = torch.Generator(device).manual_seed(0)
    sizes, angles = (128, 64, 64), torch.rand(20, 32, generator=generator, device=device)
    rotary = (angles.cos().repeat(1, 2)[None, :, None], torch.cat([angles.sin(), -angles.sin()], dim=1)[None, :, None])
    with torch.enable_grad():
        qkv = torch.randn(2, 20, 256, generator=generator, device=device).to(torch.bfloat16).requires_grad_()
        both = fused_heads(qkv, sizes, 1.2, rotary), in_heads(qkv.split(sizes, dim=-1), 1.2, rotary)
        grads = [torch.randn(x.shape, generator=generator, device=device).to(x.dtype) for x in both[0]]
        found, expected = (torch.autograd.grad(heads, qkv, grads)[0] for heads in both)
    return [(found, expected)]


def fused_heads(
    qkv: torch.Tensor, sizes: Sequence[int], scale: float, rotary: tuple[torch.Tensor, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """layers.in_heads of qkv.split(sizes, dim=-1), with positions that all rows share: cos and sin (1, T, 1, D)."""
    if rotary[0].size(0) > 1:
        return in_heads(qkv.split(sizes, dim=-1), scale, rotary)
    q, k, v = _Heads.apply(qkv, *rotary, sizes, scale)
    return q, k, v


class _Heads(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, qkv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, sizes: Sequence[int], scale: float
    ) -> tuple[torch.Tensor, ...]:
        ctx.save_for_backward(qkv, cos, sin)
        ctx.scale = scale
        return in_heads(qkv.split(sizes, dim=-1), scale, (cos, sin))

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return _heads_backward(*grads, *ctx.saved_tensors, ctx.scale), None, None, None, None


# An operator of its own, so that the compiler takes it as it is.
SCHEMA = "(Tensor q, Tensor k, Tensor v, Tensor qkv, Tensor cos, Tensor sin, float scale) -> Tensor"


@torch.library.custom_op("nanochat::heads_backward", mutates_args=(), schema=SCHEMA)
def _heads_backward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, qkv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, scale: float
) -> torch.Tensor:
    """The gradient of qkv (B, T, channels) from those of in_heads' results, (B, T, heads, D) each."""
    B, T, H, D = q.shape
    q, k, v, qkv, cos, sin = (x.contiguous() for x in (q, k, v, qkv, cos, sin))
    out = torch.empty_like(qkv)
    grid = (triton.cdiv(B * T, ROWS),)
    _heads_backward_kernel[grid](
        q, k, v, qkv, cos, sin, out, B * T, T, scale, EPSILON,
        H, k.size(2), D, triton.next_power_of_2(D // 2), ROWS,
    )  # fmt: skip
    return out


@_heads_backward.register_fake
def _(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, qkv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, scale: float
) -> torch.Tensor:
    return torch.empty_like(qkv)


@triton.jit
def _heads_backward_kernel(  # type: ignore[no-untyped-def]
    q, k, v, qkv, cos, sin, out, N, T, scale, epsilon,
    H: tl.constexpr, KV: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Each program takes some tokens and goes through their heads in turn, so that cosines and sines are read once."""
    row = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    column = tl.arange(0, WIDTH)[None, :]  # of the first half of a head
    inside = (row < N) & (column < D // 2)
    angle = row % T * D + column
    c, s = tl.load(cos + angle, mask=inside, other=0.0), tl.load(sin + angle, mask=inside, other=0.0)
    joined = row * ((H + 2 * KV) * D) + column
    for head in range(H):
        _head(q + (row * H + head) * D + column, qkv + joined, out + joined, c, s, inside, scale, epsilon, D)
        joined += D
    for head in range(KV):
        _head(k + (row * KV + head) * D + column, qkv + joined, out + joined, c, s, inside, scale, epsilon, D)
        joined += D
    for head in range(KV):
        place = v + (row * KV + head) * D + column
        tl.store(out + joined, tl.load(place, mask=inside), mask=inside)
        tl.store(out + joined + D // 2, tl.load(place + D // 2, mask=inside), mask=inside)
        joined += D


@triton.jit
def _head(grad, x, out, c, s, inside, scale, epsilon, D: tl.constexpr):  # type: ignore[no-untyped-def]
    """One head of queries or keys: turned back, then the gradient of x / sqrt(mean(x**2) + epsilon)."""
    x1 = tl.load(x, mask=inside, other=0.0).to(tl.float32)
    x2 = tl.load(x + D // 2, mask=inside, other=0.0).to(tl.float32)
    g1 = tl.load(grad, mask=inside, other=0.0).to(tl.float32)
    g2 = tl.load(grad + D // 2, mask=inside, other=0.0).to(tl.float32)
    inverse = tl.rsqrt(tl.sum(x1 * x1 + x2 * x2, axis=1) / D + epsilon)[:, None]
    n1, n2 = x1 * inverse, x2 * inverse
    d1, d2 = scale * (g1 * c - g2 * s), scale * (g2 * c + g1 * s)
    along = (tl.sum(d1 * n1 + d2 * n2, axis=1) / D)[:, None]
    tl.store(out, (inverse * (d1 - along * n1)).to(out.dtype.element_ty), mask=inside)
    tl.store(out + D // 2, (inverse * (d2 - along * n2)).to(out.dtype.element_ty), mask=inside)

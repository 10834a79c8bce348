"""The MLP on a Hopper GPU: matrix products with a fused ReLU squared, or with its derivative in the backward pass.

Used by kernels.py. In separate kernels, writing and reading the hidden activations takes a twentieth of a training pass at
depth 12. Here the first product only writes relu(x @ up.T)**2. The backward pass needs no more, since the derivative of a
square is twice its root.

Needs Triton, so it is imported only where the model is compiled for a GPU.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

ROWS, DEPTH, STAGES = 128, 64, 3  # of what a program multiplies at a time


def probe(device: torch.device) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """(what the kernels compute, what PyTorch does), forward and backward."""
    generator = torch.Generator(device).manual_seed(0)
    with torch.enable_grad():
        inputs = [
            torch.randn(shape, generator=generator, device=device).mul_(0.1).to(torch.bfloat16).requires_grad_()
            for shape in ((20_000, 72), (520, 72), (72, 520))  # more tiles than there are programs
        ]
        x, up, down = inputs
        found, expected = mlp(x, up, down), F.linear(F.relu(F.linear(x, up)).square(), down)
        gradients = [torch.autograd.grad(y.float().sum(), inputs) for y in (found, expected)]
    return [(found, expected), *zip(*gradients, strict=True)]


def mlp(x: torch.Tensor, up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
    """relu(x @ up.T)**2 @ down.T, for x (..., C), up (H, C) and down (C, H), all bfloat16 and multiples of 8 wide."""
    y: torch.Tensor = _MLP.apply(x.flatten(0, -2), up, down)
    return y.view(x.shape)


class _MLP(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
        squares = _squares(x, up)
        ctx.save_for_backward(x, up, down, squares)
        return squares @ down.T

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, ...]:
        x, up, down, squares = ctx.saved_tensors
        grad_hidden = _times_slope(grad.contiguous(), down.T.contiguous(), squares)
        return grad_hidden @ up, grad_hidden.T @ x, grad.T @ squares


# Operators of their own, so that the compiler takes them as they are.


@torch.library.custom_op("nanochat::squares", mutates_args=(), schema="(Tensor a, Tensor b) -> Tensor")
def _squares(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """relu(a @ b.T)**2: (M, K), (N, K) -> (M, N)."""
    return _launch(a, b, None)


@torch.library.custom_op("nanochat::times_slope", mutates_args=(), schema="(Tensor a, Tensor b, Tensor squares) -> Tensor")
def _times_slope(a: torch.Tensor, b: torch.Tensor, squares: torch.Tensor) -> torch.Tensor:
    """a @ b.T * 2 sqrt(squares): (M, K), (N, K), (M, N) -> (M, N)."""
    return _launch(a, b, squares)


@_squares.register_fake
def _(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return a.new_empty(a.size(0), b.size(0))


@_times_slope.register_fake
def _(a: torch.Tensor, b: torch.Tensor, squares: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(squares)


def _launch(a: torch.Tensor, b: torch.Tensor, squares: torch.Tensor | None) -> torch.Tensor:
    from triton.tools.tensor_descriptor import TensorDescriptor  # not in old versions: probe() finds out

    (M, K), N = a.shape, b.size(0)
    out = a.new_empty(M, N)
    columns, warps = (256, 8) if squares is None else (128, 4)
    tile = [ROWS, columns]
    blocks = ((a, [ROWS, DEPTH]), (b, [columns, DEPTH]), (out, tile), (out if squares is None else squares, tile))
    tiles_across = triton.cdiv(N, columns)
    programs = tiles = triton.cdiv(M, ROWS) * tiles_across
    if squares is None:
        programs = min(tiles, torch.cuda.get_device_properties(a.device).multi_processor_count)
    _multiply[(programs,)](
        *(TensorDescriptor.from_tensor(tensor, block) for tensor, block in blocks), tiles, tiles_across, K, programs,
        ROWS, columns, DEPTH, squares is not None, num_warps=warps, num_stages=STAGES,
    )  # fmt: skip
    return out


@triton.jit
def _multiply(  # type: ignore[no-untyped-def]
    a, b, out, squares, tiles, tiles_across, K, programs,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, BACKWARD: tl.constexpr,
):  # fmt: skip
    """Forward: one program per multiprocessor, which fetches the next tile while it finishes one. Backward, where finishing
    a tile also means reading: small programs, two per multiprocessor, so that one works while the other waits.
    """
    if BACKWARD:
        _tile(tl.program_id(0), a, b, out, squares, tiles_across, K, ROWS, COLUMNS, DEPTH, BACKWARD)
    else:
        for tile in tl.range(tl.program_id(0), tiles, programs, flatten=True):
            _tile(tile, a, b, out, squares, tiles_across, K, ROWS, COLUMNS, DEPTH, BACKWARD)


@triton.jit
def _tile(  # type: ignore[no-untyped-def]
    tile, a, b, out, squares, tiles_across, K,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, BACKWARD: tl.constexpr,
):  # fmt: skip
    """One tile of the result. Tiles of the same rows run next to each other, so what they read of `a` stays in the cache."""
    row, column = tile // tiles_across * ROWS, tile % tiles_across * COLUMNS
    result = tl.zeros((ROWS, COLUMNS), tl.float32)
    for k in range(0, K, DEPTH):
        result = tl.dot(a.load([row, k]), b.load([column, k]).T, result)
    if BACKWARD:
        result *= 2 * tl.sqrt(squares.load([row, column]).to(tl.float32))
    else:
        result = tl.maximum(result, 0, propagate_nan=tl.PropagateNan.ALL)
        result *= result
    out.store([row, column], result.to(out.dtype))

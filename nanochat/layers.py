"""What blocks are made of: tables that are looked up, matrices that multiply, norms, rotary positions.

Used by gpt.py, passes.py, runner.py and heads_kernel.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn as nn
import torch.nn.functional as F

from nanochat.fp8 import fp8_linear

if TYPE_CHECKING:
    from nanochat.kernels import Heads
    from nanochat.lookup_kernel import Order


def norm(x: torch.Tensor) -> torch.Tensor:
    """RMS norm over the last dimension, without weights."""
    return F.rms_norm(x, (x.size(-1),))


def apply_rotary(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate pairs of channels by the angle of their position. x: (B, T, H, D); cos, sin: (B or 1, T, 1, D), see GPT.rotary.

    Each channel is paired with the one half a head away. `flip` swaps them: the compiler would write a `cat` to memory.
    """
    swapped = x.unflatten(-1, (2, -1)).flip(-2).flatten(-2)
    return (x * cos + swapped * sin).to(x.dtype)


def in_heads(
    parts: Sequence[torch.Tensor], scale: float, rotary: tuple[torch.Tensor, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries (B, T, H, D), keys and values (B, T, KV, D) from the three matrices' outputs, each (B, T, channels).

    Queries and keys have the length scale * sqrt(D); a scale above 1 lets attention be sharper. rotary: see GPT.rotary.
    If you change this function, `norm` or `apply_rotary`, change the derivative in heads_kernel.py too.
    """
    q, k, v = (x.unflatten(-1, (-1, rotary[0].size(-1))) for x in parts)
    return apply_rotary(norm(q) * scale, *rotary), apply_rotary(norm(k) * scale, *rotary), v


class Embedding(nn.Embedding):
    """A table with one row for each index."""

    def reset_parameters(self) -> None:
        """Does nothing: GPT.init_weights or a checkpoint sets the values; drawing them here costs every command a second."""

    def forward(  # type: ignore[override]
        self, idx: torch.Tensor, dtype: torch.dtype, order: Order | None = None
    ) -> torch.Tensor:
        """The rows (*shape, C) of ids of any shape, in the given dtype; order: see GPT.sort_ids."""
        if order is None:
            return super().forward(idx).to(dtype)
        from nanochat.lookup_kernel import look_up

        return look_up(self.weight, idx, order, dtype)


class Linear(nn.Linear):
    """A matrix without bias, stored in float32 and multiplied in the dtype of its input."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features, bias=False)
        self.fp8 = False  # True: train with products in 8 bits (fp8.py)

    def reset_parameters(self) -> None:
        """Does nothing; see Embedding.reset_parameters."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x (..., in_features) times this matrix."""
        return product(x, self.weight, self.fp8 and self.training)


def product(x: torch.Tensor, weight: torch.Tensor, in_fp8: bool) -> torch.Tensor:
    """x (..., in_features) times a matrix (out_features, in_features), in the dtype of x or in 8 bits."""
    return fp8_linear(x, weight) if in_fp8 else F.linear(x, weight.to(x.dtype))


def make_heads(
    x: torch.Tensor,
    matrices: Sequence[Linear],
    scale: float,
    rotary: tuple[torch.Tensor, torch.Tensor],
    fused: Heads | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x (B, T, C) times the matrices of queries, keys and values, then `in_heads`. fused: see kernels.py."""
    if x.device.type != "cuda" or not torch.is_grad_enabled():
        return in_heads([matrix(x) for matrix in matrices], scale, rotary)
    qkv, sizes = multiply_joined(x, matrices), [matrix.out_features for matrix in matrices]  # faster than three products
    if fused:
        return fused(qkv, sizes, scale, rotary)
    return in_heads(qkv.split(sizes, dim=-1), scale, rotary)


def multiply_joined(x: torch.Tensor, matrices: Sequence[Linear]) -> torch.Tensor:
    """The products of x with several matrices, concatenated along the last dimension, as one product."""
    in_fp8 = matrices[0].fp8 and matrices[0].training
    return product(x, torch.cat([matrix.weight for matrix in matrices]), in_fp8)

"""The loss on a GPU: one kernel for everything between its matrix products. Used by kernels.py; see cross_entropy.py.

Needs Triton, so it is imported only where the model is compiled for a GPU.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from nanochat.cross_entropy import IGNORE_INDEX

WIDTH, WARPS = 4096, 4  # logits that a program reads at a time (dev/LOG.md, "A third time on an H200")


def chunk_loss(logits: torch.Tensor, targets: torch.Tensor, x: torch.Tensor, cap: float) -> tuple[torch.Tensor, ...]:
    """Like cross_entropy.chunk_loss; the gradient overwrites the logits. A target outside the vocabulary stops the process."""
    n, vocab_size = logits.shape
    torch._assert_async(((targets >= IGNORE_INDEX) & (targets < vocab_size)).all())  # stay in bounds
    losses = torch.empty(n, device=x.device)
    scale, scaled = losses.new_empty(n, 1), torch.empty_like(x)
    channels = triton.next_power_of_2(x.size(1))
    _chunk_loss[(n,)](
        logits, targets, x, losses, scale, scaled, cap, vocab_size, x.size(1), IGNORE_INDEX, WIDTH, channels, num_warps=WARPS
    )
    return losses.sum(), logits, scale, scaled


@triton.jit
def _chunk_loss(  # type: ignore[no-untyped-def]
    logits, targets, x, losses, scales, scaled, cap, vocab_size, C, IGNORED: tl.constexpr, WIDTH: tl.constexpr,
    CHANNELS: tl.constexpr,
):  # fmt: skip
    """One token a program; for the formulas see cross_entropy.softmax_gradient.

    The barriers keep the target's place: read before the loop writes to it, written after. Leaving it out of the loop's
    stores would make each of them a store of two bytes.
    """
    token = tl.program_id(0).to(tl.int64)
    row = logits + token * vocab_size
    target = tl.load(targets + token)
    r, at_target = _tilt(tl.load(row + tl.maximum(target, 0)), cap)
    tl.debug_barrier()
    sums = tl.zeros((WIDTH,), tl.float32)
    for start in range(0, vocab_size, WIDTH):
        columns = start + tl.arange(0, WIDTH)
        inside = columns < vocab_size
        tilt, exponentials = _tilt(tl.load(row + columns, mask=inside, other=0.0), cap)
        sums += tl.where(inside, exponentials, 0.0)
        tl.store(row + columns, 4 * (tilt - tilt * tilt) * exponentials, mask=inside)
    total = tl.sum(sums)
    tl.debug_barrier()
    supervised = target != IGNORED
    tl.store(row + target, 4 * (r - r * r) * (at_target - total), mask=supervised)
    tl.store(losses + token, tl.where(supervised, tl.log(total) + 2 * cap * r, 0.0))
    scale = tl.where(supervised, 1 / total, 0.0)
    tl.store(scales + token, scale)
    channels = tl.arange(0, CHANNELS)
    values = tl.load(x + token * C + channels, mask=channels < C, other=0.0).to(tl.float32)
    tl.store(scaled + token * C + channels, values * scale, mask=channels < C)


@triton.jit
def _tilt(logits, cap):  # type: ignore[no-untyped-def]
    """r = 1 / (1 + exp(2 logits / cap)), and exp(softcap(logits) - cap) = exp(-2 cap r)."""
    r = 1 / (1 + tl.exp(logits.to(tl.float32) * (2 / cap)))
    return r, tl.exp(-2 * cap * r)

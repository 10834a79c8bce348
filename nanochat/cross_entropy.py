"""Cross-entropy of soft-capped logits without ever holding them all. Used by gpt.py, loss_kernel.py, rl.py
and memory.py.

The logits of 8,192 tokens over 32,768 words take 1 GB in float32, and several times that with their gradients. Here they
are made, used and discarded in chunks of tokens. If a gradient is wanted, it is computed in the same pass, since the
gradient of a cross-entropy needs only a scalar factor from later layers.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

ChunkLoss = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, float], tuple[torch.Tensor, ...]]  # see `chunk_loss`
IGNORE_INDEX = -1
CHUNK_BYTES, CHUNK_TOKENS = 32 << 20, 1024  # upper limits of a chunk of float32 logits: suits a CPU's cache and products
CACHE_BYTES = 2 << 20  # float32 logits processed at a time when uncompiled
PRODUCT_ROWS = 2048  # rows of the head's gradient that are summed at a time
GPU_CHUNK_BYTES = 1 << 30  # enough tokens to fill a large GPU, but at most a 64th of its memory


def softcap(logits: torch.Tensor, cap: float) -> torch.Tensor:
    """cap * tanh(logits / cap), in float32."""
    return cap * logits.to(torch.float32, copy=True).div_(cap).tanh_()  # in place: float32 logits are large


def softcapped_cross_entropy(
    x: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    cap: float,
    reduction: str = "mean",
    loss_of: ChunkLoss | None = None,
) -> torch.Tensor:
    """Cross-entropy of softcap(x @ weight.T) against targets, in nats, float32.

    x: (N, C) features; weight: (vocab_size, C); targets: (N,) int64, -1 where there is nothing to predict.
    reduction "mean" is over the supervised tokens, and 0 (not NaN) if there are none; "sum"; "none" gives (N,), 0 at
    ignored positions. loss_of: a faster equivalent of `chunk_loss`, from a caller that compiles.
    """
    if reduction == "none":
        return token_losses(x, weight, targets, cap)
    if reduction not in ("mean", "sum"):
        raise ValueError(f"loss_reduction must be mean, sum or none, not {reduction!r}")
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        loss_of = loss_of or chunk_loss
        if x.dtype == torch.float16:
            loss_of = functools.partial(half_loss, loss_of=loss_of)
        total = _FusedLoss.apply(x, weight, targets, cap, loss_of)
    else:
        total = token_losses(x, weight, targets, cap).sum()
    if reduction == "sum":
        return total
    return total / (targets != IGNORE_INDEX).sum().clamp(min=1)


def _chunk_size(num_tokens: int, vocab_size: int, device: torch.device) -> int:
    """Tokens in a chunk: a power of two, so that the chunks of a batch have one shape."""
    budget, most = CHUNK_BYTES, CHUNK_TOKENS
    if device.type == "cuda":
        budget, most = min(GPU_CHUNK_BYTES, torch.cuda.get_device_properties(device).total_memory // 64), num_tokens
    size = 1 << max(7, (budget // (4 * vocab_size)).bit_length() - 1)
    return min(size, most, num_tokens)


def token_losses(
    x: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, cap: float, temperature: float = 1.0, top_k: int = 0
) -> torch.Tensor:
    """(N,) losses through autograd, recomputing each chunk's logits in the backward pass; arguments as above.

    The losses are for the distribution of sampling at `temperature` among the `top_k` likeliest tokens (0: all); the target
    always counts as one of these, even if rounding would exclude it.
    """

    def chunk_losses(x_chunk: torch.Tensor, weight: torch.Tensor, target_chunk: torch.Tensor) -> torch.Tensor:
        logits = softcap(x_chunk @ weight.T, cap) / temperature
        if 0 < top_k < logits.size(-1):
            excluded = logits < logits.topk(top_k, dim=-1).values[:, -1:]
            excluded.scatter_(1, target_chunk.clamp(min=0)[:, None], False)
            logits = logits.masked_fill(excluded, float("-inf"))
        return torch.nn.functional.cross_entropy(logits, target_chunk, ignore_index=IGNORE_INDEX, reduction="none")

    weight = weight.to(x.dtype)
    # Half a chunk: several copies of its float32 logits exist here, and buffers of 32 MiB and more would be requested from
    # the system each time (cpu.keep_freed_memory).
    size = max(1, _chunk_size(x.size(0), weight.size(0), x.device) // 2)
    chunks = zip(x.split(size), targets.split(size), strict=True)
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        return torch.cat([checkpoint(chunk_losses, xc, weight, tc, use_reentrant=False) for xc, tc in chunks])
    losses = torch.empty(x.size(0), device=x.device)
    for part, (xc, tc) in zip(losses.split(size), chunks, strict=True):
        part.copy_(chunk_losses(xc, weight, tc))
    return losses


def softmax_gradient(logits: torch.Tensor, cap: float, factor: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The part of a chunk's loss and gradient that needs all its logits, in one pass; the targets' own share comes later.

    logits: (n, vocab_size); factor: (n, 1) float32, -2 * cap in every row; a tensor, because otherwise the compiler makes
    two loops with float32 exponentials in memory between them, up to three times as slow. With z = softcap(logits), returns
    the sums of exp(z - cap), (n, 1) float32, and exp(z - cap) * dz/dlogits in the dtype of logits: the gradient before the
    division by those sums. With r = 1 / (1 + exp(2 logits / cap)), tanh = 1 - 2r, so z - cap = -2 cap r (never above 0: no
    maximum is needed) and dz/dlogits = 4 (r - r^2): one exponential instead of a tanh, which on a CPU is half of the cost.
    """
    r = (logits.float() * (2 / cap)).exp_().add_(1).reciprocal_()  # in place: uncompiled, each would take a chunk's memory
    exponentials = (factor * r).exp_()
    gradient = r.sub_(r * r).mul_(4).mul_(exponentials)
    return exponentials.sum(dim=-1, keepdim=True), gradient.to(logits.dtype)


def gradient_by_rows(logits: torch.Tensor, cap: float, factor: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`softmax_gradient` uncompiled: nine passes, on a CPU over as many rows at a time as fit into a core's cache."""
    if logits.device.type != "cpu":
        return softmax_gradient(logits, cap, factor)
    rows = max(1, CACHE_BYTES // (4 * logits.size(1)))
    sums, gradient = torch.empty_like(factor), torch.empty_like(logits)
    for part in (slice(start, start + rows) for start in range(0, logits.size(0), rows)):
        sums[part], gradient[part] = softmax_gradient(logits[part], cap, factor[part])
    return sums, gradient


def chunk_loss(
    logits: torch.Tensor,
    targets: torch.Tensor,
    x: torch.Tensor,
    cap: float,
    gradient_of: Callable[[torch.Tensor, float, torch.Tensor], tuple[torch.Tensor, torch.Tensor]] = gradient_by_rows,
) -> tuple[torch.Tensor, ...]:
    """(loss, gradient, scale, scaled) of one chunk, whose features are x (n, C).

    loss: () float32, summed. gradient * scale: d loss / d logits, (n, vocab_size); the caller applies scale (n, 1) float32
    after the products, where it costs almost nothing. scaled: x * scale in x's dtype. The logits may be overwritten.
    """
    sums, gradient = gradient_of(logits, cap, logits.new_full((logits.size(0), 1), -2 * cap, dtype=torch.float32))
    supervised = (targets != IGNORE_INDEX)[:, None]
    columns = targets.clamp(min=0)[:, None]
    tanh = torch.tanh(logits.gather(1, columns).float() / cap)
    loss = ((sums.log() + cap - cap * tanh) * supervised).sum()
    # Recomputed at the targets: rounding would lose the tiny gradient of a token that is already almost certain.
    # Flat and in place: scatter_ would copy the whole gradient.
    at_target = (1 - tanh * tanh) * ((cap * tanh - cap).exp() - sums)
    flat_index = torch.arange(targets.numel(), device=targets.device) * gradient.size(1) + columns[:, 0]
    gradient.view(-1).index_copy_(0, flat_index, at_target.to(gradient.dtype)[:, 0])
    scale = supervised / sums
    return loss, gradient, scale, (x * scale).to(x.dtype)


def half_loss(
    logits: torch.Tensor, targets: torch.Tensor, x: torch.Tensor, cap: float, loss_of: ChunkLoss
) -> tuple[torch.Tensor, ...]:
    """`chunk_loss` for float16, whose range holds the gradient only after division by the sums of exponentials."""
    loss, gradient, scale, _ = loss_of(logits.float(), targets, x, cap)
    return loss, gradient.mul_(scale).to(x.dtype), torch.ones_like(scale), x


def _add_product(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    """total += a @ b for a float32 total; on a GPU inside the product, otherwise in portions of rows that fit the cache."""
    if total.device.type == "cuda" and a.dtype != torch.float32:
        torch.addmm(total, a, b, out_dtype=torch.float32, out=total)
        return
    for rows, part in zip(total.split(PRODUCT_ROWS), a.split(PRODUCT_ROWS), strict=True):
        rows += part @ b


class _FusedLoss(torch.autograd.Function):
    """Summed loss whose gradients are made in the forward pass, chunk by chunk; the backward pass overwrites them."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, cap: float, loss_of: ChunkLoss
    ) -> torch.Tensor:
        size = _chunk_size(x.size(0), weight.size(0), x.device)
        total = torch.zeros((), device=x.device)
        grad_x, grad_weight = torch.empty_like(x), torch.zeros(weight.shape, device=x.device)
        # One buffer: a small tensor kept for each chunk would fragment freed memory.
        scales = x.new_empty(x.size(0), 1, dtype=torch.float32)
        weight = weight.to(x.dtype)
        for start in range(0, x.size(0), size):
            part = slice(start, start + size)
            loss, grad_logits, scales[part], scaled = loss_of(x[part] @ weight.T, targets[part], x[part], cap)
            total += loss
            torch.mm(grad_logits, weight, out=grad_x[part])
            _add_product(grad_weight, grad_logits.T, scaled)
        ctx.save_for_backward(grad_x, scales, grad_weight)
        return total

    @staticmethod
    def backward(ctx: Any, grad_total: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        grad_x, scale, grad_weight = ctx.saved_tensors
        return grad_x.mul_(scale * grad_total), grad_weight.mul_(grad_total), None, None, None

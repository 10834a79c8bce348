"""Causal attention with sliding windows, on whatever this machine has. Used by gpt.py and kv_cache.py.

`plan_attention` chooses, once per device, the fastest backend that a probe launch shows to work, and makes the mask
that it needs; `plan.attend(q, k, v, plan)` is then all that runs in the hot path. The backends:

- "fa3": FlashAttention 3, where `flash_attn_interface` is installed
- "flex": FlexAttention compiled to a Triton kernel (CUDA with a working compiler); skips the masked blocks
- "plain": matrix products of some queries at a time with the keys that they can see, so that causality and windows save
  time on any device; long whole-context layers go to PyTorch's scaled_dot_product_attention

To add a backend, write a function `attend_x(q, k, v, plan)` and list it in `choose_backend`.
"""

from __future__ import annotations

import functools
import importlib
import logging
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

logger = logging.getLogger(__name__)

QK_SCALE = 1.2  # the length that gpt.py gives to each normalized query and key, in units of sqrt(head_dim)
LONGEST_PLAIN_CONTEXT = 2048  # beyond it the T * T / 2 scores of a whole-context layer are better not written down
SMALLEST_BLOCK, MOST_BLOCKS = 128, 8  # of queries: less saves nothing more, and every block is compiled


class AttentionPlan(NamedTuple):
    """How sequences of one length attend: a backend, the window, and the mask in that backend's own form."""

    attend: Callable[..., torch.Tensor]
    window: int
    mask: Any


def plan_attention(T: int, window: int, device: torch.device, dtype: torch.dtype) -> AttentionPlan:
    """The plan for causal attention over T tokens, each seeing itself and the `window` tokens before it.

    Its `attend(q, k, v, plan)` takes q: (B, T, H, D) and k, v: (B, T, KV, D) with H a multiple of KV, queries and keys
    of length at most QK_SCALE * sqrt(D) each, and returns (B, T, H, D) in q's dtype. Plans are cached: asking for one
    costs a dictionary look-up.
    """
    return _plan(T, min(window, T), device.type, device.index, dtype)


@functools.lru_cache(maxsize=256)
def _plan(T: int, window: int, device_type: str, device_index: int | None, dtype: torch.dtype) -> AttentionPlan:
    device = _device(device_type, device_index)
    attend, make_mask = choose_backend(device_type, device_index, dtype)
    return AttentionPlan(attend, window, make_mask(T, window, device))


Backend = tuple[Callable[..., torch.Tensor], Callable[[int, int, torch.device], Any]]


def _device(device_type: str, index: int | None) -> torch.device:
    return torch.device(device_type) if index is None else torch.device(device_type, index)


@functools.lru_cache
def choose_backend(device_type: str, device_index: int | None, dtype: torch.dtype) -> Backend:
    """(attend, make_mask) of the first backend whose probe launch, forward and backward, succeeds on this device."""
    candidates: list[tuple[str, Backend]] = []
    if device_type == "cuda" and dtype in (torch.bfloat16, torch.float16):
        candidates.append(("fa3", (attend_fa3, no_mask)))
    if device_type == "cuda":
        candidates.append(("flex", (attend_flex, flex_mask)))
    for name, backend in candidates:
        try:
            _probe(backend, _device(device_type, device_index), dtype)
        except Exception as error:  # whatever a foreign kernel throws, the answer is the next backend
            logger.info("attention backend %s is not usable here: %s", name, str(error).splitlines()[0][:200])
            continue
        return backend
    return attend_plain, plain_mask


def _probe(backend: Backend, device: torch.device, dtype: torch.dtype) -> None:
    """Run forward and backward on a small input; a kernel that loads but cannot launch fails here."""
    attend, make_mask = backend
    T, window = 256, 128
    with torch.enable_grad():
        q, k, v = (F.rms_norm(torch.randn(1, T, 2, 64, device=device), (64,)).to(dtype).requires_grad_() for _ in range(3))
        expected = attend_plain(q, k, v, AttentionPlan(attend_plain, window, plain_mask(T, window, device)))
        result = attend(q, k, v, AttentionPlan(attend, window, make_mask(T, window, device)))
        result.sum().backward()
        torch.cuda.synchronize(device)
    difference = (result - expected).abs().max().item()
    if not difference < 0.05:
        raise RuntimeError(f"its result is off by {difference:.3g}")


# ----------------------------------------------------------------------------- plain PyTorch


def plain_mask(T: int, window: int, device: torch.device) -> list[torch.Tensor] | None:
    """What `attend_plain` adds to the scores of each block of queries, float32: 0 where a query sees a key, else -inf.

    Each (queries, keys), where the keys are the last that the block can see. None where PyTorch's kernel does it all.
    """
    if window >= T - 1 and (device.type != "cpu" or T > LONGEST_PLAIN_CONTEXT):
        return None
    block = max(SMALLEST_BLOCK, -(-T // MOST_BLOCKS))
    masks = []
    for start in range(0, T, block):
        query, first = torch.arange(start, min(start + block, T)), max(0, start - window)
        distance = query[:, None] - torch.arange(first, int(query[-1]) + 1)
        masks.append(torch.where((distance >= 0) & (distance <= window), 0.0, float("-inf")).to(device))
    return masks


def attend_plain(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, plan: AttentionPlan) -> torch.Tensor:
    """Attention by matrix products, a block of queries at a time; see `plan_attention`."""
    q, k, v = (x.transpose(1, 2) for x in (q, repeat_kv(k, q.size(2)), repeat_kv(v, q.size(2))))
    if plan.mask is None:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)
    results, end = [], 0
    for mask in plan.mask:
        start, end = end, end + mask.size(0)
        seen = slice(end - mask.size(1), end)
        results.append(_softmax_product(q[:, :, start:end], k[:, :, seen], v[:, :, seen], mask))
    return torch.cat(results, dim=2).transpose(1, 2)


def attend_masked(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, plan: AttentionPlan) -> torch.Tensor:
    """Attention with a mask for each row, (B, 1, T, T) in q's dtype, added to the scores; see `plan_attention`."""
    q, k, v = (x.transpose(1, 2) for x in (q, repeat_kv(k, q.size(2)), repeat_kv(v, q.size(2))))
    if q.device.type == "cpu" and q.size(2) <= LONGEST_PLAIN_CONTEXT // 2:  # all T * T scores
        return _softmax_product(q, k, v, plan.mask).transpose(1, 2)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=plan.mask).transpose(1, 2)


def _softmax_product(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """softmax(q k^T / sqrt(D) + mask) v, for q (..., Tq, D) and k, v (..., Tk, D).

    No maximum is looked for: lengths are bounded, so scores are, and subtracting their bound is as safe. The division
    by the sum comes after the product with v, on D columns instead of Tk. Both halve the time of this on a CPU.
    """
    D = q.size(-1)
    scores = (q @ k.transpose(-1, -2)).float() * D**-0.5 + mask
    exponentials = torch.exp(scores - QK_SCALE**2 * D**0.5)
    return ((exponentials.to(v.dtype) @ v) / exponentials.sum(dim=-1, keepdim=True)).to(q.dtype)


def repeat_kv(x: torch.Tensor, num_heads: int) -> torch.Tensor:
    """(B, T, KV, D) -> (B, T, num_heads, D): every key/value head serves num_heads / KV query heads."""
    repeats = num_heads // x.size(2)
    return x if repeats == 1 else x.repeat_interleave(repeats, dim=2)


# ----------------------------------------------------------------------------- CUDA kernels


def flex_mask(T: int, window: int, device: torch.device) -> Any:
    """FlexAttention's block mask: which blocks of the score matrix are empty, full or cut by the window's edge."""
    from torch.nn.attention.flex_attention import create_block_mask

    def visible(batch: object, head: object, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        return (query >= key) & (query - key <= window)

    return create_block_mask(visible, B=None, H=None, Q_LEN=T, KV_LEN=T, device=device)


def attend_flex(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, plan: AttentionPlan) -> torch.Tensor:
    """FlexAttention: a compiled kernel that skips the blocks outside the window; see `plan_attention`."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    enable_gqa = q.size(1) != k.size(1)
    return _compiled_flex()(q, k, v, block_mask=plan.mask, enable_gqa=enable_gqa).transpose(1, 2)


@functools.lru_cache
def _compiled_flex() -> Callable[..., torch.Tensor]:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


def no_mask(T: int, window: int, device: torch.device) -> None:
    """FlashAttention takes the window as a number."""


def attend_fa3(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, plan: AttentionPlan) -> torch.Tensor:
    """FlashAttention 3; see `plan_attention`."""
    left = -1 if plan.window >= q.size(1) - 1 else plan.window
    flash_attn_func = importlib.import_module("flash_attn_interface").flash_attn_func
    result = flash_attn_func(q, k, v, causal=True, window_size=(left, 0))
    return result[0] if isinstance(result, tuple) else result

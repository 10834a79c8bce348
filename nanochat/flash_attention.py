"""Causal attention with sliding windows, on any hardware. Used by gpt.py, kv_cache.py, core_eval.py, memory.py and doctor.py.

`plan_attention` chooses the fastest backend that passes a probe launch, once for each device, dtype and head size, for texts
of one shape or of many, and makes the mask that it needs. The hot path then only runs `plan.backend(q, k, v, plan)`.
NANOCHAT_ATTENTION names another one. The backends:

- "fa4": FlashAttention 4, where `flash_attn.cute` is installed (the package flash-attn-4)
- "flex": FlexAttention compiled to a Triton kernel (CUDA, texts of one shape); skips the masked blocks. On Hopper and later,
  layers that see everything use cuDNN
- "fa3": FlashAttention 3, where `flash_attn_interface` is installed and the others do not run: with a window, deterministic
  gradients take it twice as long as FlashAttention 4 (dev/LOG.md, "A fourth time on an H200")
- "plain": matrix products of blocks of queries with the blocks of keys that they can see, so that causality and windows
  save time on any device; whole-context layers (on a CPU only beyond LONGEST_PLAIN_CONTEXT) use PyTorch's
  scaled_dot_product_attention

To add a backend, list it in `list_backends`. This module is for whole texts, above all in training; generation attends in
kv_cache.py.
"""

from __future__ import annotations

import functools
import importlib
import math
import os
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F

from nanochat.common import NanochatError, first_line, logger
from nanochat.devices import synchronize

QK_SCALE = 1.2  # the length that gpt.py gives to each normalized query and key, in units of sqrt(head_dim)
LOG2_E = math.log2(math.e)
LONGEST_PLAIN_CONTEXT = 2048  # beyond it, storing the T * T / 2 scores of a whole-context layer does not pay
FLEX_SHAPES = 64  # kernels in a process: two windows for each number of rows that is tried, and more to spare
SMALLEST_BLOCK, MOST_BLOCKS = 128, 8  # of a text in `attend_plain`: smaller blocks save nothing more


class Attention(Protocol):
    """Where a layer's queries find their keys: in the text itself (AttentionPlan) or in a cache (kv_cache.py)."""

    def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: int) -> torch.Tensor:
        """q: (B, T, H, D); k, v: (B, T, KV, D) of the same tokens, each of which sees itself and `window` before it.

        Returns (B, T, H, D).
        """
        ...


class AttentionPlan(NamedTuple):
    """How sequences of one length attend: a backend, the window, and the mask in that backend's own form."""

    backend: Callable[..., torch.Tensor]
    window: int
    mask: Any
    compiled: bool = False  # compile its kernels separately: on a CPU, a compiled model's graphs leave out attention

    def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: int) -> torch.Tensor:
        """See Attention; `window` must be the one that this was planned for."""
        return self.backend(q, k, v, self)

    def block_size(self, T: int) -> int | None:
        """Tokens in a block if `attend_plain` takes texts of T tokens in blocks (see `lay_out`); None: uncut."""
        if not self.compiled or self.backend is not attend_plain or self.mask is None:
            return None
        size: int = self.mask[0].size(0)
        return size if T % size == 0 else None


def plan_attention(
    T: int,
    window: int,
    device: torch.device,
    dtype: torch.dtype,
    compiled: bool = False,
    head_dim: int = 128,
    fixed_shape: bool = False,
) -> AttentionPlan:
    """The plan for causal attention over T tokens, each seeing itself and the `window` tokens before it.

    Its `backend(q, k, v, plan)` takes q: (B, T, H, D) and k, v: (B, T, KV, D) with H a multiple of KV, queries and keys
    of length at most QK_SCALE * sqrt(D) each, and returns (B, T, H, D) in q's dtype. Plans are cached: asking for one
    costs a dictionary look-up. compiled: for a model whose blocks are compiled (see GPT.compile); head_dim: D, since not
    every backend takes every size; fixed_shape: batches always have one shape, so a kernel may be specialized for it.
    """
    return _plan(T, min(window, T), device, dtype, compiled, head_dim, compiled or fixed_shape)


@functools.lru_cache(maxsize=256)
def _plan(
    T: int, window: int, device: torch.device, dtype: torch.dtype, compiled: bool, head_dim: int, fixed_shape: bool
) -> AttentionPlan:
    backend = choose_backend(device, dtype, head_dim, fixed_shape)
    own_kernels = compiled and device.type == "cpu" and dtype != torch.float16
    with torch.inference_mode(False):  # training may use masks that were made while generating
        return AttentionPlan(backend.attend, window, backend.make_mask(T, window, device), own_kernels)


class Backend(NamedTuple):
    """A way to attend: `attend(q, k, v, plan)`, where plan.mask is what `make_mask(T, window, device)` returns."""

    name: str
    attend: Callable[..., torch.Tensor]
    make_mask: Callable[[int, int, torch.device], Any]


def list_backends(device: torch.device, dtype: torch.dtype, fixed_shape: bool) -> list[Backend]:
    """Backends that may be faster than "plain" here, the fastest first; does not try them. See NANOCHAT_ATTENTION."""
    found: list[Backend] = []
    # In evaluations and RL, shapes keep changing: FlexAttention would be compiled for each of the first eight, and then
    # write all scores to memory.
    # Before Ampere, Triton multiplies without tensor cores.
    if device.type == "cuda" and fixed_shape and torch.cuda.get_device_capability(device) >= (8, 0):
        found.append(Backend("flex", attend_flex, flex_mask))
    if device.type == "cuda" and dtype in (torch.bfloat16, torch.float16):
        # Both packages bring their own kernels. Wrapped here because importing the compiler would cost every command a
        # second.
        fa4, fa3 = (torch.compiler.disable(attend) for attend in (attend_fa4, attend_fa3))
        found = [Backend("fa4", fa4, no_mask), *found, Backend("fa3", fa3, no_mask)]
    return [backend for backend in found if asked_backend() in (None, backend.name)]


def asked_backend() -> str | None:
    """NANOCHAT_ATTENTION, the only backend that may be used where all texts have one shape; None: the best."""
    return os.environ.get("NANOCHAT_ATTENTION") or None


@functools.lru_cache
def choose_backend(device: torch.device, dtype: torch.dtype, head_dim: int, fixed_shape: bool) -> Backend:
    """The first backend whose probe launch, forward and backward, succeeds on this device.

    Raises NanochatError if that of NANOCHAT_ATTENTION does not.
    """
    reason = ""
    for backend in list_backends(device, dtype, fixed_shape):
        try:
            _probe(backend, device, dtype, head_dim)
            return backend
        except Exception as error:  # whatever a foreign kernel raises, try the next backend
            reason = first_line(error)[:200]
            if not isinstance(error, ModuleNotFoundError):  # most machines lack FlashAttention: not worth a line
                logger.info("attention backend %s is not usable here: %s", backend.name, reason)
    asked = asked_backend()
    if asked not in (None, "plain") and (reason or not list_backends(device, dtype, fixed_shape=True)):
        reason = reason or f"nothing of that name can run on {device.type} in {str(dtype).removeprefix('torch.')}"
        raise NanochatError(f"NANOCHAT_ATTENTION={asked} cannot be used ({reason}): unset it, or set it to plain")
    return Backend("plain", attend_plain, plain_mask)


def _probe(backend: Backend, device: torch.device, dtype: torch.dtype, head_dim: int) -> None:
    """Run forward and backward on a small input; a kernel that loads but cannot launch fails here."""
    T, D = 256, head_dim
    for window in (128, T):
        with torch.enable_grad():
            q, k, v = (F.rms_norm(torch.randn(1, T, 2, D, device=device), (D,)).to(dtype).requires_grad_() for _ in range(3))
            expected = attend_plain(q, k, v, AttentionPlan(attend_plain, window, plain_mask(T, window, device)))
            plan = AttentionPlan(backend.attend, window, backend.make_mask(T, window, device))
            result = backend.attend(q, k, v, plan)
            result.sum().backward()
            synchronize(device)
        difference = (result - expected).abs().max().item()
        if not difference < 0.05:
            raise RuntimeError(f"its result is off by {difference:.3g}")


# ----------------------------------------------------------------------------- plain PyTorch


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
    """Attention by matrix products of blocks; see `plan_attention`. q, k, v may already be laid out (see `lay_out`)."""
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
    """Attention with a mask for each row, (B, 1, T, T) in q's dtype, added to the scores; see `plan_attention`."""
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


# ----------------------------------------------------------------------------- CUDA kernels


def flex_mask(T: int, window: int, device: torch.device) -> Any:
    """FlexAttention's block mask: which blocks of the score matrix are empty, full or cut by the window's edge.

    None where a layer sees everything and cuDNN's kernel is faster (dev/LOG.md, "On an H200").
    """
    from torch.nn.attention.flex_attention import create_block_mask

    if window >= T - 1 and torch.cuda.get_device_capability(device) >= (9, 0) and torch.backends.cudnn.is_available():
        return None

    def visible(batch: object, head: object, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        return (query >= key) & (query - key <= window)

    return create_block_mask(visible, B=None, H=None, Q_LEN=T, KV_LEN=T, device=device)


def attend_flex(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, plan: AttentionPlan) -> torch.Tensor:
    """FlexAttention: a compiled kernel that skips blocks outside the window; see `plan_attention`."""
    if plan.mask is None:
        return _attend_whole(q, k, v)
    from torch.nn.attention.flex_attention import flex_attention

    flex: Any = flex_attention if torch.compiler.is_compiling() else _compiled_flex()
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return flex(q, k, v, block_mask=plan.mask, enable_gqa=q.size(1) != k.size(1)).transpose(1, 2)


def _attend_whole(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Causal attention without a window, with the first of these kernels that accepts the tensors."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    q, k, v = heads_first(q, k, v)
    kernels = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    with sdpa_kernel(kernels, set_priority=True):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)


@functools.lru_cache
def _compiled_flex() -> Callable[..., torch.Tensor]:
    """For uncompiled blocks: a kernel for each shape and window, those of the probe and of pace.py's tries included."""
    import torch._dynamo
    from torch.nn.attention.flex_attention import flex_attention

    compiled = torch.compile(flex_attention, dynamic=False)
    # Beyond the compiler's own limit of 8, all scores would be written to memory.
    limited: Callable[..., torch.Tensor] = torch._dynamo.config.patch(recompile_limit=FLEX_SHAPES)(compiled)
    return limited


def no_mask(T: int, window: int, device: torch.device) -> None:
    """FlashAttention takes the window as a number."""


def attend_fa3(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, plan: AttentionPlan) -> torch.Tensor:
    """FlashAttention 3; see `plan_attention`."""
    return _flash_attention("flash_attn_interface", -1, q, k, v, plan)


def attend_fa4(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, plan: AttentionPlan) -> torch.Tensor:
    """FlashAttention 4; see `plan_attention`."""
    return _flash_attention("flash_attn.cute", None, q, k, v, plan)


def _flash_attention(
    module: str, boundless: int | None, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, plan: AttentionPlan
) -> torch.Tensor:
    """Call flash_attn_func, as both packages name it, with deterministic gradients, so that a run can be repeated.

    boundless: the value for a side of the window without a limit.
    """
    window = (boundless, boundless) if plan.window >= q.size(1) - 1 else (plan.window, 0)
    flash_attn_func = importlib.import_module(module).flash_attn_func
    result = flash_attn_func(q, k, v, causal=True, window_size=window, deterministic=True)
    attended: torch.Tensor = result[0] if isinstance(result, tuple) else result
    return attended

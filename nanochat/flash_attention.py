"""Causal attention with sliding windows, on any hardware. Used by gpt.py, core_eval.py, memory.py, stage.py and doctor.py.

`plan_attention` chooses the fastest backend that passes a probe launch, once for each device, dtype and head size, for texts
of one shape or of many, and makes the mask that it needs. The hot path then only runs `plan.backend(q, k, v, plan)`.
NANOCHAT_ATTENTION names another one. The backends:

- "fa4": FlashAttention 4, where `flash_attn.cute` is installed (the package flash-attn-4)
- "flex": FlexAttention compiled to a Triton kernel (CUDA, texts of one shape); skips the masked blocks. On Hopper and later,
  layers that see everything use cuDNN
- "fa3": FlashAttention 3, where `flash_attn_interface` is installed and the others do not run: with a window, deterministic
  gradients take it twice as long as FlashAttention 4 (dev/LOG.md, "A fourth time on an H200")
- "plain": matrix products of blocks, on any device; see block_attention.py

To add a backend, list it in `list_backends`. This module is for whole texts, above all in training; generation attends in
kv_cache.py.
"""

from __future__ import annotations

import functools
import importlib
import os
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F

from nanochat.block_attention import attend_plain, heads_first, plain_mask
from nanochat.common import NanochatError, first_line, logger
from nanochat.devices import synchronize

FLEX_SHAPES = 64  # kernels in a process: two windows for each number of rows that is tried, and more to spare


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
        """Tokens in a block if `attend_plain` takes texts of T tokens in blocks (see block_attention.lay_out); None: uncut."""
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

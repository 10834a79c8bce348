"""Matrix products in 8 bits, twice as fast as bfloat16 on Hopper and later. Used by layers.py, where
stage.py switched it on for `--fp8`.

Each operand has its own scale, so that its largest entry becomes the largest that the format holds. Activations and weights
are e4m3 (3 bits of mantissa), gradients e5m2 (more range); products are summed in higher precision. Master weights stay
float32, optimizer and head are not affected, and neither is a model in `eval()`.
Method: arXiv 2209.05433, with the scale of the current tensor.
"""

from __future__ import annotations

from typing import Any

import torch

from nanochat.common import NanochatError

MULTIPLE = 16  # the kernels need both sides of a matrix to be multiples of this
LOWEST_CAPABILITY = (8, 9)


def enable_fp8(model: torch.nn.Module, device: torch.device) -> int:
    """Multiply every matrix of the blocks whose shape the kernels accept in 8 bits; returns how many there are.

    Raises NanochatError if the device has no such kernels.
    """
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < LOWEST_CAPABILITY:
        raise NanochatError("--fp8 needs a GPU of compute capability 8.9 or later (Ada, Hopper): leave it out here")
    modules = model.get_submodule("blocks").modules()
    chosen: list[Any] = [module for module in modules if isinstance(module, torch.nn.Linear) and is_eligible(module.weight)]
    for module in chosen:
        module.fp8 = True
    return len(chosen)


def is_eligible(weight: torch.Tensor) -> bool:
    return all(size % MULTIPLE == 0 for size in weight.shape)


def fp8_linear(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """x @ weight.T, differentiable: in 8 bits where x (..., in) has a multiple of 16 rows. weight: (out, in) float32."""
    if x.numel() // x.size(-1) % MULTIPLE:  # texts have any length in reinforcement learning
        return torch.nn.functional.linear(x, weight.to(x.dtype))
    return _Fp8Linear.apply(x.reshape(-1, x.size(-1)), weight).view(*x.shape[:-1], weight.size(0))


def quantize(x: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """(x in 8 bits, the scale () float32 that undoes it), computed on the device without synchronizing."""
    largest = torch.finfo(dtype).max
    scale = x.abs().amax().float().clamp(min=1e-12) / largest
    return (x.float() / scale).clamp(-largest, largest).to(dtype), scale


def multiply(
    a: tuple[torch.Tensor, torch.Tensor], b: tuple[torch.Tensor, torch.Tensor], dtype: torch.dtype, fast: bool
) -> torch.Tensor:
    """a @ b.T for quantized a (m, k) and b (n, k), both row-major, as the kernels need.

    fast: sum with fewer bits, good enough for a forward pass.
    """
    return torch._scaled_mm(a[0], b[0].T, scale_a=a[1], scale_b=b[1], out_dtype=dtype, use_fast_accum=fast)


class _Fp8Linear(torch.autograd.Function):
    """Keeps its inputs for the backward pass in 8 bits, too."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        x8, weight8 = quantize(x, torch.float8_e4m3fn), quantize(weight, torch.float8_e4m3fn)
        ctx.save_for_backward(*x8, *weight8)
        ctx.dtypes = x.dtype, weight.dtype
        return multiply(x8, weight8, x.dtype, fast=True)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x, x_scale, weight, weight_scale = ctx.saved_tensors
        x_dtype, weight_dtype = ctx.dtypes
        grad8, grad_scale = quantize(grad, torch.float8_e5m2)
        grad_x = multiply((grad8, grad_scale), (weight.T.contiguous(), weight_scale), x_dtype, fast=False)
        # Sum over tokens in the dtype of activations, as without fp8; the optimizer accumulates in float32.
        grad_weight = multiply((grad8.T.contiguous(), grad_scale), (x.T.contiguous(), x_scale), x_dtype, fast=False)
        return grad_x, grad_weight.to(weight_dtype)

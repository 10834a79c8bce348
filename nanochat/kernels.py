"""Our own GPU kernels, and which of them run on this machine. Used by gpt.py, when a model is compiled for a GPU.

`choose_kernels` is the only place that decides. Attention has backends of its own: flash_attention.list_backends.

To add a kernel, write it in a file of its own, give it a field in Kernels, and use that where gpt.py computes the same
without it. Kernels that may compile wrongly have a `probe`, which returns what they compute and what PyTorch does.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, NamedTuple

import torch

from nanochat.common import first_line, logger

if TYPE_CHECKING:
    from nanochat.cross_entropy import ChunkLoss
    from nanochat.lookup_kernel import Order

AMPERE, HOPPER = (8, 0), (9, 0)
Heads = Callable[..., tuple[torch.Tensor, torch.Tensor, torch.Tensor]]


class Kernels(NamedTuple):
    """Our replacements for PyTorch's operations in training; None: PyTorch's own."""

    chunk_loss: ChunkLoss  # the loss between its matrix products: cross_entropy.chunk_loss
    sort_ids: Callable[[torch.Tensor, int], Order] | None  # for layers.Embedding, which calls look_up with its order
    heads: Heads | None  # queries, keys and values: layers.in_heads
    mlp: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor] | None  # gpt.MLP.forward


@functools.lru_cache
def choose_kernels(device: torch.device, dtype: torch.dtype) -> Kernels:
    """The kernels for this GPU and the dtype of its matrix products."""
    from nanochat import heads_kernel, lookup_kernel, loss_kernel, mlp_kernel  # which need Triton

    capability, has_16_bits = torch.cuda.get_device_capability(device), dtype != torch.float32
    # 32-bit values take more shared memory than some cards have; Ampere's are the oldest tensor cores that Triton supports.
    sorts = has_16_bits and capability >= AMPERE
    # In float32, where `to` has nothing to convert, PyTorch 2.11's compiler loses the gradient of this function.
    fuses_heads = has_16_bits and _is_usable("the kernel of queries' and keys' gradients", heads_kernel.probe, device)
    # GPUs older than Hopper lack the copy engine, newer ones were not measured.
    fuses_mlp = dtype == torch.bfloat16 and capability == HOPPER
    fuses_mlp = fuses_mlp and _is_usable("the kernel of products that square", mlp_kernel.probe, device)
    return Kernels(
        chunk_loss=loss_kernel.chunk_loss,
        sort_ids=lookup_kernel.sort_ids if sorts else None,
        heads=heads_kernel.fused_heads if fuses_heads else None,
        mlp=mlp_kernel.mlp if fuses_mlp else None,
    )


def _is_usable(
    kernel: str, probe: Callable[[torch.device], Iterable[tuple[torch.Tensor, torch.Tensor]]], device: torch.device
) -> bool:
    """Whether a kernel runs on this device with PyTorch's results; the log says why not. probe: returns pairs to compare."""
    try:
        for found, expected in probe(device):
            difference = ((found - expected).norm() / expected.norm()).item()
            if not difference < 0.02:
                raise RuntimeError(f"its result is off by {difference:.3g}")
    except Exception as error:  # whatever the compiler raises, PyTorch's own code is used
        logger.info("%s is not usable here: %s", kernel, first_line(error)[:200])
        return False
    return True

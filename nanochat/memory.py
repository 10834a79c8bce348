"""Computes how much device memory training needs, without a device: python -m nanochat.memory --gb 24 80 141.

It counts parameters, gradients and optimizer state, and finds what a forward pass keeps for the backward pass by running the
model on the meta device, uncompiled, with attention that keeps what a fused kernel keeps. It prints the largest depth that
fits each size. The numbers are computed, not measured: compiled training keeps less. They hold for the default loss and
for an optimizer with default settings; a switch that changes its state changes them.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from nanochat.common import NanochatError, run_command
from nanochat.cross_entropy import GPU_CHUNK_BYTES
from nanochat.flash_attention import AttentionPlan
from nanochat.gpt import GPT, GPTConfig
from nanochat.optim import Group
from nanochat.scaling import config_for_depth, count_params
from nanochat.settings import SettingsParser

RESERVED = 0.08  # of the device, for its context and for gaps
MOST_GB = 10_000  # beyond any device there is; models for more take minutes to count


@dataclass(frozen=True)
class TrainingLayout:
    """How training is laid out: the number of devices, sharded or not, with blocks recomputed or not, and in which dtype."""

    world_size: int = 1
    fsdp: bool = False
    recompute: bool = False
    dtype: torch.dtype = torch.bfloat16


def training_bytes(config: GPTConfig, rows: int = 1, layout: TrainingLayout = TrainingLayout()) -> int:
    """The peak memory of one device, in bytes, for micro-batches of `rows` sequences.

    The peak is in the backward pass, or in the optimizer's step, which copies the matrices of one shape. Recorded passes
    (passes.py) keep their memory, but only if there is room for it twice.
    """
    model = GPT.on_meta(config)
    counts = model.num_scaling_params()
    optimizer = model.setup_optimizer()
    state = optimizer.state_bytes() // layout.world_size
    weights = 8 * counts["total"]  # with their gradients
    if layout.fsdp:
        block = sum(parameter.numel() for parameter in model.blocks[0].parameters())
        # Unsharded at a time: a block and the next in bfloat16, a block's gradient, and everything outside blocks. That
        # includes all tables: FSDP2 reshards modules without differentiable inputs only after the backward pass.
        whole = counts["total"] - counts["matrices"]
        weights = weights // layout.world_size + (2 * 2 + 4) * block + 8 * whole
    passes = activation_bytes(config, rows, layout.recompute, layout.dtype) + loss_bytes(config, rows)
    return weights + state + max(passes, step_bytes(optimizer.groups, layout))


def step_bytes(groups: Sequence[Group], layout: TrainingLayout) -> int:
    """Roughly the bytes that an update takes on each device, besides weights, gradients and optimizer state."""
    matrices = [sum(p.numel() for p in group.params) for group in groups if group.kind == "muon"]
    others = [p.numel() for group in groups if group.kind != "muon" for p in group.params]
    n = layout.world_size
    copies = 4 * sum(matrices)  # of gradients, stacked by their shapes
    if layout.fsdp:
        copies = 2 * copies // n  # sent and received
    elif n > 1:
        copies += copies // n + 4 * sum(others)  # all are in flight at once, matrices from a rank's own stack
    # At a time: for the matrices of one shape, their updates, a stack of them, and the product of both for weight decay
    # (updates.apply_update; orthogonalizing takes no more); or the update of one table.
    return copies + max(12 * max(matrices, default=0), 4 * max(others, default=0)) // n


def loss_bytes(config: GPTConfig, rows: int) -> int:
    """A chunk of logits and its gradient in bfloat16, and the gradient of the head in float32."""
    chunk = min(GPU_CHUNK_BYTES, 4 * config.vocab_size * rows * config.sequence_len)
    return chunk + 4 * config.vocab_size * config.n_embd


class _FusedAttention(torch.autograd.Function):
    """Keeps what a fused kernel keeps: its inputs, its output, and one number per query and head."""

    @staticmethod
    def forward(ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        out = torch.empty_like(q)
        ctx.save_for_backward(q, k, v, out, q.new_empty(q.shape[:3], dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> None:
        raise NotImplementedError("the meta device only counts what is kept")


def activation_bytes(config: GPTConfig, rows: int, recompute: bool = False, dtype: torch.dtype = torch.bfloat16) -> int:
    """Bytes that a forward pass over `rows` full sequences keeps for the backward pass, without the loss."""
    everything = _kept_bytes(config, rows, dtype)
    if not recompute:
        return everything
    kv_dim = config.n_kv_head * config.head_dim
    embeddings = sum(config.has_value_embedding(layer) for layer in range(config.n_layer)) * kv_dim
    inputs = dtype.itemsize * rows * config.sequence_len * (config.n_embd * (config.n_layer + 2) + embeddings)
    return inputs + everything // config.n_layer  # the inputs of all blocks, and the inside of one


@functools.lru_cache
def _kept_bytes(config: GPTConfig, rows: int, dtype: torch.dtype) -> int:
    """Counted on two layers, one with a value embedding and one without: all other pairs keep the same."""
    if config.n_layer > 4 and config.n_layer % 2 == 0:
        one_pair, two_pairs = (_kept_bytes(replace(config, n_layer=n), rows, dtype) for n in (2, 4))
        return one_pair + (config.n_layer // 2 - 1) * (two_pairs - one_pair)
    return _count_kept_bytes(config, rows, dtype)


def _count_kept_bytes(config: GPTConfig, rows: int, dtype: torch.dtype) -> int:
    model, idx = GPT.on_meta(config), torch.zeros(rows, config.sequence_len, dtype=torch.long, device="meta")
    model.compute_dtype = dtype
    weights = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}  # a tensor that is kept twice counts once

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            kept[storage._cdata] = storage
        return tensor

    plan = AttentionPlan(lambda q, k, v, plan: _FusedAttention.apply(q, k, v), config.sequence_len, None)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model.trunk(idx, model.rotary(None, config.sequence_len), [plan] * config.n_layer)
    return sum(storage.nbytes() for storage in kept.values())


def largest_depth(budget: float, sequence_len: int, vocab_size: int, rows: int, layout: TrainingLayout) -> int:
    """The largest even depth whose training fits `budget` bytes on each device; 0 if none does."""

    def fits(depth: int) -> bool:
        return training_bytes(config_for_depth(depth, vocab_size, sequence_len), rows, layout) <= budget

    low, high = 0, 2
    while fits(high):
        low, high = high, 2 * high
    while high - low > 2:
        middle = (low + high) // 4 * 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def main(argv: list[str] | None = None) -> int:
    parser = SettingsParser(
        "The largest depth that trains on devices of some size.", examples=["%(prog)s --gb 24 80 --max-seq-len 4096"]
    )
    parser.add_argument("--gb", type=float, nargs="+", default=[24.0, 80.0, 141.0],
                        help="memory of a device, 10^9 bytes (default: 24 80 141)")  # fmt: skip
    parser.add_argument("--world-size", type=int, default=8, help="devices, for the rows with several")
    parser.add_argument("--max-seq-len", type=int, default=2048, help="context length")
    parser.add_argument("--vocab-size", type=int, default=32768, help="tokens")
    parser.add_argument("--rows", type=int, default=1, help="sequences in a micro-batch")
    args = parser.parse_args(argv)
    args.require_positive("world_size", "max_seq_len", "vocab_size", "rows")
    for size in args.gb:
        if not 0 < size <= MOST_GB:
            raise NanochatError(f"--gb {size:g} is not a plausible size: choose above 0 and at most {MOST_GB:,}")
    n = args.world_size
    layouts = {
        "1 device": TrainingLayout(),
        "1 device, --activation-checkpointing": TrainingLayout(recompute=True),
        f"{n} devices, --activation-checkpointing": TrainingLayout(n, recompute=True),
        f"{n} devices, --fsdp": TrainingLayout(n, fsdp=True),
        f"{n} devices, --fsdp --activation-checkpointing": TrainingLayout(n, fsdp=True, recompute=True),
    }
    print(f"largest --depth, {args.rows} x {args.max_seq_len} tokens at a time, {args.vocab_size} words (parameters)")
    for name, layout in layouts.items():
        cells = []
        for size in args.gb:
            budget = (1 - RESERVED) * size * 1e9
            depth = largest_depth(budget, args.max_seq_len, args.vocab_size, args.rows, layout)
            count = count_params(config_for_depth(depth, args.vocab_size))["total"] if depth else 0
            fits = f"d{depth} ({count / 1e9:.1f}B)" if depth else "none"
            cells.append(f"{size:g} GB: {fits:<11}")
        print(f"{name:<48} {'   '.join(cells)}".rstrip())
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))

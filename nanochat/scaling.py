"""What `--depth` implies: width, heads, horizon, batch size, learning rates, weight decay.

Used by scripts/base_train and chat_sft, pace.py, memory.py and doctor.py. The rules are anchored at a depth
of 12 with a batch of 2^19 tokens, where the peak learning rates of optim.OptimizerSettings were tuned, and carried to
other sizes by

- batch size proportional to (training tokens)^0.383 above it (Power Lines, arXiv 2505.13738), and below it to
  (training tokens)^0.79, which meets what small models learn most from (dev/LOG.md, "Batches of small models"),
- learning rates proportional to (batch size)^1/10: the square root that is often given starves small batches here
  (dev/LOG.md, "Learning rates at a small batch" and "Rates and decay of short runs"),
- weight decay proportional to (batch size)^9/10 / (training tokens), which with such learning rates keeps the decay's
  time scale a constant share of the run (arXiv 2405.13698).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from nanochat.common import NanochatError
from nanochat.gpt import GPT, GPTConfig

BIGRAM_ROWS = 2**16  # twice as many: 0.01 bits per byte less at depth 4 (dev/LOG.md, "What small models learn from")
REFERENCE_DEPTH = 12
REFERENCE_BATCH = 2**19
TOKENS_PER_PARAM = 12.0  # training tokens for each scaling parameter
FEW_TOKENS_PER_PARAM, EXPAND_AT = 2.0, 0.85  # with fewer than these, the last block learns alone so long
MOST_PASSES = 2.0  # over its text: a run that would read it more often that way learns it by heart
BATCH_EXPONENT, SMALL_BATCH_EXPONENT = 0.383, 0.79  # above and below the reference
LR_BATCH_EXPONENT = 1 / 10


def model_config(
    depth: int,
    vocab_size: int,
    sequence_len: int = 2048,
    aspect_ratio: int = 64,
    head_dim: int = 128,
    window_pattern: str = "SSSL",
    num_kv_heads: int | None = None,
) -> GPTConfig:
    """The model of a given depth: depth * aspect_ratio channels, rounded up to whole heads of head_dim.

    The table of pairs of tokens has about BIGRAM_ROWS rows, of 2 to 16 vocabularies.
    """
    if depth < 1:
        raise NanochatError(f"depth {depth} is no depth: choose 1 or more")
    if head_dim < 8 or head_dim % 8:
        raise NanochatError(f"head_dim {head_dim} is not a multiple of 8: choose for example 64 or 128")
    n_head = -(-depth * aspect_ratio // head_dim)
    return GPTConfig(
        sequence_len=sequence_len,
        vocab_size=vocab_size,
        n_layer=depth,
        n_head=n_head,
        n_kv_head=num_kv_heads or n_head,
        n_embd=n_head * head_dim,
        window_pattern=window_pattern,
        bigrams=min(16, max(2, round(BIGRAM_ROWS / vocab_size))),
    )


def count_params(config: GPTConfig) -> dict[str, int]:
    """GPT.num_scaling_params without memory for a single weight."""
    with torch.device("meta"):
        return GPT(config).num_scaling_params()


@dataclass(frozen=True)
class Horizon:
    """How long to train, in what steps, and what that does to the optimizer."""

    num_iterations: int
    total_batch_size: int  # tokens
    lr_scale: float  # on every peak learning rate
    weight_decay_scale: float

    @property
    def tokens(self) -> int:
        return self.num_iterations * self.total_batch_size


def plan_horizon(
    config: GPTConfig,
    flops_per_token: float,
    num_iterations: int = -1,
    target_flops: float = -1,
    tokens_per_param: float = TOKENS_PER_PARAM,
    total_batch_size: int = -1,
    least_batch_size: int = 0,
    batch_multiple: int = 1,
) -> Horizon:
    """The training run that suits a model; the first positive of num_iterations, target_flops, tokens_per_param rules.

    Batch size, of least_batch_size or more and a multiple of batch_multiple (what all ranks go through at a time), and scales
    follow from the tokens of target_flops or tokens_per_param.
    num_iterations changes neither, so that a short trial behaves like the start of the real run.
    """
    reference = model_config(REFERENCE_DEPTH, config.vocab_size, config.sequence_len)
    if target_flops > 0:
        target_tokens = target_flops / flops_per_token
    else:
        target_tokens = (tokens_per_param if tokens_per_param > 0 else TOKENS_PER_PARAM) * count_params(config)["scaling"]
    reference_tokens = TOKENS_PER_PARAM * count_params(reference)["scaling"]
    if total_batch_size <= 0:
        share = target_tokens / reference_tokens
        ideal = REFERENCE_BATCH * share ** (BATCH_EXPONENT if share > 1 else SMALL_BATCH_EXPONENT)
        total_batch_size = fit_batch(max(ideal, least_batch_size, config.sequence_len), batch_multiple)
    if num_iterations <= 0:
        if target_flops > 0 or tokens_per_param > 0:
            num_iterations = round(target_tokens / total_batch_size)
        else:
            raise NanochatError("no horizon: give --num-iterations, --target-flops or --target-param-data-ratio above 0")
    decay_scale = (total_batch_size / REFERENCE_BATCH) ** (1 - LR_BATCH_EXPONENT) * reference_tokens / target_tokens
    return Horizon(max(1, num_iterations), total_batch_size, learning_rate_scale(total_batch_size), decay_scale)


def fit_batch(tokens: float, multiple: int) -> int:
    """The batch nearest to so many tokens that is a multiple times a power of two: micro-batches of many sizes divide it."""
    return multiple * 2 ** max(0, round(math.log2(tokens / multiple)))


def expansion_share(tokens_per_param: float) -> float:
    """The share of a run's updates in which its last block learns alone, where a budget is what limits the run.

    tokens_per_param: how many tokens the budget would give each parameter of the whole model. Where that is less than two,
    a small model learns more in the time, and the other blocks join late; elsewhere what that block learned alone stands
    in their way. Method: arXiv 2511.04981; numbers: dev/LOG.md, "The last block first".
    """
    return EXPAND_AT if tokens_per_param < FEW_TOKENS_PER_PARAM else 0.0


def learning_rate_scale(total_batch_size: int) -> float:
    """What to multiply the peak learning rates by for a batch of so many tokens."""
    return (total_batch_size / REFERENCE_BATCH) ** LR_BATCH_EXPONENT


def accumulation_steps(total_batch_size: int, device_batch_size: int, sequence_len: int, world_size: int) -> int:
    """Micro-batches a rank goes through for one update. Raises NanochatError with the nearest batch sizes that fit."""
    tokens_per_pass = device_batch_size * sequence_len * world_size
    if total_batch_size % tokens_per_pass == 0 and total_batch_size > 0:
        return total_batch_size // tokens_per_pass
    below = total_batch_size // tokens_per_pass * tokens_per_pass
    nearest = [str(size) for size in (below, below + tokens_per_pass) if size > 0]
    raise NanochatError(
        f"--total-batch-size {total_batch_size} is not a multiple of {tokens_per_pass} tokens (--device-batch-size "
        f"{device_batch_size} x --max-seq-len {sequence_len} x {world_size} ranks); nearest: {', '.join(nearest)}"
    )


def default_device_batch_size(total_batch_size: int, sequence_len: int, world_size: int, most_tokens: int) -> int:
    """The largest batch of rows that divides the total batch and stays within most_tokens on one device."""
    rows = total_batch_size // (sequence_len * world_size)
    fitting = [n for n in range(1, rows + 1) if rows % n == 0 and n * sequence_len <= most_tokens]
    return max(fitting, default=1)

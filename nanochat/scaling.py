"""What `--depth` implies: width, heads, horizon, batch size, learning rates, weight decay.

Used by scripts/base_train and chat_sft, pace.py, memory.py and doctor.py. The rules start from depth 12 with a batch of
2^19 tokens, where the peak learning rates of optim.OptimizerSettings were tuned. For other sizes,

- batch size is proportional to (training tokens)^0.383 above that point (Power Lines, arXiv 2505.13738) and to
  (training tokens)^0.79 below it, which fits the best batches of small models (dev/LOG.md, "Batches of small models"),
- learning rates are proportional to (batch size)^1/10: the usual square root makes them too low for small batches here
  (dev/LOG.md, "Learning rates at a small batch" and "Rates and decay of short runs"),
- weight decay is proportional to (batch size)^9/10 / (training tokens), which with such learning rates keeps the decay's
  time scale a constant share of the run (arXiv 2405.13698).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from nanochat.common import NanochatError
from nanochat.gpt import GPT, GPTConfig

BIGRAM_ROWS = 2**16  # twice as many would save 0.01 bits per byte at depth 4 (dev/LOG.md, "What small models learn from")
REFERENCE_DEPTH = 12
REFERENCE_BATCH = 2**19
TOKENS_PER_PARAM = 12.0  # training tokens for each scaling parameter
FEW_TOKENS_PER_PARAM, EXPAND_AT = 2.0, 0.85  # with fewer tokens, only the last block learns for this share of the run
MOST_EPOCHS = 2.0  # of the text; training only the last block for more would memorize the text
BATCH_EXPONENT, SMALL_BATCH_EXPONENT = 0.383, 0.79  # above and below the reference
LR_BATCH_EXPONENT = 1 / 10


def config_for_depth(
    depth: int,
    vocab_size: int,
    sequence_len: int = 2048,
    aspect_ratio: int = 64,
    head_dim: int = 128,
    window_pattern: str = "SSSL",
    num_kv_heads: int | None = None,
) -> GPTConfig:
    """The model of a given depth: depth * aspect_ratio channels, rounded up to whole heads of head_dim.

    The bigram table has about BIGRAM_ROWS rows, but at least 2 and at most 16 times the vocabulary size.
    """
    if depth < 1:
        raise NanochatError(f"depth {depth} is too small: choose 1 or more")
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
    """GPT.num_scaling_params, without allocating any weights."""
    return GPT.on_meta(config).num_scaling_params()


@dataclass(frozen=True)
class Horizon:
    """How long to train, in what batches, and how that scales the optimizer's settings."""

    num_iterations: int
    total_batch_size: int  # tokens
    lr_scale: float  # multiplies every peak learning rate
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
    """The training run that suits a model; the first positive of num_iterations, target_flops, tokens_per_param decides.

    Batch size and scales follow from the tokens of target_flops or tokens_per_param. num_iterations changes neither, so
    that a short trial behaves like the start of the real run. The batch has at least least_batch_size tokens and is a
    multiple of batch_multiple (the tokens that all ranks process at a time).
    """
    reference = config_for_depth(REFERENCE_DEPTH, config.vocab_size, config.sequence_len)
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
            raise NanochatError(
                "no horizon: give --num-iterations, --target-minutes, --target-flops or --target-param-data-ratio above 0"
            )
    decay_scale = (total_batch_size / REFERENCE_BATCH) ** (1 - LR_BATCH_EXPONENT) * reference_tokens / target_tokens
    return Horizon(max(1, num_iterations), total_batch_size, learning_rate_scale(total_batch_size), decay_scale)


def fit_batch(tokens: float, multiple: int) -> int:
    """The batch nearest to `tokens` of the form multiple * 2^n, so that micro-batches of many sizes divide it."""
    return multiple * 2 ** max(0, round(math.log2(tokens / multiple)))


def expansion_share(tokens_per_param: float) -> float:
    """The share of updates in which only the last block learns, in a run limited by a budget of time.

    tokens_per_param: the tokens that the budget gives each parameter of the whole model. With fewer than two, a small model
    learns more in that time, and the other blocks join late. With more, what the last block learned by itself holds the
    others back. Method: arXiv 2511.04981; numbers: dev/LOG.md, "The last block first".
    """
    return EXPAND_AT if tokens_per_param < FEW_TOKENS_PER_PARAM else 0.0


def learning_rate_scale(total_batch_size: int) -> float:
    """The factor for the peak learning rates at this batch size in tokens."""
    return (total_batch_size / REFERENCE_BATCH) ** LR_BATCH_EXPONENT


def accumulation_steps(total_batch_size: int, device_batch_size: int, sequence_len: int, world_size: int) -> int:
    """Micro-batches per rank in one update. Raises NanochatError with the nearest batch sizes that fit."""
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
    """The most rows that divide the total batch and stay within most_tokens on one device."""
    rows = total_batch_size // (sequence_len * world_size)
    fitting = [n for n in range(1, rows + 1) if rows % n == 0 and n * sequence_len <= most_tokens]
    return max(fitting, default=1)

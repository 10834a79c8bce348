"""Planning: batches that divide, decay that does not overshoot, and what memory the optimizer takes."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from nanochat.common import NanochatError
from nanochat.scaling import config_for_depth, default_device_batch_size, fit_batch, plan_horizon
from scripts.base_train import peak_weight_decay


@pytest.mark.parametrize("world_size", [1, 3, 6, 7, 8])
@pytest.mark.parametrize("sequence_len", [768, 1000, 2048])
def test_batches_divide_into_micro_batches(sequence_len: int, world_size: int) -> None:
    """For any context and number of ranks: a rank's rows are no prime number, of which one at a time would be left."""
    config = config_for_depth(12, 32768, sequence_len)
    total = plan_horizon(config, 1, batch_multiple=sequence_len * world_size).total_batch_size
    assert total % (sequence_len * world_size) == 0
    for most in (2**17, 2**15, 2**13):  # tokens that a device takes
        rows = default_device_batch_size(total, sequence_len, world_size, most)
        assert total % (rows * sequence_len * world_size) == 0
        assert rows * sequence_len <= most
        assert most / 2 < rows * sequence_len or rows * sequence_len * world_size == total


def test_a_batch_fits_what_is_gone_through_at_a_time() -> None:
    assert [fit_batch(tokens, 100) for tokens in (1, 100, 149, 300, 550, 800)] == [100, 100, 200, 400, 400, 800]


def test_a_few_updates_do_not_decay_more_than_there_is() -> None:
    """What decays in an update stays a small share of a matrix; in a usual run the rule says how much."""
    config = config_for_depth(12, 32768)
    args = SimpleNamespace(weight_decay=0.2, matrix_lr=0.02)
    for updates in (1, 2, 5, 20, 5000):
        horizon = plan_horizon(config, 1, target_flops=updates * 2.0**19, total_batch_size=2**19)
        assert horizon.num_iterations == updates
        decayed = peak_weight_decay(args, horizon) * args.matrix_lr * horizon.lr_scale
        assert 0 < decayed <= 0.125
    assert peak_weight_decay(args, horizon) == pytest.approx(0.2 * horizon.weight_decay_scale)


def test_the_smallest_plans() -> None:
    assert config_for_depth(4, 200_000).bigrams == 2
    assert plan_horizon(config_for_depth(4, 512), 1e6, target_flops=1.0, tokens_per_param=0).num_iterations == 1
    assert default_device_batch_size(512, 2048, 1, 9) == 1  # a row that is longer than the batch, and than what fits
    assert plan_horizon(config_for_depth(4, 512), 1, num_iterations=1).num_iterations == 1


def test_batches_grow_with_the_tokens_and_faster_where_these_are_few() -> None:
    """Around the reference of 12 tokens for each parameter at depth 12: by the power 0.383 above it, 0.79 below."""
    config = config_for_depth(12, 32768)
    sizes = [plan_horizon(config, 1, tokens_per_param=12 * share).total_batch_size for share in (1 / 16, 1 / 4, 1, 4, 16)]
    assert sizes == [2**16, 2**17, 2**19, 2**20, 2**21]


def test_no_model_is_made_of_nothing() -> None:
    with pytest.raises(NanochatError, match="depth 0 is too small"):
        config_for_depth(0, 512)
    for head_dim in (0, 4, 12):
        with pytest.raises(NanochatError, match=f"head_dim {head_dim} is not a multiple of 8"):
            config_for_depth(2, 512, head_dim=head_dim)
    assert config_for_depth(2, 512, head_dim=8).head_dim == 8

"""Plans a run by measuring: how many rows fit on a device, how many updates fit in the time. Then holds it to its time.

Used by the training scripts, stage.py and trainer.py.
"""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Callable
from typing import Any

import torch

from nanochat.common import NanochatError, get_dist_info, print0, seconds_since_start
from nanochat.compilation import try_to_compile
from nanochat.devices import is_out_of_memory
from nanochat.gpt import GPT
from nanochat.machine import expected_mfu, measure_matmul_rate, seconds_of
from nanochat.optim import MuonAdamW
from nanochat.passes import LossFn, Passes, summed_loss
from nanochat.ranks import any_rank, from_rank0, gather_objects
from nanochat.scaling import accumulation_steps, default_device_batch_size
from nanochat.scheduler import MEMORY_SHARE
from nanochat.schedules import Schedule

ANSWER_ROWS = 32  # answers in a micro-batch of reinforcement learning, if they fit
TIME_CHECKS = 16  # of a run by time


def flops_in(model: GPT, minutes: float) -> float:
    """Roughly the floating-point operations that all ranks do in `minutes` of training, to choose a batch size."""
    device, dtype = model.get_device(), model.get_compute_dtype()
    rate = expected_mfu(device, dtype) * from_rank0(measure_matmul_rate(device, dtype))
    return rate * get_dist_info().world_size * 60 * minutes


def batch_worth_an_update(model: GPT, settings: dict[str, Any]) -> int:
    """The batch, in tokens, at which the optimizer's step takes about a fifth of an update's time (a collective call).

    settings: of the optimizer, as far as they decide how long its step takes; see `_idle_optimizer`.
    Where memory is slow compared to matrix products, as with AMX, a smaller batch learns more per token but less per
    second (dev/LOG.md, "Batches where updates are dear").
    """
    device = model.get_device()
    idx = torch.zeros(1, model.config.sequence_len, dtype=torch.long, device=device)
    optimizer = _idle_optimizer(model, settings)
    model(idx, idx).backward()
    seconds = max(gather_objects(min(seconds_of(optimizer.step, device) for _ in range(3))))
    model.zero_grad(set_to_none=True)
    return int(4 * seconds * flops_in(model, 1 / 60) / model.estimate_flops())


def _idle_optimizer(model: GPT, settings: dict[str, Any]) -> MuonAdamW:
    """An optimizer with all rates 0: its steps change nothing, and take as long as real ones with the same weight decay and
    the same other `settings` (of OptimizerSettings).
    """
    return model.setup_optimizer(**settings, matrix_lr=0, embedding_lr=0, unembedding_lr=0, scalar_lr=0)


def steps_in(
    model: GPT,
    minutes: float,
    rows: int,
    total_batch_size: int,
    compile: bool,
    settings: dict[str, Any],
    expand_at: float = 0.0,
    loss_fn: LossFn = summed_loss,
) -> int:
    """The updates that this machine can do until `minutes` after the command was given: --target-minutes as a horizon.

    Measured on a few micro-batches of `rows`, compiled as in training, and on updates with all rates 0; both for all blocks
    and for only the last one, which is all that learns in the first share expand_at of the run. Evaluations and checkpoints
    are not counted. settings: see `batch_worth_an_update`; loss_fn: the trainer's, if a batch is (inputs, targets).
    Raises NanochatError if no time is left.
    """
    T, device = model.config.sequence_len, model.get_device()
    if compile and try_to_compile(device) is None:
        print0("compiling, and measuring how fast this machine trains")
        model.compile()
    generator = torch.Generator().manual_seed(0)
    idx = torch.randint(model.config.vocab_size, (rows, T), generator=generator).to(device)
    passes, count = Passes(model, loss_fn), torch.tensor(idx.numel(), device=device)
    optimizer = _idle_optimizer(model, settings)
    accumulated = accumulation_steps(total_batch_size, rows, T, get_dist_info().world_size)

    def seconds_of_step(idle_blocks: int) -> float:
        model.idle_blocks = idle_blocks
        each = [seconds_of(lambda: passes.run([(idx, idx)], count), device) for _ in range(5)][2:]  # the first two compile
        updates = [seconds_of(optimizer.step, device) for _ in range(3)][1:]
        model.zero_grad(set_to_none=True)
        model.idle_blocks = 0
        return accumulated * statistics.median(each) + min(updates)

    mean = (1 - expand_at) * seconds_of_step(0)
    if expand_at:
        mean += expand_at * seconds_of_step(model.config.n_layer - 1)
    ranks = gather_objects((mean, seconds_since_start()))
    seconds, elapsed = (max(column) for column in zip(*ranks, strict=True))
    if elapsed >= 60 * minutes:
        raise NanochatError(f"--target-minutes {minutes:g} is over: start-up alone took {elapsed:.0f} s here; give more")
    return max(1, int((60 * minutes - elapsed) / seconds))


class TimeLimit:
    """Holds a run to --target-minutes: where updates are slower or faster than was measured, it plans fewer or more of them.

    Checked TIME_CHECKS times, in seconds of training alone, like the plan. most: updates that are never exceeded;
    record(updates) is called when they change.
    """

    def __init__(self, minutes: float, most: float, record: Callable[[int], None]) -> None:
        self._seconds = 60 * minutes - seconds_since_start()
        self._most, self.record = most, record
        self._checked = (0, 0.0)  # (step, seconds of training) at the last check
        self._paces: deque[float] = deque(maxlen=3)  # seconds of an update, between the last checks

    def updates(self, step: int, seconds: float, schedule: Schedule) -> int:
        """How many updates the run is to have, after `step` of them in so many seconds (a collective call).

        The plan changes only if the number differs by 3% or more. The median of the last three checks decides, so that a
        single pause does not; at most half of the remaining updates are dropped, or as many added, at a time.
        """
        planned, first = schedule.num_iterations, schedule.expansion_step
        if step <= first:  # nothing is known yet of the time that all blocks take
            self._checked = (step, seconds)
        if step - self._checked[0] < max(1, planned // TIME_CHECKS) or step >= planned:
            return planned
        (step_before, seconds_before), self._checked = self._checked, (step, seconds)
        self._paces.append((seconds - seconds_before) / (step - step_before))
        left, fit = planned - step, int((self._seconds - seconds) / statistics.median(self._paces))
        fit = min(max(fit, left // 2, 1), 2 * left)
        fit = from_rank0(int(min(fit, self._most - step)))
        return planned if abs(left - fit) < 0.03 * planned else step + fit


def choose_device_batch_size(
    model: GPT, requested: int, total_batch_size: int, world_size: int, loss_fn: LossFn = summed_loss, **settings: Any
) -> int:
    """Rows in a micro-batch: as requested, else the most that divide the total batch and fit the device's memory.

    A CPU gets at most 8,192 tokens at a time, as much as suits its caches; a quarter of that with a large vocabulary, when
    most time goes to the loss, which takes few tokens at a time anyway. On a GPU we try one forward and backward pass,
    with fewer rows after each failure, so that cards of 6 and of 80 GB run the same command. loss_fn: as for `steps_in`;
    settings: of the optimizer, as far as they decide what state it has.
    """
    T, device = model.config.sequence_len, model.get_device()
    if requested > 0:
        accumulation_steps(total_batch_size, requested, T, world_size)  # raises if it does not divide the total
        return requested
    most_tokens = 2**17 if device.type == "cuda" else 2**13 if model.config.vocab_size < 2**14 else 2**11
    accumulation_steps(total_batch_size, 1, T, world_size)
    rows = default_device_batch_size(total_batch_size, T, world_size, most_tokens)
    while device.type == "cuda" and rows > 1 and any_rank(not _fits(model, rows, loss_fn, **settings)):
        rows = default_device_batch_size(total_batch_size, T, world_size, rows * T - 1)
    return rows


def choose_answer_rows(model: GPT, requested: int, **settings: Any) -> int:
    """Answers in a micro-batch of RL: as requested, else 32; on a GPU fewer if 32 full-length ones do not fit.

    What is tried is a pass with the default loss. settings: as for `choose_device_batch_size`.
    """
    if requested > 0:
        return requested
    rows = ANSWER_ROWS
    share, on_gpu = MEMORY_SHARE, model.get_device().type == "cuda"
    while on_gpu and rows > 1 and any_rank(not _fits(model, rows, engine_share=share, **settings)):
        rows //= 2
    return rows


def _fits(model: GPT, rows: int, loss_fn: LossFn = summed_loss, engine_share: float = 0.0, **settings: Any) -> bool:
    """Whether a pass over that many rows fits in a GPU's memory together with the optimizer's state.

    engine_share: the share of the free memory to keep for an engine.
    """
    try:
        _rehearse(model, rows, loss_fn, engine_share, settings)
        return True
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        if model.is_sharded:
            from nanochat.sharding import end_pass

            end_pass(model)
        return False
    finally:
        model.zero_grad(set_to_none=True)
        torch.cuda.empty_cache()


def _rehearse(model: GPT, rows: int, loss_fn: LossFn, engine_share: float, settings: dict[str, Any]) -> None:
    """A pass beside as much memory as training and an engine hold. Its own function, so that failing frees all of it.

    Every rank holds what it has more than the one with the least (a collective call), so that all run out together: with
    FSDP those that go on would wait for one that does not.
    """
    device = model.get_device()
    free = torch.cuda.mem_get_info(device)[0]
    least = min(gather_objects(free))
    optimizer = GPT.on_meta(model.config).setup_optimizer(**settings)
    state_bytes = optimizer.state_bytes()  # all of it is allocated at once
    held = torch.empty(state_bytes + int(engine_share * least) + free - least, dtype=torch.uint8, device=device)
    idx = torch.zeros(rows, model.config.sequence_len, dtype=torch.long, device=device)
    loss_fn(model, (idx, idx)).backward()
    del held

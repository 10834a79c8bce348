"""What the trainer's schedules give the optimizer at each update, against closed forms."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest

from nanochat.schedules import Schedule
from nanochat.trainer import Trainer
from tests.helpers import make_trainer

N = 20


def watch(trainer: Trainer) -> list[list[tuple[float, float, float]]]:
    """For each update to come the (learning rate, weight decay, momentum) of every group, as the optimizer takes them."""
    step, seen = trainer.optimizer.step, []

    def watched() -> None:
        seen.append([(group.lr, group.weight_decay, group.momentum) for group in trainer.optimizer.groups])
        step()

    trainer.optimizer.step = watched
    return seen


@pytest.mark.parametrize(
    ("config", "factor"),
    [
        ({"warmup_steps": 0, "warmdown_ratio": 0.0}, lambda k: 1.0),
        ({"warmup_steps": 4, "warmdown_ratio": 0.0}, lambda k: min(1.0, (k + 1) / 4)),
        # Half of the run, to a tenth: the peak holds up to step 10, step 11 is the first below it, 20 would be at a tenth.
        ({"warmup_steps": 4, "warmdown_ratio": 0.5, "final_lr_frac": 0.1}, lambda k: min((k + 1) / 4, 1, 1 - 0.09 * (k - 10))),
        ({"warmup_steps": 0, "warmdown_ratio": 0.25, "final_lr_frac": 0.0}, lambda k: min(1, 1 - (k - 15) / 5)),
        ({"warmup_steps": 0, "warmdown_ratio": 1.0, "final_lr_frac": 0.0}, lambda k: 1 - k / N),
    ],
)
def test_rates_and_decay_of_every_update(config: dict[str, float], factor: Callable[[int], float], tmp_path: Path) -> None:
    """A group's rate is its own peak times one factor; decay falls from its peak along half a cosine, whatever the rate."""
    trainer = make_trainer(tmp_path, num_iterations=N, **config)
    peaks = [(group.initial_lr, group.initial_weight_decay) for group in trainer.optimizer.groups]
    assert len({lr for lr, _ in peaks}) > 3 and {decay for _, decay in peaks} == {0.0, 0.2}
    seen = watch(trainer)
    trainer.train()
    assert len(seen) == N
    for k, groups in enumerate(seen):
        cosine = (1 + math.cos(math.pi * k / N)) / 2
        for (lr, decay, _), (peak_lr, peak_decay) in zip(groups, peaks, strict=True):
            assert lr == pytest.approx(factor(k) * peak_lr), f"step {k}"
            assert decay == pytest.approx(cosine * peak_decay), f"step {k}"


def test_momentum_of_every_update(tmp_path: Path) -> None:
    """Up from 0.85 over a quarter of the run, and down half that way as the rates warm down."""
    trainer = make_trainer(tmp_path, num_iterations=N, warmdown_ratio=0.5)
    seen = watch(trainer)
    trainer.train()
    for k, groups in enumerate(seen):
        expected = 0.85 + 0.02 * min(k, 5) if k <= 10 else 0.95 - 0.005 * (k - 10)
        assert [momentum for _, _, momentum in groups] == pytest.approx([expected] * len(groups)), f"step {k}"


def test_a_resumed_run_takes_the_schedules_up_where_they_were(tmp_path: Path) -> None:
    whole, resumed = (make_trainer(tmp_path / name, num_iterations=N) for name in ("whole", "resumed"))
    expected, seen = watch(whole), watch(resumed)
    whole.train()
    resumed.load_state_dict({**whole.state_dict(), "step": 12})
    resumed.train()
    assert seen == expected[12:]


@pytest.mark.parametrize(
    ("steps", "warmup", "warmdown"), [(100, 10, 0.5), (400, 40, 0.65), (3, 40, 0.5), (1, 0, 1.0), (50, 0, 0.0), (40, 40, 0.65)]
)
def test_learning_rate_schedule(steps: int, warmup: int, warmdown: float) -> None:
    schedule = Schedule(steps, warmup, warmdown, final_lr_frac=0.1)
    factors = [schedule.learning_rate_factor(step) for step in range(steps + 1)]
    assert all(0 < f <= 1 for f in factors)
    warmup_steps, warmdown_steps = min(warmup, steps // 2), round(warmdown * steps)
    assert max(factors) == 1 or warmup_steps + warmdown_steps > steps
    if warmup and steps > 2:
        assert factors[0] == pytest.approx(1 / warmup_steps)
    peak = max(i for i, f in enumerate(factors) if f == max(factors))
    steepest = max(1 / max(1, warmup_steps), 1 / max(1, warmdown_steps))
    assert all(abs(a - b) <= steepest + 1e-9 for a, b in zip(factors, factors[1:], strict=False)), "it jumps"
    assert all(a >= b for a, b in zip(factors[peak:], factors[peak + 1 :], strict=False)), "warmdown rises"
    assert factors[steps] == pytest.approx(0.1 if warmdown else 1)


@pytest.mark.parametrize(("steps", "expand_at", "first"), [(100, 0.0, 0), (100, 0.85, 85), (2, 0.85, 1), (1, 0.85, 1)])
def test_all_blocks_learn_in_the_end(steps: int, expand_at: float, first: int) -> None:
    assert Schedule(steps, expand_at=expand_at).expansion_step == first

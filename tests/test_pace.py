"""Runs by time: they end in it, even if the machine becomes slower than it was when they were planned."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from nanochat import pace
from nanochat.common import NanochatError
from nanochat.gpt import GPT, GPTConfig
from nanochat.metrics import read_metrics
from nanochat.optim import OptimizerSettings
from nanochat.pace import TimeLimit
from nanochat.runs import list_steps, step_dir
from nanochat.schedules import Schedule
from nanochat.settings import tomllib
from nanochat.training_flags import parse_switches
from scripts import base_train, chat_sft
from tests.conftest import TINY_TRAINING
from tests.helpers import make_model, make_trainer


def simulate(seconds_of_step: list[float], minutes: float, planned: int = 0, **config: float) -> tuple[int, float]:
    """(updates, seconds) of a run under a limit whose steps take so long; planned: as many as there may be, or fewer."""
    schedule, seconds, recorded = Schedule(planned or len(seconds_of_step), **config), 0.0, []
    limit = TimeLimit(minutes, len(seconds_of_step), recorded.append)
    step = 0
    while step < schedule.num_iterations:
        updates = limit.updates(step, seconds, schedule)
        assert step < updates <= len(seconds_of_step)
        schedule = Schedule(updates, expand_at=schedule.expansion_step / updates)
        seconds += seconds_of_step[step]
        step += 1
    return step, seconds


@pytest.mark.parametrize("stage", ["base", "sft"])
def test_the_optimizer_that_is_measured_is_the_one_that_trains(stage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """But for its rates: with whole matrices, its steps take twice as long."""
    built: list[dict[str, Any]] = []
    setup = GPT.setup_optimizer
    monkeypatch.setattr(GPT, "setup_optimizer", lambda model, **how: built.append(how) or setup(model, **how))
    switches = ["muon_blocks=false", "muon_beta2=0.8"]
    flags = ["--target-minutes=9999", "--weight-decay=0.3", "--no-compile", "--device-batch-size=1"]
    if stage == "base":
        args = base_train.parse_arguments([*flags, "--max-seq-len=512", "--set", *switches])
        chosen = parse_switches(args.switches, GPTConfig, OptimizerSettings)[1]
        base_train.plan(args, make_model(), chosen, 1, lambda tokens: True)
    else:
        begun, meta = SimpleNamespace(recorded_settings=dict), {"settings": {"total_batch_size": 1024, "switches": switches}}
        chat_sft.plan(chat_sft.parse_arguments(flags), begun, make_model(), meta, lambda: 1024, 1)
    expected = {"weight_decay": 0.3, "muon_blocks": False, "muon_beta2": 0.8}
    assert len(built) == (2 if stage == "base" else 1) and all(expected.items() <= how.items() for how in built)


@pytest.mark.parametrize(("gone", "expand_at", "updates"), [(20, 0.0, 7), (20, 0.25, 8), (20, 0.5, 10), (119.9, 0.0, 1)])
def test_a_plan_by_time_counts_all_that_an_update_does(
    gone: float, expand_at: float, updates: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four micro-batches of a second for each block that learns, and two seconds of the optimizer, in what is left of 120."""
    model = make_model(sequence_len=64)
    before = {name: value.clone() for name, value in model.state_dict().items()}

    def seconds_of(work: Any, device: object) -> float:
        is_update = getattr(work, "__name__", "") == "step"
        work()
        return 2.0 if is_update else float(model.config.n_layer - model.idle_blocks)

    monkeypatch.setattr(pace, "seconds_of", seconds_of)
    monkeypatch.setattr(pace, "seconds_since_start", lambda: gone)
    monkeypatch.setattr(pace, "try_to_compile", lambda device: "no compiler")
    assert pace.steps_in(model, 2, 2, 8 * 64, True, {"weight_decay": 0.2}, expand_at) == updates
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert model.idle_blocks == 0 and not model.is_compiled
    monkeypatch.setattr(pace, "gather_objects", lambda mine: [(mine[0] / 2, gone), mine, (mine[0], 120)])
    with pytest.raises(NanochatError, match="--target-minutes 2 is over: start-up alone took 120 s"):  # on another rank
        pace.steps_in(model, 2, 2, 8 * 64, False, {})


def test_all_ranks_count_in_what_time_allows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pace, "measure_matmul_rate", lambda *where: 1e9)
    monkeypatch.setattr(pace, "expected_mfu", lambda *where: 0.5)
    monkeypatch.setattr(pace, "get_dist_info", lambda: SimpleNamespace(world_size=4))
    assert pace.flops_in(make_model(), 2) == 0.5e9 * 4 * 120


def test_a_run_ends_in_its_time_whatever_the_machine_does() -> None:
    """100 updates were planned for 100 seconds."""
    assert simulate([1.0] * 100, 100 / 60) == (100, 100)
    assert simulate([1.0] * 8, 8 / 60) == (8, 8)  # fewer than there are checks
    assert simulate([1.02] * 100, 100 / 60)[0] == 100  # too little to matter
    assert simulate([0.5] * 100, 100 / 60) == (100, 50)  # never more than the most
    for step_at, factor in ((0, 1.25), (0, 2.0), (40, 1.5), (70, 2.0), (0, 3.0)):
        updates, seconds = simulate([1.0] * step_at + [factor] * (100 - step_at), 100 / 60)
        assert 97 < seconds < 103 and updates < 100, (step_at, factor)


def test_a_run_has_the_time_that_its_start_has_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pace, "seconds_since_start", lambda: 20.0)
    assert simulate([1.0] * 200, 2, planned=100) == (100, 100)


@pytest.mark.parametrize("factor", [0.2, 0.5, 0.9])
def test_a_machine_that_was_slow_only_when_it_was_measured_uses_its_time(factor: float) -> None:
    updates, seconds = simulate([factor] * 1000, 100 / 60, planned=100)
    assert 97 < seconds < 103 and updates == pytest.approx(100 / factor, rel=0.03)


@pytest.mark.parametrize(
    ("planned", "step", "seconds", "updates"), [(100, 10, 0.001, 190), (100, 10, 900, 55), (10, 9, 2000, 10)]
)
def test_a_plan_drops_half_of_what_is_left_or_doubles_it(planned: int, step: int, seconds: float, updates: int) -> None:
    """At most, at a time; the last update is not dropped."""
    assert TimeLimit(1000 / 60, 10**6, print).updates(step, seconds, Schedule(planned)) == updates


def test_a_run_does_what_was_planned_where_only_its_start_was_slow() -> None:
    """Twice as slow for its first tenth: of the time that this leaves, nothing is lost."""
    updates, seconds = simulate([2.0] * 10 + [1.0] * 90, 100 / 60)
    assert 88 <= updates <= 90 and 97 < seconds < 103
    assert simulate([2.0] * 10 + [0.8] * 90, 100 / 60)[0] == 100


def test_a_pause_is_no_pace() -> None:
    """One update in which the machine slept past the end: training still ends with a warm-down."""
    updates, seconds = simulate([1.0] * 30 + [1000.0] + [1.0] * 69, 100 / 60)
    assert 40 < updates < 100
    limit = TimeLimit(110 / 60, 100, print)  # a shorter one, that the plan has room for, changes nothing
    assert {limit.updates(step, step + 9.0 * (step > 30), Schedule(100)) for step in range(100)} == {100}


def test_blocks_that_join_late_are_not_judged_by_the_steps_before() -> None:
    """Where the first 80 of 100 updates take a second and the others four: as planned."""
    assert simulate([1.0] * 80 + [4.0] * 20, 160 / 60, expand_at=0.8) == (100, 160)
    limit, schedule = TimeLimit(1.0, 100, print), Schedule(10, expand_at=0.8)
    assert {limit.updates(step, step, schedule) for step in range(9)} == {10}
    updates, seconds = simulate([1.0] * 80 + [8.0] * 20, 160 / 60, expand_at=0.8)
    assert 80 < updates < 100


def test_schedules_follow_a_run_that_does_fewer_updates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recorded: list[int] = []
    trainer = make_trainer(tmp_path, num_iterations=20, expand_at=0.1, warmdown_ratio=1.0)
    trainer._time_limit = TimeLimit(1.0, 20, recorded.append)
    monkeypatch.setattr(TimeLimit, "updates", lambda self, step, seconds, schedule: 10 if step >= 5 else 20)
    trainer.train()
    rows = [row for row in read_metrics(tmp_path / "metrics.jsonl") if "train/loss" in row]
    assert recorded == list_steps(tmp_path) == [10] and rows[-1]["step"] == 10
    lengths = [20] * 5 + [10] * 5
    expected = [Schedule(n, 0, 1.0).learning_rate_factor(step) for step, n in enumerate(lengths)]
    assert [row["train/lrm"] for row in rows] == pytest.approx(expected)
    flops = [row["train/flops"] for row in rows]
    one_block, all_blocks = (32 * trainer.model.estimate_flops(idle) for idle in (2, 0))
    assert flops[-1] == 2 * one_block + 8 * all_blocks  # the blocks joined at step 2, a tenth of what was planned
    resumed = make_trainer(tmp_path, num_iterations=10, expand_at=0.1, warmdown_ratio=1.0)
    assert resumed.config.expansion_step == 1  # a tenth of what is planned now
    resumed.load_state_dict(trainer.state_dict())
    assert resumed.flops == flops[-1]


def test_blocks_that_have_joined_stay_where_the_plan_grew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also in a run that is resumed: its settings know the new number of updates, and the share that was asked for."""
    trainer = make_trainer(tmp_path, num_iterations=10, expand_at=0.8)
    trainer._time_limit = TimeLimit(1.0, 40, print)
    monkeypatch.setattr(TimeLimit, "updates", lambda self, step, seconds, schedule: 20 if step >= 9 else 10)
    trainer.train()
    resumed = make_trainer(tmp_path, num_iterations=20, expand_at=0.8)
    resumed.load_state_dict({**trainer.state_dict(), "step": 12})
    resumed._choose_blocks()
    assert resumed.config.expansion_step == trainer.config.expansion_step == 8
    assert resumed.model.idle_blocks == 0


def test_time_is_looked_at_only_where_it_is_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a row is logged, which waits for the device."""
    asked: list[int] = []
    trainer = make_trainer(tmp_path, num_iterations=8, log_every=3)
    trainer._time_limit = TimeLimit(1.0, 8, print)
    monkeypatch.setattr(TimeLimit, "updates", lambda self, step, seconds, schedule: asked.append(step) or 8)
    trainer.train()
    assert asked == [0, 3, 6, 8]


def test_a_shorter_run_says_so_and_is_complete(
    corpus: Path, base_dir: Path, tokenizer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    tokenizer.save(base_dir / "tokenizers" / "default")
    monkeypatch.setattr(base_train, "steps_in", lambda *_: 8)
    monkeypatch.setattr(TimeLimit, "updates", lambda self, step, seconds, schedule: 5 if step >= 4 else 8)
    flags = [*TINY_TRAINING, f"--data={corpus}", "--model-tag=short", "--save-every=3"]
    flags += ["--num-iterations=-1", "--target-minutes=1"]
    assert base_train.main(flags) == 0
    assert "step 4: slower than planned; 5 updates in place of 8, to end in time" in capsys.readouterr().out
    stage_dir = base_dir / "runs" / "short" / "base"
    assert list_steps(stage_dir)[-1] == 5
    assert json.loads((stage_dir / "settings.json").read_text(encoding="utf-8"))["num_iterations"] == 5
    assert tomllib.loads((stage_dir / "config.toml").read_text(encoding="utf-8"))["horizon"]["num_iterations"] == 5
    assert base_train.main([*flags, "--resume=auto"]) == 0
    assert "is complete: 5 steps done" in capsys.readouterr().out
    shutil.rmtree(step_dir(stage_dir, 5))  # killed before the shorter run was saved: step 3 was, and planned 8
    capsys.readouterr()
    assert base_train.main(["--config", str(stage_dir / "config.toml"), "--resume=auto"]) == 0
    assert list_steps(stage_dir) == [3, 6, 8]

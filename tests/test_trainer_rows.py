"""What a trainer's rows say of the updates since the row before."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from nanochat.checkpoint_manager import read_meta
from nanochat.gpt import GPT
from nanochat.metrics import read_metrics
from tests.helpers import make_trainer

RATE = 1e13  # what the machine's matrix units could do in a second


def train_rows(folder: Path, **config: Any) -> list[dict[str, Any]]:
    """The rows of seven updates."""
    make_trainer(folder, num_iterations=7, **config).train()
    return [row for row in read_metrics(folder / "metrics.jsonl") if "train/loss" in row]


def test_a_row_of_several_updates_has_their_mean_loss(tmp_path: Path) -> None:
    each, pairs = (train_rows(tmp_path / str(n), log_every=n) for n in (1, 2))
    losses = [row["train/loss"] for row in each]
    assert [row["step"] for row in pairs] == [2, 4, 6, 7]
    means = [(a + b) / 2 for a, b in zip(losses[:6:2], losses[1::2], strict=True)]
    assert [row["train/loss"] for row in pairs] == pytest.approx([*means, losses[6]])
    assert len(set(losses)) == 7


@pytest.mark.parametrize("never", [0, -1])
def test_rows_that_are_never_due_are_one_of_all_updates(never: int, tmp_path: Path) -> None:
    losses = [row["train/loss"] for row in train_rows(tmp_path / "each")]
    (row,) = train_rows(tmp_path / "last", log_every=never)
    assert (row["step"], row["train/loss"]) == (7, pytest.approx(sum(losses) / 7))


@pytest.mark.parametrize("log_every", [1, 2])
def test_mfu_is_the_share_of_what_the_machine_could_have_done(
    log_every: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The model's operations since the row before, over the time since then and the machine's rate; of all its blocks, or
    while the last one learns alone, of that one."""
    monkeypatch.setattr("nanochat.trainer.reference_rate", lambda *arguments: RATE)
    rows = train_rows(tmp_path, log_every=log_every, expand_at=4 / 7)
    model = make_trainer(tmp_path / "other").model
    done = 0
    for row in rows:
        alone = min(row["step"], 4)
        flops = 32 * (alone * model.estimate_flops(idle_blocks=2) + (row["step"] - alone) * model.estimate_flops())
        tokens = 32 * (1 if row["step"] == 7 else log_every)
        elapsed = tokens / row["train/tok_per_s"]
        assert row["train/flops"] == flops
        if row["step"] == 1:  # the machine is measured afterwards, so that a run shows its first step soon
            assert "train/mfu" not in row
        else:
            assert row["train/mfu"] == pytest.approx((flops - done) / elapsed / RATE, rel=0.01)
        done = flops


def test_a_rate_that_training_exceeds_is_measured_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other work slowed its measurement down: no more than all of a machine can be used."""
    measured = iter([1.0, 1e15, 1e16])
    monkeypatch.setattr("nanochat.trainer.reference_rate", lambda *arguments: next(measured))
    shares = [row["train/mfu"] for row in train_rows(tmp_path) if "train/mfu" in row]
    assert len(shares) == 6 and max(shares) < 1
    assert next(measured) == 1e16


@pytest.mark.parametrize("older", [False, True])
def test_a_resumed_run_counts_on(older: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its first row tells of its own updates; one that an older nanochat began has worked as planned."""
    monkeypatch.setattr("nanochat.trainer.reference_rate", lambda *arguments: RATE)
    whole = train_rows(tmp_path / "whole", expand_at=4 / 7, save_every=5)
    state = read_meta(tmp_path / "whole", 5)["trainer"]
    if older:
        del state["flops"]
    again = make_trainer(tmp_path / "again", num_iterations=7, expand_at=4 / 7)
    again.load_state_dict({**state, "time_s": 100.0})
    again.train()
    row = read_metrics(tmp_path / "again" / "metrics.jsonl")[0]
    elapsed = 32 / row["train/tok_per_s"]
    assert row["time_s"] == pytest.approx(100 + elapsed, abs=2e-4)
    assert row["train/flops"] == whole[5]["train/flops"]
    assert row["train/mfu"] == pytest.approx((row["train/flops"] - whole[4]["train/flops"]) / elapsed / RATE, rel=0.01)


def test_results_stay_until_the_next_of_their_kind(tmp_path: Path) -> None:
    """On the progress line, and in a run that is resumed."""
    trainer, seen = make_trainer(tmp_path), []
    trainer.evaluations = [(2, lambda: {"val/a": trainer.step}), (3, lambda: {"val/b": trainer.step})]
    trainer.step_metrics = lambda: seen.append(trainer.results) or {}
    trainer.train()
    assert seen[3:] == [{"val/a": 2, "val/b": 3}, {"val/a": 4, "val/b": 3}, {"val/a": 4, "val/b": 3}]
    again = make_trainer(tmp_path / "again")
    again.load_state_dict(trainer.state_dict())
    assert again.results == {"val/a": 6, "val/b": 6}


@pytest.mark.parametrize(("sample_every", "sampled"), [(2, [2, 4, 6]), (0, [6]), (-1, [])])
def test_evaluating_and_sampling_are_no_training(sample_every: int, sampled: list[int], tmp_path: Path) -> None:
    """No gradients are kept while a model is evaluated; and whatever came between, it is trained as before."""
    trainer, modes, samples = make_trainer(tmp_path, sample_every=sample_every), set(), []
    model, loss_fn = trainer.model, trainer._passes.loss_fn

    def note(doing: str) -> dict[str, float]:
        modes.add((doing, model.training, torch.is_grad_enabled()))
        return {}

    trainer.evaluations = [(3, lambda: note("evaluates"))]
    trainer.sample_fn = lambda: samples.append(trainer.step) or [note("samples")][:0]
    trainer._passes.loss_fn = lambda *batch: note("trains") or loss_fn(*batch)
    trainer.train()
    assert samples == sampled
    assert modes - {("samples", False, True)} == {("trains", True, True), ("evaluates", False, False)}


def test_what_an_update_changed_can_be_logged(tmp_path: Path) -> None:
    """step_metrics sees the weights before it, update_metrics those after it, and both are asked once a row."""
    trainer = make_trainer(tmp_path, num_iterations=5, log_every=2)

    def weights(model: GPT) -> torch.Tensor:
        return torch.cat([p.detach().flatten() for p in model.parameters()])

    seen = [weights(trainer.model)]

    def before() -> dict[str, float]:
        seen.append(weights(trainer.model))
        return {"train/norm": seen[-1].norm().item()}

    def after() -> dict[str, float]:
        seen.append(weights(trainer.model))
        return {"train/update_norm": (seen[-1] - seen[-2]).norm().item()}

    trainer.step_metrics, trainer.update_metrics = before, after
    trainer.train()
    rows = [row for row in read_metrics(tmp_path / "metrics.jsonl") if "train/loss" in row]
    assert [row["step"] for row in rows] == [2, 4, 5] and len(seen) == 7
    assert [row["train/norm"] for row in rows] == [w.norm().item() for w in seen[1::2]]
    assert [row["train/update_norm"] for row in rows] == [
        (b - a).norm().item() for a, b in zip(seen[1::2], seen[2::2], strict=True)
    ]
    assert all(row["train/update_norm"] > 0 for row in rows)
    assert seen[4].equal(seen[5])  # no update lies between the rows of steps 4 and 5
    assert seen[6].equal(weights(trainer.model))

"""When a trainer saves, and what it does if that fails."""

from __future__ import annotations

import errno
import json
import math
import shutil
import signal
import time
import weakref
from pathlib import Path
from typing import Any

import pytest

from nanochat import checkpoint_writer
from nanochat import trainer as trainer_module
from nanochat.checkpoint_manager import read_meta, set_aside
from nanochat.common import NanochatError
from nanochat.metrics import read_metrics
from nanochat.runs import list_steps
from nanochat.stage import Stage
from tests.helpers import make_trainer


def test_a_loss_that_is_no_number_is_named_though_a_save_has_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """And the step whose checkpoint is not there is no longer called the best."""
    trainer = make_trainer(tmp_path, save_every=2, best_metric="x")
    trainer.evaluations = [(2, lambda: {"x": float(trainer.step)})]
    save, loss_fn = checkpoint_writer.save_checkpoint, trainer._passes.loss_fn

    def save_once(stage_dir: Path, step: int, *rest: Any) -> None:
        if step == 4:
            raise OSError(errno.ENOSPC, "No space left on device", str(stage_dir))
        save(stage_dir, step, *rest)

    monkeypatch.setattr(checkpoint_writer, "save_checkpoint", save_once)
    trainer._passes.loss_fn = lambda model, batch: loss_fn(model, batch) * (math.nan if trainer.step == 4 else 1)
    with pytest.raises(NanochatError, match="no longer a number at step 5: the last good checkpoint is step 2"):
        trainer.train()
    assert "a checkpoint could not be written; training goes on. the disk is full" in capsys.readouterr().out
    assert trainer.best_step == 2


def test_what_an_evaluation_ends_is_saved_though_a_save_has_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer, save, failures = make_trainer(tmp_path, save_every=2), checkpoint_writer.save_checkpoint, [4]

    def save_but_once(stage_dir: Path, step: int, *rest: Any) -> None:
        if step in failures:
            failures.remove(step)
            raise OSError(errno.EIO, "a moment's trouble", str(stage_dir))
        save(stage_dir, step, *rest)

    def evaluate() -> dict[str, float]:
        return {"x": 1 / (4 - trainer.step)}

    monkeypatch.setattr(checkpoint_writer, "save_checkpoint", save_but_once)
    trainer.evaluations = [(2, evaluate)]
    with pytest.raises(ZeroDivisionError):
        trainer.train()
    assert list_steps(tmp_path) == [2, 4]


@pytest.mark.parametrize(
    ("save_every", "words"), [(0, "no checkpoint exists yet; start again"), (1, "step 1 in .*; resume from it")]
)
def test_a_loss_that_is_no_number_says_what_to_do_next(
    save_every: int, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Begin anew, or resume from the first checkpoint, though that is just being written."""
    save = checkpoint_writer.save_checkpoint

    def save_slowly(*arguments: Any) -> None:
        time.sleep(1)
        save(*arguments)

    monkeypatch.setattr(checkpoint_writer, "save_checkpoint", save_slowly)
    trainer = make_trainer(tmp_path, save_every=save_every)
    loss_fn = trainer._passes.loss_fn
    trainer._passes.loss_fn = lambda model, batch: loss_fn(model, batch) * (math.nan if trainer.step == 1 else 1)
    with pytest.raises(NanochatError, match=words):
        trainer.train()


def test_each_evaluation_is_of_a_saved_step(tmp_path: Path) -> None:
    """By default: a machine out of memory ends a process without a word."""
    trainer = make_trainer(tmp_path)
    trainer.evaluations = [(2, lambda: {"x": float(trainer.step == trainer._saved_step)}), (-1, dict)]
    trainer.train()
    assert [row["x"] for row in read_metrics(tmp_path / "metrics.jsonl") if "x" in row] == [1, 1, 1]
    assert list_steps(tmp_path) == [2, 4, 6]


@pytest.mark.parametrize(("save_every", "saved"), [(-1, [2, 4, 6]), (0, [6]), (3, [3, 6])])
def test_what_was_never_trained_is_evaluated_but_not_saved(save_every: int, saved: list[int], tmp_path: Path) -> None:
    """However often checkpoints are written; and only once is a new model evaluated before the evaluations are due."""
    trainer, evaluated = make_trainer(tmp_path, save_every=save_every, eval_first=True), []
    trainer.evaluations = [(2, lambda: evaluated.append(trainer.step) or {})]
    trainer.train()
    assert (evaluated, list_steps(tmp_path)) == ([0, 2, 4, 6], saved)


def test_an_evaluation_that_fails_before_the_first_update_leaves_no_checkpoint(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, eval_first=True)
    trainer.evaluations = [(2, lambda: {"x": 1 / trainer.step})]
    with pytest.raises(ZeroDivisionError):
        trainer.train()
    assert list_steps(tmp_path) == []


def test_the_best_is_one_of_the_steps_that_are_saved(tmp_path: Path) -> None:
    """Those that are only evaluated would name a checkpoint that does not exist."""
    trainer = make_trainer(tmp_path, save_every=3, best_metric="-x")
    trainer.evaluations = [(2, lambda: {"x": float(trainer.step)})]
    trainer.train()
    assert trainer.best_step == 6


def test_what_fails_in_training_waits_for_the_checkpoint_that_is_being_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer, save = make_trainer(tmp_path, save_every=2), checkpoint_writer.save_checkpoint
    loss_fn = trainer._passes.loss_fn
    monkeypatch.setattr(checkpoint_writer, "save_checkpoint", lambda *arguments: time.sleep(0.3) or save(*arguments))
    trainer._passes.loss_fn = lambda *batch: loss_fn(*batch) * (1 // (trainer.step != 2))
    closed: list[list[int]] = []  # what there was when the log was closed, and loggers told that the run has ended
    monkeypatch.setattr(trainer.metrics, "close", lambda: closed.append(list_steps(tmp_path)))
    with pytest.raises(ZeroDivisionError):
        trainer.train()
    assert closed == [[2]]


def test_a_step_that_was_gone_on_from_is_not_saved_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_trainer(tmp_path, save_every=2).train()
    again, saved = make_trainer(tmp_path, save_every=2, num_iterations=8), []
    again.load_state_dict(read_meta(tmp_path, 6)["trainer"])
    monkeypatch.setattr(checkpoint_writer, "save_checkpoint", lambda stage_dir, step, *rest: saved.append(step))
    again.train()
    assert saved == [8]


def test_a_run_that_is_stopped_says_so_only_once_it_is_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def fail(*arguments: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(tmp_path))

    trainer = make_trainer(tmp_path)
    trainer.step_metrics = lambda: signal.raise_signal(signal.SIGINT) or {}
    monkeypatch.setattr(checkpoint_writer, "save_checkpoint", fail)
    with pytest.raises((OSError, KeyboardInterrupt)) as ended:
        trainer.train()
    assert ended.type is OSError and "stopped after" not in capsys.readouterr().out


def test_the_best_is_kept_where_the_next_evaluation_is_another(tmp_path: Path) -> None:
    """The last step's result is known after it was saved: it stays the best, and takes the place of the one before."""
    trainer = make_trainer(tmp_path, best_metric="-x", keep_last=1)
    trainer.evaluations = [(2, lambda: {"x": float(-trainer.step)})]
    trainer.train()
    assert list_steps(tmp_path) == [6]
    again = make_trainer(tmp_path, best_metric="-x", keep_last=1, num_iterations=8)
    again.load_state_dict(read_meta(tmp_path, 6)["trainer"])
    again.evaluations = [(-1, lambda: {"x": 0.0})]
    again.train()
    assert list_steps(tmp_path) == [6, 8]


@pytest.mark.parametrize(("metric", "sign"), [("val/pass@1", 1), ("-val/bpb", -1)])
def test_after_the_best_the_second_best_is_kept(metric: str, sign: int, tmp_path: Path) -> None:
    """In a run that goes on after the best step's folder was removed, as in one that was never stopped."""
    scores = {2: 3.0, 4: math.nan, 6: 9.0, 8: 4.0, 10: 4.0, 12: 1.0, 14: math.inf, 16: 2.0, 18: 2.0}
    config = {"best_metric": metric, "log_every": 4}
    trainer = make_trainer(tmp_path, num_iterations=14, keep_last=-1, **config)
    trainer.evaluations = [(2, lambda: {metric.removeprefix("-"): sign * scores[trainer.step], "val/other": 5.0})]
    assert trainer.best_step is None
    trainer.train()
    assert list_steps(tmp_path) == [2, 4, 6, 8, 10, 12, 14] and trainer.best_step == 6
    for step, best in ((14, 6), (4, 2), (2, 2), (12, 6)):
        again = make_trainer(tmp_path, num_iterations=18, keep_last=1, **config)
        again.load_state_dict(read_meta(tmp_path, step)["trainer"])
        assert again.best_step == best
    for known in (trainer, again):
        shutil.rmtree(tmp_path / "step_000006", ignore_errors=True)
        assert known.best_step == 8
    again.evaluations = [(2, lambda: {metric.removeprefix("-"): sign * scores[again.step]})]
    set_aside(tmp_path, 12)
    again.train()
    assert list_steps(tmp_path) == [8, 18]


@pytest.mark.parametrize("content", [None, b"", b'{"step": 6, "x": "?"}\n[1]\n{"step": 6, "x'])
def test_a_run_without_its_rows_goes_on(content: bytes | None, tmp_path: Path) -> None:
    """No step is known to be good, then, until one is evaluated."""
    trainer = make_trainer(tmp_path, best_metric="x")
    trainer.evaluations = [(2, lambda: {"x": 1.0})]
    trainer.train()
    (tmp_path / "metrics.jsonl").unlink()
    if content is not None:
        (tmp_path / "metrics.jsonl").write_bytes(content)
    again = make_trainer(tmp_path, best_metric="x", num_iterations=8, keep_last=1)
    again.load_state_dict(read_meta(tmp_path, 6)["trainer"])
    assert again.best_step is None
    again.evaluations = [(2, lambda: {"x": 0.0})]
    again.train()
    assert again.best_step == 6 and list_steps(tmp_path) == [6, 8]


def test_a_stage_is_complete_only_when_all_evaluations_of_its_last_step_are_made(tmp_path: Path) -> None:
    """Those of one step are one row; a resumed command makes up for what failed."""

    def fail() -> dict[str, float]:
        raise NanochatError("no data")

    stage = Stage("tag", "base", tmp_path, resume_step=6, steps=[6])
    trainer = make_trainer(tmp_path)
    trainer.evaluations = [(3, lambda: {"val/core": 0.1}), (0, fail)]
    with pytest.raises(NanochatError, match="no data"):
        trainer.train()
    assert not stage.is_complete(6)
    trainer = make_trainer(tmp_path)
    trainer.step = trainer._saved_step = 6
    trainer.evaluations = [(3, lambda: {"val/core": 0.1}), (0, lambda: {"val/x": 0.2})]
    trainer.train()
    assert stage.is_complete(6)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [(row["val/core"], row.get("val/x")) for row in rows if "val/core" in row] == [(0.1, None), (0.1, 0.2)]


def test_garbage_that_refers_to_itself_does_not_pile_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Python's collector rests while a run trains, and recomputed blocks leave such garbage."""
    monkeypatch.setattr(trainer_module, "COLLECT_EVERY", 3)
    trainer = make_trainer(tmp_path)
    left: list[weakref.ref] = []

    class Cycle:
        def __init__(self) -> None:
            self.itself = self
            left.append(weakref.ref(self))

    def evaluate() -> dict[str, float]:
        alive = sum(reference() is not None for reference in left)
        Cycle()
        return {"alive": alive}

    trainer.evaluations = [(1, evaluate)]
    trainer.train()
    alive = [row["alive"] for row in read_metrics(tmp_path / "metrics.jsonl") if "alive" in row]
    assert len(alive) > 4 and max(alive) <= 3


def test_a_checkpoint_is_written_to_its_end_before_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However long it takes; the training goes on meanwhile, in which the tensors change."""
    trainer, save, events = make_trainer(tmp_path, save_every=2), checkpoint_writer.save_checkpoint, []

    def save_slowly(stage_dir: Path, step: int, *rest: Any) -> None:
        events.append(("begins", step))
        time.sleep(0.2)
        save(stage_dir, step, *rest)
        events.append(("ends", step))

    monkeypatch.setattr(checkpoint_writer, "save_checkpoint", save_slowly)
    trainer.train()
    assert events == [(what, step) for step in (2, 4, 6) for what in ("begins", "ends")]

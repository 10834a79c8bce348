"""A checkpoint that is written behind the training, or before it goes on where memory does not allow that."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from nanochat.checkpoint_writer import Best, CheckpointWriter
from nanochat.runs import list_steps
from tests.helpers import load_all

MODEL, OPTIMIZER = {"a": torch.arange(6.0), "b": torch.ones(3)}, {"m": torch.zeros(2), "v": torch.ones(2)}


def _assert_saved(stage_dir: Path, step: int) -> None:
    model, optimizer, meta = load_all(stage_dir, step)
    assert meta["note"] == step
    for found, saved in ((model, MODEL), (optimizer, OPTIMIZER)):
        assert {name: tensor.tolist() for name, tensor in found.items()} == {n: t.tolist() for n, t in saved.items()}


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("CUDA error: out of memory")])
@pytest.mark.parametrize("copied", [0, 1, 3])
def test_without_memory_for_copies_the_step_is_written_at_once(
    tmp_path: Path, error: Exception, copied: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many of the tensors were copied before; none of these copies stays, and the next save tries again."""
    writer, copy, calls = CheckpointWriter(tmp_path, keep_last=2), torch.Tensor.copy_, []

    def fail(buffer: torch.Tensor, tensor: torch.Tensor, **settings: bool) -> torch.Tensor:
        calls.append(tensor)
        if len(calls) > copied:
            raise error
        return copy(buffer, tensor, **settings)

    writer.start(1, MODEL, OPTIMIZER, {"note": 1}, None)
    writer.wait()
    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "copy_", fail)
        writer.start(2, MODEL, OPTIMIZER, {"note": 2}, None)
    assert list_steps(tmp_path) == [1, 2]  # before anybody waits
    assert len(calls) == copied + 1
    assert writer._copies == ({}, {})
    writer.wait()
    writer.start(3, MODEL, OPTIMIZER, {"note": 3}, None)
    writer.wait()
    assert list_steps(tmp_path) == [2, 3]
    for step in (2, 3):
        _assert_saved(tmp_path, step)


def test_what_goes_wrong_then_is_for_whoever_waits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object, **settings: bool) -> None:
        raise MemoryError

    (tmp_path / "file").touch()
    writer = CheckpointWriter(tmp_path / "file", keep_last=2)
    monkeypatch.setattr(torch.Tensor, "copy_", fail)
    writer.start(1, MODEL, OPTIMIZER, {}, None)
    with pytest.raises(NotADirectoryError):
        writer.wait()
    writer.wait()  # it is said once
    with pytest.raises(NotADirectoryError):
        writer.write(1, MODEL, OPTIMIZER, {}, None)


def test_copies_keep_their_memory_as_long_as_it_fits(tmp_path: Path) -> None:
    def places() -> list[int]:
        return [tensor.data_ptr() for state in writer._copies for tensor in state.values()]

    writer = CheckpointWriter(tmp_path, keep_last=0)
    writer.start(1, MODEL, OPTIMIZER, {"note": 1}, None)
    writer.wait()
    before = places()
    writer.start(2, MODEL, OPTIMIZER, {"note": 2}, None)
    writer.wait()
    assert places() == before
    other = {"a": torch.tensor([7.0]), "b": torch.ones(3, dtype=torch.bfloat16)}
    writer.start(3, other, OPTIMIZER, {"note": 3}, None)
    writer.wait()
    assert places()[2:] == before[2:]
    model, _, _ = load_all(tmp_path, 3)
    for name, tensor in other.items():
        assert torch.equal(model[name], tensor) and model[name].dtype == tensor.dtype
    _assert_saved(tmp_path, 2)


@pytest.mark.parametrize(("metric", "values"), [("-val/bpb", (3.0, 2.0, 2.5, 1.0)), ("val/pass@1", (0.1, 0.2, 0.15, 0.3))])
def test_the_best_is_known_and_given_up_if_it_was_never_written(tmp_path: Path, metric: str, values: tuple) -> None:
    name, path = metric.removeprefix("-"), tmp_path / "best.json"
    best = Best(tmp_path, metric, is_writer=True)
    best.note(0, {name: math.nan})
    assert best.step is None and not path.exists()
    for step, value in enumerate(values, 1):
        best.note(step, {name: value, "val/other": 0.0})
    best.note(5, {"val/other": 9.0})
    assert best.step == 4
    assert json.loads(path.read_text()) == {"step": 4, name: values[3]}
    best.fall_back([1, 2, 3, 4])
    assert best.step == 4
    best.fall_back([1, 2, 3])
    assert best.step == 2
    assert json.loads(path.read_text())["step"] == 2
    best.fall_back([1, 3])
    assert best.step is None
    assert not path.exists()
    Best(tmp_path, metric, is_writer=False).note(1, {name: 1.0})
    assert not path.exists()


@pytest.mark.parametrize(
    ("file", "step"),
    [
        ({"step": 8, "val/bpb": 2.0}, 8),  # a checkpoint is written before it is evaluated
        ({"step": 8, "val/bpb": 4.0}, 4),
        ({"step": 9, "val/bpb": 2.0}, 4),  # of an abandoned attempt
        ({"step": 8, "val/other": 2.0}, 4),
        ({"step": "8", "val/bpb": 2.0}, 4),
        (None, 4),
    ],
)
def test_a_resumed_run_knows_the_best_of_what_was_evaluated_last(tmp_path: Path, file: dict | None, step: int) -> None:
    best, path = Best(tmp_path, "-val/bpb", is_writer=True), tmp_path / "best.json"
    path.write_text("{" if file is None else json.dumps(file), encoding="utf-8")
    best.load({"step": 4, "value": 3.0}, 8)
    assert best.step == step and json.loads(path.read_text(encoding="utf-8"))["step"] == step
    best.fall_back([4, 12])
    assert best.step == 4

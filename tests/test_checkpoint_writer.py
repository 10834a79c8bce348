"""A checkpoint that is written behind the training, or before it goes on where memory does not allow that."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from nanochat.checkpoint_writer import CheckpointWriter
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

"""Checkpoints that ranks wrote in parts, as one process reads them."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp

from nanochat import sharding
from nanochat.common import NanochatError
from nanochat.sharding import read_sharded, read_whole

TENSORS = {
    "model/a": torch.randn(4, 3, generator=torch.Generator().manual_seed(0)),
    "model/b": torch.arange(6, dtype=torch.bfloat16), "optimizer/steps": torch.tensor([1, 2]),
}  # fmt: skip


class Harmful:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.path),)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    dcp.save(dict(TENSORS), checkpoint_id=tmp_path / "sharded", no_dist=True)
    return tmp_path / "sharded"


def test_what_was_written_is_read(checkpoint: Path) -> None:
    whole = read_whole(checkpoint, "model/")
    assert whole.keys() == {"a", "b"} and all(torch.equal(whole[name], TENSORS[f"model/{name}"]) for name in whole)
    steps = {"optimizer/steps": torch.zeros(2, dtype=torch.int64)}
    read_sharded(checkpoint, steps)
    assert steps["optimizer/steps"].tolist() == [1, 2]


def test_the_index_is_unpickled_once(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It names every part that any rank holds; and a second reading could be of another file than was checked."""
    read: list[object] = []
    load = sharding._MetadataUnpickler.load
    monkeypatch.setattr(sharding._MetadataUnpickler, "load", lambda unpickler: read.append(unpickler) or load(unpickler))
    monkeypatch.setattr(pickle, "load", None)
    assert read_whole(checkpoint, "model/").keys() == {"a", "b"} and len(read) == 1
    read_sharded(checkpoint, {"optimizer/steps": torch.zeros(2, dtype=torch.int64)})
    assert len(read) == 2


@pytest.mark.parametrize("where", ["alone", "beside", "as a value", "in a module"])
def test_no_code_of_a_checkpoint_runs(checkpoint: Path, tmp_path: Path, where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made, metadata = tmp_path / "made", dcp.FileSystemReader(checkpoint).read_metadata()
    content = pickle.dumps(Harmful(made))
    if where == "beside":
        metadata.planner_data = {"model/a": Harmful(made)}
        content = pickle.dumps(metadata)
    if where == "as a value":  # which PyTorch unpickles when it is loaded
        dcp.save({"model/a": Harmful(made)}, checkpoint_id=checkpoint, no_dist=True)
        content = (checkpoint / ".metadata").read_bytes()
    if where == "in a module":
        (tmp_path / "harmful_module.py").write_text(f"import os\nos.mkdir({str(made)!r})\nx = 1", encoding="utf-8")
        monkeypatch.syspath_prepend(tmp_path)
        content = b"charmful_module\nx\n."
    (checkpoint / ".metadata").write_bytes(content)
    for read in (lambda: read_whole(checkpoint, "model/"), lambda: read_sharded(checkpoint, dict(TENSORS))):
        with pytest.raises(NanochatError, match=r"is not something that PyTorch writes there about tensors"):
            read()
    assert not made.exists()

"""Checkpoints that ranks wrote in parts, as one process reads them."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp

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


@pytest.mark.parametrize("hidden", [False, True])
def test_no_code_of_a_checkpoint_runs(checkpoint: Path, tmp_path: Path, hidden: bool) -> None:
    metadata = dcp.FileSystemReader(checkpoint).read_metadata()
    metadata.planner_data = {"model/a": Harmful(tmp_path / "made")}
    content = pickle.dumps(metadata if hidden else Harmful(tmp_path / "made"))
    (checkpoint / ".metadata").write_bytes(content)
    for read in (lambda: read_whole(checkpoint, "model/"), lambda: read_sharded(checkpoint, dict(TENSORS))):
        with pytest.raises(NanochatError, match=r"mkdir is nothing that PyTorch writes there"):
            read()
    assert not (tmp_path / "made").exists()

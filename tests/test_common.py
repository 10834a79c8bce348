"""What everything else stands on: files that are whole or not there."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from nanochat.common import atomic_write


@pytest.mark.skipif(os.name == "nt", reason="Windows has no umask")
@pytest.mark.parametrize("umask", [0o002, 0o022, 0o027, 0o077])
def test_a_file_is_as_readable_as_one_that_open_makes(tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        (tmp_path / "opened").write_text("x")
        for _ in ("new", "replaced"):
            atomic_write(tmp_path / "atomic", "x")
            assert (tmp_path / "atomic").stat().st_mode == (tmp_path / "opened").stat().st_mode
    finally:
        os.umask(before)


@pytest.mark.parametrize("failing", ["fsync", "replace"])
def test_a_write_that_fails_leaves_the_old_content_alone(
    tmp_path: Path, failing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    atomic_write(tmp_path / "file", "old")
    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space"):
        patch.setattr(os, failing, fail)
        atomic_write(tmp_path / "file", "new")
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"file": "old"}

"""Habits of the public recipes' users work here, or say what takes their place."""

from __future__ import annotations

from pathlib import Path

import pytest

from nanochat import report


def test_there_is_nothing_to_reset(base_dir: Path, capsys: pytest.CaptureFixture) -> None:
    """Those recipes begin with it; here it needs no run, and removes none."""
    assert report.main(["reset"]) == 0
    assert capsys.readouterr().out == "nothing to reset: every run has its own report\n"

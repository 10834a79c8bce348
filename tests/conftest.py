"""Fixtures that every test may use: a base directory of its own, the real data, and one tiny trained model."""

from __future__ import annotations

from pathlib import Path

import pytest

from nanochat.common import test_data_dir


@pytest.fixture(autouse=True)
def base_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Each test writes below its own NANOCHAT_BASE_DIR, so tests run in parallel and leave nothing behind."""
    path = tmp_path / "nanochat"
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(path))
    return path


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real texts and tasks; the test is skipped where it is absent."""
    path = test_data_dir()
    if path is None:
        pytest.skip("real data is absent: set NANOCHAT_TEST_DATA to its folder")
    return path

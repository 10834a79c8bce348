"""runs/setup.sh, with programs that stand in for uv and nvidia-smi."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.helpers import write_program
from tests.nursery import ROOT

pytestmark = pytest.mark.skipif(os.name == "nt", reason="the script is for Linux, macOS and WSL")


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A folder with the script alone, and programs/ before it on the PATH; uv notes what it is asked to install."""
    (tmp_path / "runs").mkdir()
    shutil.copy(ROOT / "runs" / "setup.sh", tmp_path / "runs")
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    write_program(tmp_path / "programs" / "uv", 'mkdir -p .venv/bin; echo "$@" >>uv.log')
    write_program(tmp_path / "programs" / "nvidia-smi", "exit 1")
    return tmp_path


def _set_up(checkout: Path, *extras: str) -> list[str]:
    """The extras that it installs, if it does."""
    (checkout / "uv.log").write_text("")
    paths = f"{checkout / 'programs'}{os.pathsep}{os.environ['PATH']}"
    subprocess.run(["bash", "runs/setup.sh", *extras], cwd=checkout, env={**os.environ, "PATH": paths}, check=True)
    return [line.rpartition(".")[2] for line in (checkout / "uv.log").read_text().splitlines() if " -e " in line]


def test_an_environment_follows_the_machine(checkout: Path) -> None:
    """One that was made without a GPU is made anew where there is one; one made for a GPU serves without, too."""
    assert _set_up(checkout) == ["[cpu]"]
    assert _set_up(checkout) == []
    (checkout / ".venv" / "old").touch()
    write_program(checkout / "programs" / "nvidia-smi", "exit 0")
    assert _set_up(checkout, "dev") == ["[gpu,dev]"]
    assert not (checkout / ".venv" / "old").exists()
    assert _set_up(checkout) == []
    write_program(checkout / "programs" / "nvidia-smi", "exit 1")
    assert _set_up(checkout) == _set_up(checkout, "dev") == []
    assert _set_up(checkout, "wandb") == ["[gpu,dev,wandb]"]
    assert _set_up(checkout, "dev") == _set_up(checkout, "wandb", "dev") == []  # each call keeps what others installed

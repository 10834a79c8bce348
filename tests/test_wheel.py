"""What is installed without the checkout: all files are in the wheel, and the commands run from any folder."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.nursery import ROOT

PACKAGES = ("nanochat", "scripts", "tasks")
CHECKS = """
import json, pathlib, sys
import nanochat, scripts, tasks
from fastapi.testclient import TestClient
from nanochat.checkpoint_manager import load_model
from nanochat.engine import Engine
from nanochat.server import create_app

for package in (nanochat, scripts, tasks):
    assert pathlib.Path(package.__file__).is_relative_to(sys.argv[1]), package.__file__
for name in ("Arithmetic", "Identity", "SpellingBee"):
    assert len(tasks.build_task(name, "val")) > 0
model, tokenizer, _ = load_model("sft", "cpu", "eval", "tiny")
with TestClient(create_app([Engine(model, tokenizer)], "tiny")) as client:
    print(json.dumps({path: client.get(path).status_code for path in sys.argv[2:]}))
"""


@pytest.fixture(scope="session")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what the wheel installs. Built from a copy, so that the checkout stays as it is."""
    pytest.importorskip("setuptools", minversion="77", reason="setuptools 77 or later is needed to build a wheel")
    folder = tmp_path_factory.mktemp("wheel")
    for name in PACKAGES:
        shutil.copytree(ROOT / name, folder / "source" / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder / "source" / name)
    build = f"from setuptools import build_meta; build_meta.build_wheel({str(folder)!r})"  # as pip does; uv's has no pip
    subprocess.run([sys.executable, "-c", build], cwd=folder / "source", check=True, timeout=120, stdout=subprocess.DEVNULL)
    site = folder / "größe und 空間"
    with zipfile.ZipFile(next(folder.glob("nanochat-*.whl"))) as wheel:
        wheel.extractall(site)  # which is what installing a wheel of pure Python does
    return site


@pytest.mark.slow
def test_every_file_of_the_packages_is_in_the_wheel(installed: Path) -> None:
    for package in PACKAGES:
        names = [
            {path.relative_to(folder).as_posix() for path in (folder / package).rglob("*") if path.is_file()}
            for folder in (ROOT, installed)
        ]
        assert {name for name in names[0] if "__pycache__" not in name} == names[1]


@pytest.mark.slow
def test_the_commands_run_without_the_checkout(installed: Path, tiny_run: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "another folder, é"
    elsewhere.mkdir()
    environment = {**os.environ, "PYTHONPATH": str(installed), "PYTHONIOENCODING": "utf-8"}

    def run(*arguments: str) -> str:
        command = [sys.executable, *arguments]
        done = subprocess.run(command, cwd=elsewhere, env=environment, capture_output=True, encoding="utf-8", timeout=120)
        assert done.returncode == 0, done.stderr
        return done.stdout

    ui = ROOT / "nanochat" / "ui"
    files = [path.relative_to(ui).as_posix() for path in ui.rglob("*") if path.suffix in (".js", ".css")]
    pages = ["/", "/runs", "/docs", *(f"/ui/{name}" for name in files)]
    statuses = run("-c", CHECKS, str(installed), *pages).strip().splitlines()[-1]
    assert json.loads(statuses) == dict.fromkeys(pages, 200)
    assert "usage:" in run("-m", "scripts.base_train", "--help")
    assert run("-m", "scripts.chat_cli", "--model-tag=tiny", "--prompt=Hello", "--max-tokens=4").strip()
    (tiny_run / "report.html").unlink(missing_ok=True)
    run("-m", "nanochat.report", "--model-tag=tiny")
    assert "</html>" in (tiny_run / "report.html").read_text(encoding="utf-8")
    assert not list(elsewhere.iterdir())  # and they write below NANOCHAT_BASE_DIR alone
